// The order of rows in a rotating cache, whatever they consist of. Part of cache/*.cpp only.
#pragma once

#include <vector>

#include <mlx/array.h>

namespace mlxlm::cache {

namespace mx = mlx::core;

/** Buffers that lie side by side, one row a token: keys and values, or the parts of quantized ones. */
using Planes = std::vector<mx::array>;

/** Keeps the first `keep` rows and the most recent, `max_size` in all. Reference: mlx_lm/models/cache.py RotatingKVCache */
struct Ring {
  int max_size = 0, keep = 0, offset = 0, index = 0;

  /** Adds the rows of `fresh` [B,K,L,*] to `planes` (empty at first) and returns what queries of this call see. */
  Planes update(Planes& planes, const Planes& fresh);
  bool trimmable() const { return offset < max_size; }
  int trim(int n);
  bool one_call_agrees(int tokens) const { return tokens == 1 || keep == 0 || offset + tokens <= max_size; }
  /** Whether buffers of `rows` rows can belong to these numbers, which may come from a file. */
  bool consistent(int rows) const;

 private:
  void update_many(Planes& planes, const Planes& fresh);
  void update_one(Planes& planes, const Planes& fresh);
  mx::array temporal_order(const mx::array& v) const;
  mx::array trimmed(int count, const mx::array& v, const mx::array* append) const;
};

}  // namespace mlxlm::cache
