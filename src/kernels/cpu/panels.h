// Rows of codes <-> panels of 16 rows; no MLX, so that every instruction set's kernels can be tested alone.
#pragma once

#include "kernels/cpu/isa.h"

namespace mlxlm::kernels::cpu {

/** One row as checkpoints store it: codes as a little-endian stream of bits, and a scale (and a bias) for each group. Null = a row of
 * zeros. */
struct StoredRow {
  const uint8_t* codes = nullptr;
  const uint8_t *scales = nullptr, *biases = nullptr;
};

/** Writes 16 rows whose codes have `bits` bits as one panel of panel_bytes(). */
void write_panel(const Panels& p, int bits, const StoredRow (&rows)[16], uint8_t* panel);

/** Row `lane` of a panel as floats. */
void expand_panel_row(const Panels& p, const uint8_t* panel, int lane, float* out);

}  // namespace mlxlm::kernels::cpu
