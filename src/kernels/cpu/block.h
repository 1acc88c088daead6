// Pieces of the matmul kernels that the primitives and the fused executor share.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/cpu/packed.h"

namespace mlxlm::kernels::cpu {

/** Activation rows that share a pass over a panel: whole twelves, which the kernels take at once. */
constexpr int rows_at_once = 96;

/** Rows [16 * index, + 16) of a matrix times activation rows [m0, m0 + count): c [count][16]. */
void multiply_block16(const PackedMatrix& w, int matrix, int index, const Activations& a, int m0, int count, float* c);

/** Row `n` of a matrix as floats. */
void expand_row(const PackedMatrix& w, int64_t n, float* out);

}  // namespace mlxlm::kernels::cpu
