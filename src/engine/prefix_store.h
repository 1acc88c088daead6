// Where prefixes outlive the engine: what it asks of whoever keeps them.
#pragma once

#include <cstdint>
#include <span>

#include "engine/runner.h"

namespace mlxlm::engine {

/** `space` keeps apart what cannot be mixed, as in PrefixCache. Thread: the engine's. A store that fails is a store without the prefix:
 * nothing here throws. */
class PrefixStore {
 public:
  virtual ~PrefixStore() = default;
  struct Found {
    int usable_tokens = 0;  // 0 = nothing of use
    int64_t bytes = 0;      // that a cache with it takes
  };
  /** What load() would spare of this prompt; at least one token is left to process. */
  virtual Found find(std::span<const int> prompt, uint64_t space) noexcept = 0;
  struct Loaded {
    CacheId cache = 0;              // 0 = it could not be had after all; else the caller's
    std::span<const int> tokens{};  // what it holds; valid until the next call
  };
  virtual Loaded load(std::span<const int> prompt, uint64_t space) noexcept = 0;
  /** The cache holds exactly these tokens, and stays the caller's, who no longer changes it: it may be copied and freed. The store may
   * write it later: at the latest when it ends. */
  virtual void save(CacheId cache, std::span<const int> tokens, uint64_t space) noexcept = 0;
  /** That what is not yet written holds in memory, caches that the caller has or had included. */
  virtual int64_t unwritten_bytes() noexcept = 0;
  /** Gives up what is not yet written, the latest first, until at most so many bytes are held. */
  virtual void shrink_unwritten(int64_t bytes) noexcept = 0;
};

}  // namespace mlxlm::engine
