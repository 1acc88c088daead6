// Template part of mapped_array.h.
#pragma once

#include <cstddef>

#include <mlx/allocator.h>

namespace mlxlm::weights {

namespace detail {
/** Uninitialized memory whose 64-byte aligned data is at raw_ptr(). Large blocks go back to the system when they die: the C library would
 * keep them, and a loader that repacks its arrays would hold everything twice. Throws Error(out_of_memory). */
mx::allocator::Data reserve(std::size_t bytes);
/** Marks `a` as evaluated, row contiguous, with this data. */
void adopt(mx::array& a, mx::allocator::Data data);
}  // namespace detail

template <class Fill>
mx::array filled_array(const mx::Shape& shape, mx::Dtype dtype, Fill&& fill) {
  mx::array a(shape, dtype, nullptr, {});
  detail::adopt(a, detail::reserve(a.nbytes()));
  fill(a.data<void>());
  return a;
}

}  // namespace mlxlm::weights
