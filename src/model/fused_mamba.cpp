// The Mamba-2 mixer in the fused executor. Its states stay float32. Reference: mlx_lm/models/nemotron_h.py NemotronHMamba2Mixer
#include <cmath>

#include "model/fused_program.h"

namespace mlxlm::model::fused {
void Program::mamba(const FusedMamba& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y) {
  const auto& spec = op.spec;
  const int rows = chunk.tokens, wide = op.in.out_dims, inner = op.inner(), channels = op.conv.channels, heads = spec.heads;
  float *projected = spare_[0].get(int64_t(rows) * wide), *mixed = spare_[1].get(int64_t(rows) * channels);
  float *scanned = spare_[2].get(int64_t(rows) * inner), *steps = spare_[3].get(int64_t(rows) * 2 * heads);
  cpu::eager_map(op.in, rows, [&](int row, float* to) { input_row(step, row, to); }, exact(), projected, wide);
  for (int64_t i = 0; i < int64_t(rows) * heads; ++i) {
    const int64_t row = i / heads, h = i % heads;
    const float dt = std::clamp(softplus(projected[row * wide + inner + channels + h] + op.dt_bias[h]), spec.dt_min, spec.dt_max);
    steps[row * 2 * heads + h] = dt;
    steps[row * 2 * heads + heads + h] = std::exp(dt * op.decay[h]);
  }
  convolve(op.conv, op.memory, sequences, chunk, projected + inner, wide, mixed);
  const auto first_row = first_rows(chunk);
  cpu::in_parallel(static_cast<int>(chunk.pieces.size()) * heads, [&](int task) {
    const int p = task / heads, h = task % heads;
    const auto& piece = chunk.pieces[p];
    const auto& place = sequences[piece.sequence].recurrent[op.memory.cache];
    const int64_t row = first_row[p], state = int64_t(h) * spec.head_dim * spec.state, group = h / (heads / spec.groups);
    cpu::ScanHead s;
    s.x = mixed + row * channels + h * spec.head_dim;
    s.b = mixed + row * channels + inner + group * spec.state;
    s.c = s.b + int64_t(spec.groups) * spec.state;
    s.step = steps + row * 2 * heads + h;
    s.decay = s.step + heads;
    s.x_stride = s.bc_stride = channels;
    s.step_stride = 2 * heads;
    s.y = scanned + row * inner + h * spec.head_dim;
    s.y_stride = inner;
    s.state = (*out_)[place.out + 1].data<float>() + state;
    s.from = piece.first > 0 ? s.state : place.in < 0 ? nullptr : (*in_)[place.in + 1].data<float>() + state;
    s.skip = op.skip[h];
    s.tokens = piece.count;
    s.dims = spec.head_dim;
    s.width = spec.state;
    scan_in_blocks(s);
  });
  cpu::eager_map(
      op.out, rows,
      [&](int row, float* to) {
        const auto normalize = [&](const float* from) {
          for (int g = 0; g < inner; g += spec.norm_group)
            cpu::isa().rms_norm(from + g, op.norm.data() + g, spec.norm_eps, spec.norm_group, to + g);
        };
        const float *gate = projected + int64_t(row) * wide, *made = scanned + int64_t(row) * inner;
        const bool first = spec.norm_group > 0 && spec.norm_before_gate;
        if (first) normalize(made);
        cpu::isa().silu_mul(gate, first ? to : made, to, inner);
        if (spec.norm_group > 0 && !first) normalize(to);
      },
      exact(), y, width);
}

/** Few tokens at a time, so that what all rows of the state read stays in the nearest cache. */
void Program::scan_in_blocks(cpu::ScanHead s) {
  constexpr int block = 16;
  for (int left = s.tokens; left > 0; left -= block) {
    s.tokens = std::min(block, left);
    cpu::isa().scan(s);
    s.from = s.state;
    s.x += block * s.x_stride;
    s.b += block * s.bc_stride;
    s.c += block * s.bc_stride;
    s.step += block * s.step_stride;
    s.decay += block * s.step_stride;
    s.y += block * s.y_stride;
  }
}

}  // namespace mlxlm::model::fused
