// Short convolutions in the fused executor: LFM2's gated ones, and those in front of state spaces. Reference: mlx_lm/models/lfm2.py
// ShortConv
#include "model/fused_program.h"

namespace mlxlm::model::fused {

void convolve_piece(const FusedConv& conv, const float* tail, const float* input, int64_t stride, int count, float* out, float* new_tail) {
  const int channels = conv.channels, taps = conv.taps;
  const auto row_of = [&](int l) { return l < 0 ? tail + int64_t(l + taps - 1) * channels : input + l * stride; };
  constexpr int columns = 1024;
  const int blocks = (channels + columns - 1) / columns;
  for_rows(count * blocks, int64_t(columns) * (conv.silu ? 8 : 2), [&](int task) {
    const int l = task / blocks, from = task % blocks * columns, to = std::min(channels, from + columns);
    constexpr int most_taps = 8;
    const float* few[most_taps];
    std::vector<const float*> many(taps > most_taps ? taps : 0);
    const float** rows = taps > most_taps ? many.data() : few;
    for (int t = 0; t < taps; ++t) rows[t] = row_of(l - taps + 1 + t);
    float* sum = out + int64_t(l) * channels;
    cpu::isa().convolve(rows, conv.weight.data(), conv.bias.empty() ? nullptr : conv.bias.data(), taps, from, to, channels, sum);
    if (conv.silu) cpu::isa().silu_mul(sum + from, nullptr, sum + from, to - from);
  });
  // In order, because the new tail may be the old one's memory.
  for (int t = 0; t < taps - 1; ++t) std::memmove(new_tail + int64_t(t) * channels, row_of(count - taps + 1 + t), channels * sizeof(float));
}

/** input [tokens][stride] -> out [tokens][channels], each sequence after its own tail. */
void Program::convolve(const FusedConv& conv, const FusedState& memory, const std::vector<Sequence>& sequences, const Chunk& chunk,
                       const float* input, int64_t stride, float* out) const {
  const std::vector<float> zeros(int64_t(conv.taps - 1) * conv.channels, 0.f);
  int64_t at = 0;
  for (const auto& piece : chunk.pieces) {
    const auto& place = sequences[piece.sequence].recurrent[memory.cache];
    auto* new_tail = (*out_)[place.out].data<float>();
    const float* tail = piece.first > 0 ? new_tail : place.in < 0 ? zeros.data() : (*in_)[place.in].data<float>();
    convolve_piece(conv, tail, input + at * stride, stride, piece.count, out + at * conv.channels, new_tail);
    at += piece.count;
  }
}

void Program::short_conv(const FusedShortConv& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk,
                         float* y) {
  const int rows = chunk.tokens, wide = 3 * width;  // the gates of the input and of the output, the input
  float *projected = spare_[0].get(int64_t(rows) * wide), *mixed = spare_[1].get(int64_t(rows) * width);
  cpu::eager_map(op.in, rows, [&](int row, float* to) { input_row(step, row, to); }, exact(), projected, wide);
  for_rows(rows, width, [&](int row) {
    float* at = projected + int64_t(row) * wide;
    cpu::isa().multiply(at, at + 2 * width, at + 2 * width, width);
  });
  convolve(op.conv, op.memory, sequences, chunk, projected + 2 * width, wide, mixed);
  cpu::eager_map(
      op.out, rows,
      [&](int row, float* to) { cpu::isa().multiply(projected + int64_t(row) * wide + width, mixed + int64_t(row) * width, to, width); },
      exact(), y, width);
}

}  // namespace mlxlm::model::fused
