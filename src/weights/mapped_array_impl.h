// Template part of mapped_array.h.
#pragma once

#include <mlx/allocator.h>

namespace mlxlm::weights {

namespace detail {
/** Marks `a` as evaluated, row contiguous, with this data. */
void adopt(mx::array& a, mx::allocator::Data data);
}  // namespace detail

template <class Fill>
mx::array filled_array(const mx::Shape& shape, mx::Dtype dtype, Fill&& fill) {
  mx::array a(shape, dtype, nullptr, {});
  detail::adopt(a, mx::allocator::malloc(a.nbytes()));
  fill(a.data<void>());
  return a;
}

}  // namespace mlxlm::weights
