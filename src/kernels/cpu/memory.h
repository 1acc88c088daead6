// Memory for arrays: MLX's allocator of the CPU returns null where there is none, and whoever writes there ends the program.
#pragma once

#include <cstddef>

#include <fmt/format.h>
#include <mlx/allocator.h>

#include "base/error.h"

namespace mlxlm::kernels::cpu {

/** Throws Error(out_of_memory). */
inline mlx::core::allocator::Data allocate(std::size_t bytes) {
  auto data = mlx::core::allocator::malloc(bytes);
  if (bytes > 0 && data.buffer().ptr() == nullptr) {
    throw Error(Code::out_of_memory, "memory", fmt::format("the system has none for {:.3f} GB more", static_cast<double>(bytes) / 1e9));
  }
  return data;
}

}  // namespace mlxlm::kernels::cpu
