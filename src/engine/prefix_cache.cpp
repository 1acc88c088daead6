// The trie: edges are runs of tokens, every node but a root holds an entry or branches.
#include "engine/prefix_cache.h"

#include <algorithm>

namespace mlxlm::engine {

struct PrefixCache::Node {
  Node* parent = nullptr;
  std::vector<int> run;                           // the edge from the parent
  int depth = 0;                                  // tokens from the root to the end of the edge
  std::map<int, std::unique_ptr<Node>> children;  // by the first token of their run
  std::optional<Order::iterator> held;
  int trimmable_below = 0;  // entries here and below
};

/** How far tokens follow the trie. */
struct PrefixCache::Walk {
  Node* node;   // the last node whose whole edge was matched
  Node* next;   // the child whose edge was matched in part, or null
  int matched;  // tokens in all
};

namespace {

std::size_t common(std::span<const int> a, std::span<const int> b) {
  return static_cast<std::size_t>(std::ranges::mismatch(a, b).in1 - a.begin());
}

}  // namespace

PrefixCache::PrefixCache(int64_t budget_bytes) : budget_bytes_(budget_bytes) {}
PrefixCache::~PrefixCache() = default;

PrefixCache::Node& PrefixCache::root(uint64_t space) {
  auto& found = roots_[space];
  if (!found) found = std::make_unique<Node>();
  return *found;
}

PrefixCache::Walk PrefixCache::walk(Node& from, std::span<const int> tokens) {
  Walk at{&from, nullptr, 0};
  while (static_cast<std::size_t>(at.matched) < tokens.size()) {
    const auto rest = tokens.subspan(at.matched);
    const auto child = at.node->children.find(rest.front());
    if (child == at.node->children.end()) return at;
    const auto shared = common(rest, child->second->run);
    at.matched += static_cast<int>(shared);
    if (shared < child->second->run.size()) {
      at.next = child->second.get();
      return at;
    }
    at.node = child->second.get();
  }
  return at;
}

/** The nearest of the trimmable entries at or below a node that has one. */
PrefixCache::Node* PrefixCache::any_trimmable(Node* node) {
  while (!(node->held && (*node->held)->entry.trimmable)) {
    Node* best = nullptr;
    for (const auto& [token, child] : node->children) {
      if (child->trimmable_below > 0 && (best == nullptr || child->depth < best->depth)) best = child.get();
    }
    node = best;
  }
  return node;
}

std::optional<PrefixCache::Hit> PrefixCache::find(std::span<const int> prompt, uint64_t space) {
  const auto found_root = roots_.find(space);
  if (prompt.size() < 2 || found_root == roots_.end()) return std::nullopt;
  const auto usable = prompt.first(prompt.size() - 1);
  const auto at = walk(*found_root->second, usable);
  if (at.matched == 0) return std::nullopt;
  Node* best = nullptr;
  int tokens = 0;
  if (at.next != nullptr && at.next->trimmable_below > 0) {
    best = any_trimmable(at.next);
    tokens = at.matched;
  }
  for (Node* node = at.node; best == nullptr && node->parent != nullptr; node = node->parent) {
    if (node->held) {
      best = node;
    } else if (node->trimmable_below > 0) {
      best = any_trimmable(node);
    }
    tokens = node->depth;
  }
  if (best == nullptr) return std::nullopt;
  touch(*best);
  return Hit{(*best->held)->entry, tokens};
}

void PrefixCache::touch(Node& node) {
  order_.splice(order_.end(), order_, *node.held);
}

/** The node for exactly these tokens; edges are split as needed. */
PrefixCache::Node* PrefixCache::make_node(Node& from, std::span<const int> tokens) {
  const auto at = walk(from, tokens);
  if (static_cast<std::size_t>(at.matched) == tokens.size() && at.next == nullptr) return at.node;
  Node* parent = at.node;
  if (at.next != nullptr) {
    const int kept = at.matched - at.node->depth;
    auto middle = std::make_unique<Node>();
    auto lower = std::move(at.node->children.at(at.next->run.front()));
    middle->parent = at.node;
    middle->depth = at.matched;
    middle->run.assign(lower->run.begin(), lower->run.begin() + kept);
    middle->trimmable_below = lower->trimmable_below;
    lower->run.erase(lower->run.begin(), lower->run.begin() + kept);
    lower->parent = middle.get();
    parent = middle.get();
    middle->children.emplace(lower->run.front(), std::move(lower));
    auto& slot = at.node->children.at(parent->run.front());
    slot = std::move(middle);
  }
  if (static_cast<std::size_t>(at.matched) == tokens.size()) return parent;
  auto leaf = std::make_unique<Node>();
  leaf->parent = parent;
  leaf->depth = static_cast<int>(tokens.size());
  leaf->run.assign(tokens.begin() + at.matched, tokens.end());
  Node* made = leaf.get();
  parent->children.emplace(made->run.front(), std::move(leaf));
  return made;
}

void PrefixCache::count_trimmable(Node* node, int change) {
  for (; node != nullptr; node = node->parent) node->trimmable_below += change;
}

/** Removes nodes that neither hold nor branch. */
void PrefixCache::prune(Node* node) {
  while (node->parent != nullptr && !node->held && node->children.size() <= 1) {
    Node* parent = node->parent;
    auto& slot = parent->children.at(node->run.front());
    if (node->children.size() == 1) {
      auto child = std::move(node->children.begin()->second);
      child->run.insert(child->run.begin(), node->run.begin(), node->run.end());
      child->parent = parent;
      slot = std::move(child);
      return;
    }
    parent->children.erase(node->run.front());
    node = parent;
  }
  if (node->parent == nullptr && node->children.empty()) {
    std::erase_if(roots_, [&](const auto& item) { return item.second.get() == node; });
  }
}

/** Forgets an entry; its node stays. */
CacheId PrefixCache::release(Order::iterator held) {
  const auto entry = held->entry;
  bytes_ -= entry.bytes;
  if (entry.trimmable) count_trimmable(held->node, -1);
  held->node->held.reset();
  order_.erase(held);
  return entry.cache;
}

CacheId PrefixCache::drop(Order::iterator held) {
  Node* node = held->node;
  const auto cache = release(held);
  prune(node);
  return cache;
}

bool PrefixCache::covers(std::span<const int> tokens, uint64_t space) {
  const auto found_root = roots_.find(space);
  if (tokens.empty() || found_root == roots_.end()) return false;
  const auto at = walk(*found_root->second, tokens);
  if (static_cast<std::size_t>(at.matched) < tokens.size()) return false;
  Node* covering = at.next != nullptr ? at.next : at.node;
  if (at.next == nullptr && covering->held) {
    touch(*covering);
    return true;
  }
  if (covering->trimmable_below == 0) return false;
  touch(*any_trimmable(covering));
  return true;
}

std::vector<CacheId> PrefixCache::insert(std::span<const int> tokens, Entry entry, uint64_t space) {
  std::vector<CacheId> out;
  entry.tokens = static_cast<int>(tokens.size());
  if (tokens.empty() || entry.bytes < 0 || entry.bytes > budget_bytes_) return {entry.cache};
  // A longer one that can be trimmed to this one serves as well.
  Node& top = root(space);
  const auto at = walk(top, tokens);
  Node* covering = at.next != nullptr ? at.next : at.node;
  if (static_cast<std::size_t>(at.matched) == tokens.size() && covering->trimmable_below > 0) {
    Node* held = any_trimmable(covering);
    const bool equal = held->depth == entry.tokens;
    if (!equal) {
      touch(*held);
      return {entry.cache};
    }
  }
  Node* node = make_node(top, tokens);
  if (node->held) out.push_back(release(*node->held));
  node->held = order_.insert(order_.end(), Held{entry, node});
  if (entry.trimmable) count_trimmable(node, 1);
  bytes_ += entry.bytes;
  if (entry.trimmable) {
    std::vector<Order::iterator> needless;
    for (Node* above = node->parent; above != nullptr; above = above->parent) {
      if (above->held) needless.push_back(*above->held);
    }
    for (const auto& held : needless) out.push_back(drop(held));
  }
  auto evicted = shrink_to(budget_bytes_);
  out.insert(out.end(), evicted.begin(), evicted.end());
  return out;
}

std::vector<CacheId> PrefixCache::shrink_to(int64_t bytes) {
  std::vector<CacheId> out;
  while (bytes_ > std::max<int64_t>(bytes, 0) && !order_.empty()) out.push_back(drop(order_.begin()));
  return out;
}

std::vector<CacheId> PrefixCache::set_budget(int64_t bytes) {
  budget_bytes_ = std::max<int64_t>(bytes, 0);
  return shrink_to(budget_bytes_);
}

std::vector<PrefixCache::Content> PrefixCache::contents() const {
  std::vector<Content> list;
  for (const auto& held : order_) {
    Content content{held.entry, std::vector<int>(held.node->depth)};
    const Node* node = held.node;
    for (; node->parent != nullptr; node = node->parent) std::ranges::copy(node->run, content.tokens.begin() + node->parent->depth);
    for (const auto& [space, top] : roots_) {
      if (top.get() == node) content.space = space;
    }
    list.push_back(std::move(content));
  }
  return list;
}

std::vector<PrefixCache::Entry> PrefixCache::entries() const {
  std::vector<Entry> list;
  for (const auto& held : order_) list.push_back(held.entry);
  return list;
}

}  // namespace mlxlm::engine
