// What a layer's cache holds for one token, from the description; and whether a cache is one of this layer.
#pragma once

#include <optional>
#include <vector>

#include "cache/cache.h"
#include "plan/plan.h"

namespace mlxlm::cache {

/** Sizes of keys and values; unknown for kinds of layers that this file does not know (then only the totals of the plan hold). */
struct LayerShape {
  plan::LayerCache layer{};
  struct Kv {
    int kv_heads = 0, key_dims = 0, value_dims = 0;
  };
  std::optional<Kv> kv{};
  std::vector<std::vector<int>> slots{};  // shapes of a recurrent layer's state, [1, ..]; empty = unknown
};

/** As plan::cache_layout(). */
std::vector<LayerShape> layer_shapes(const arch::Model& model);

/** Throws Error(bad_request) unless the model could have made these caches: kinds, heads and sizes. They may be of another model with the
 * same sizes. */
void check_fits(const Caches& caches, const arch::Model& model);

}  // namespace mlxlm::cache
