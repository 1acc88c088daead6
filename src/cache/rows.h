// Rows of cache buffers [B,K,C,*]: cutting, growing, writing in place. Part of cache/*.cpp only.
#pragma once

#include <algorithm>
#include <optional>

#include <mlx/array.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "kernels/cpu/kernels.h"

namespace mlxlm::cache {

namespace mx = mlx::core;

constexpr int block_tokens = 256;

inline mx::array rows(const mx::array& a, int from, int to) {
  return mx::slice(a, {0, 0, from, 0}, {a.shape(0), a.shape(1), to, a.shape(3)});
}

inline mx::array zeros_like_rows(const mx::array& a, int count) {
  return mx::zeros({a.shape(0), a.shape(1), count, a.shape(3)}, a.dtype());
}

/** buffer with x at [start, start + L); in place where we own the memory. */
inline mx::array written(const mx::array& buffer, const mx::array& x, int start) {
  if (kernels::cpu::active()) return kernels::cpu::write_rows(buffer, x, start);
  return mx::slice_update(buffer, x, mx::Shape{0, 0, start, 0}, mx::Shape{x.shape(0), x.shape(1), start + x.shape(2), x.shape(3)});
}

/** buffer [B,K,C,E] with room for `wanted` tokens, of which `used` are kept. */
inline mx::array grown(const std::optional<mx::array>& buffer, const mx::array& like, int used, int wanted) {
  const int capacity = (wanted + block_tokens - 1) / block_tokens * block_tokens;
  if (!buffer) return zeros_like_rows(like, capacity);
  if (buffer->shape(2) >= wanted) return *buffer;
  // Half as much again, so that a long run copies each token a bounded number of times.
  const int target = std::max(capacity, (buffer->shape(2) * 3 / 2 + block_tokens - 1) / block_tokens * block_tokens);
  const auto kept = rows(*buffer, 0, used);
  return mx::contiguous(mx::concatenate({kept, zeros_like_rows(like, target - used)}, 2));
}

/** A copy in memory of its own; contiguous() of MLX may share it, adding nothing does not. */
inline mx::array deep(const mx::array& a) {
  auto copied = mx::add(a, mx::zeros({1}, a.dtype()));
  mx::eval(copied);
  return copied;
}
inline std::optional<mx::array> deep(const std::optional<mx::array>& a) {
  if (!a) return std::nullopt;
  return deep(*a);
}

}  // namespace mlxlm::cache
