// Caches of token runs that later prompts may begin with: a trie from tokens to opaque cache ids, with true LRU and a byte budget.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/runner.h"

namespace mlxlm::engine {

/** Knows no arrays: whoever owns the caches frees the ids that come back. The bytes held never exceed the budget. */
class PrefixCache {
 public:
  explicit PrefixCache(int64_t budget_bytes);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  struct Entry {
    CacheId cache = 0;
    int tokens = 0;
    int64_t bytes = 0;
    bool trimmable = false;
  };
  struct Hit {
    Entry entry;
    int usable_tokens = 0;  // less than entry.tokens: trim after copying
  };

  /** The entry that spares the most tokens of this prompt, and marks it as used. At least one token is always left to process.
   *  `space` keeps apart what cannot be mixed (another limit of the cache, another adapter). */
  std::optional<Hit> find(std::span<const int> prompt, uint64_t space = 0);

  /** Whether an entry for exactly these tokens is needless: an equal one is held, or a longer one that can be trimmed. Marks it as used. */
  bool covers(std::span<const int> tokens, uint64_t space = 0);

  /** Takes the entry for exactly these tokens (entry.tokens is set from them). Returns the caches that are not held (any more): the one
   * given, when it is too large or a held one serves as well; an equal one; shorter ones that a trimmable one makes needless; the least
   * recently used. */
  std::vector<CacheId> insert(std::span<const int> tokens, Entry entry, uint64_t space = 0);

  /** Gives up the least recently used until at most so many bytes are held. */
  std::vector<CacheId> shrink_to(int64_t bytes);
  std::vector<CacheId> set_budget(int64_t bytes);

  int64_t bytes() const { return bytes_; }
  int64_t budget_bytes() const { return budget_bytes_; }
  std::size_t size() const { return order_.size(); }
  /** From the least to the most recently used. */
  std::vector<Entry> entries() const;
  struct Content {
    Entry entry;
    std::vector<int> tokens;
    uint64_t space = 0;
  };
  /** In the same order. */
  std::vector<Content> contents() const;

 private:
  struct Node;
  struct Held {
    Entry entry;
    Node* node;
  };
  using Order = std::list<Held>;
  struct Walk;

  Node& root(uint64_t space);
  static Walk walk(Node& from, std::span<const int> tokens);
  static Node* make_node(Node& from, std::span<const int> tokens);
  static Node* any_trimmable(Node* node);
  void touch(Node& node);
  CacheId release(Order::iterator held);
  CacheId drop(Order::iterator held);
  static void count_trimmable(Node* node, int change);
  void prune(Node* node);

  int64_t budget_bytes_, bytes_ = 0;
  std::map<uint64_t, std::unique_ptr<Node>> roots_;
  Order order_;  // least recently used first
};

}  // namespace mlxlm::engine
