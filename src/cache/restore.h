// What a file holds of a cache -> the cache. Part of cache/*.cpp only.
#pragma once

#include <cstdint>
#include <string>

#include "cache/cache.h"
#include "cache/layer_shape.h"

namespace mlxlm::cache {

constexpr int64_t most_tokens = int64_t{1} << 30;  // sums of lengths stay within int

/** Checks everything that a kernel relies on. `where` begins every message. Throws Error(bad_weights), Error(unsupported). */
CachePtr restore(const Stored& stored, const LayerShape& wanted, const std::string& where);

}  // namespace mlxlm::cache
