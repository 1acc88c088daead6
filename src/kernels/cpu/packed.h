// Weights in the layout of the matmul kernels.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"

namespace mlxlm::kernels::cpu {

class Slab;

/** 64-byte aligned memory, in huge pages where the system gives them: small ones lie side by side, as each alone would have none. Reading
 * some KB past the end is allowed. */
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes);
  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Slab> slab_;
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

class PackedMatrix {
 public:
  int matrices = 1;  // stacked experts
  int rows = 0, k = 0;
  // quantized
  Arena arena{};
  Panels panels{};
  // dense: parts one below the other
  struct Part {
    mx::array array;
    int rows;
  };
  std::vector<Part> parts{};
  Storage storage = Storage::f32;

  bool quantized() const { return parts.empty(); }
  int panel_count() const { return (rows + 15) / 16; }
  const uint8_t* panel(int matrix, int index) const {
    return arena.data() + (int64_t(matrix) * panel_count() + index) * panels.panel_bytes();
  }
  /** Pointer to dense row `row` of `matrix`. */
  const void* dense_row(int matrix, int row) const;
};

/** Storage of a float dtype. Throws Error(unsupported) for others. */
Storage storage_of(mx::Dtype dtype);

}  // namespace mlxlm::kernels::cpu
