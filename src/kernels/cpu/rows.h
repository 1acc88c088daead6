// Rows of arrays with any strides, as float32.
#pragma once

#include <cstring>
#include <vector>

#include <mlx/allocator.h>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/packed.h"

namespace mlxlm::kernels::cpu {

/** The last axis of an array, row by row in row-major order of the leading axes. */
class Rows {
 public:
  explicit Rows(const mx::array& a) : a_(a), storage_(storage_of(a.dtype())), item_bytes_(mx::size_of(a.dtype())) {
    width_ = a.ndim() == 0 ? 1 : a.shape(-1);
    count_ = width_ == 0 ? 0 : static_cast<int64_t>(a.size()) / width_;
  }
  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  Storage storage() const { return storage_; }

  /** Elements from the start of the buffer to row `row`. */
  int64_t offset(int64_t row) const {
    if (a_.flags().row_contiguous) return row * width_;
    int64_t at = 0;
    for (int axis = static_cast<int>(a_.ndim()) - 2; axis >= 0; --axis) {
      at += row % a_.shape(axis) * a_.strides(axis);
      row /= a_.shape(axis);
    }
    return at;
  }
  void load(int64_t row, float* to) const {
    const auto* base = a_.data<uint8_t>() + offset(row) * item_bytes_;
    const int64_t stride = a_.ndim() == 0 ? 1 : a_.strides(-1);
    if (stride == 1 || width_ == 1) return isa().load(base, storage_, to, width_);
    for (int64_t i = 0; i < width_; ++i) isa().load(base + i * stride * item_bytes_, storage_, to + i, 1);
  }

 private:
  const mx::array& a_;
  Storage storage_;
  int64_t item_bytes_;
  int64_t width_ = 0, count_ = 0;
};

/** Row `row` of a fresh (row contiguous) output. */
inline void store_row(mx::array& out, int64_t row, int64_t width, const float* from) {
  isa().store(from, storage_of(out.dtype()), out.data<uint8_t>() + row * width * static_cast<int64_t>(mx::size_of(out.dtype())), width);
}

/** A view of four axes, at once and row contiguous. */
inline mx::array copy_without_gaps(const mx::array& a) {
  const auto item = static_cast<int64_t>(mx::size_of(a.dtype()));
  mx::array copy(mx::allocator::malloc(a.nbytes()), a.shape(), a.dtype());
  auto* to = copy.data<uint8_t>();
  for (int64_t b = 0; b < a.shape(0); ++b) {
    for (int64_t h = 0; h < a.shape(1); ++h) {
      for (int64_t s = 0; s < a.shape(2); ++s) {
        const auto* from = a.data<uint8_t>() + (b * a.strides(0) + h * a.strides(1) + s * a.strides(2)) * item;
        for (int64_t i = 0; i < a.shape(3); ++i, to += item) std::memcpy(to, from + i * a.strides(3) * item, item);
      }
    }
  }
  return copy;
}

/** Memory of a thread, kept between kernels. Slots keep several buffers of one kernel apart. */
inline float* scratch(int slot, int64_t floats) {
  thread_local std::vector<float> buffers[6];
  auto& buffer = buffers[slot];
  if (static_cast<int64_t>(buffer.size()) < floats + 64) buffer.resize(floats + 64);
  return buffer.data();
}

/** Chunks for `work` items so that each thread gets several. */
inline int chunks_for(int64_t work, int threads) {
  const int64_t wanted = threads == 1 ? 1 : int64_t(threads) * 6;
  return static_cast<int>(work < wanted ? work : wanted);
}

}  // namespace mlxlm::kernels::cpu
