// The gated delta net in the fused executor. Its states stay float32. Reference: mlx_lm/models/qwen3_next.py Qwen3NextGatedDeltaNet,
// qwen3_5.py
#include <cmath>

#include "model/fused_program.h"

namespace mlxlm::model::fused {
namespace {

/** A row of q, k, v, z and then b, a of one key head after the other becomes q, k, v, z, b, a of all heads. */
void by_kind(const arch::GatedDelta& op, const float* from, float* to) {
  const int groups = op.key_heads, steps = op.value_heads / groups;
  const auto gather = [&](const float* first, int64_t stride, int64_t count) {
    for (int g = 0; g < groups; ++g, to += count) std::memcpy(to, first + g * stride, count * sizeof(float));
  };
  const int64_t e = op.key_dim, values = op.values() / groups, wide = 2 * e + 2 * values;
  for (const auto& [at, count] : {std::pair(int64_t{0}, e), {e, e}, {2 * e, values}, {2 * e + values, values}})
    gather(from + at, wide, count);
  const float* ba = from + groups * wide;
  gather(ba, 2 * steps, steps);
  gather(ba + steps, 2 * steps, steps);
}

}  // namespace

void Program::gated_delta(const FusedGatedDelta& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk,
                          float* y) {
  const auto& spec = op.spec;
  const int rows = chunk.tokens, wide = op.in.out_dims, channels = spec.channels(), keys = spec.keys(), heads = spec.value_heads;
  float *given = spare_[0].get(int64_t(rows) * wide), *mixed = spare_[1].get(int64_t(rows) * channels);
  float *scanned = spare_[2].get(int64_t(rows) * spec.values()), *steps = spare_[3].get(int64_t(rows) * 2 * heads);
  cpu::eager_map(op.in, rows, [&](int row, float* to) { input_row(step, row, to); }, exact(), given, wide);
  const float* projected = given;
  if (!spec.split) {
    float* sorted = spare_[4].get(int64_t(rows) * wide);
    for_rows(rows, wide, [&](int row) { by_kind(spec, given + int64_t(row) * wide, sorted + int64_t(row) * wide); });
    projected = sorted;
  }
  convolve(op.conv, op.memory, sequences, chunk, projected, wide, mixed);
  for_rows(rows, channels, [&](int row) {
    float* at = mixed + int64_t(row) * channels;
    for (int g = 0; g < keys; g += spec.key_dim) op.unit_q(at + g, spec.key_dim, at + g);
    for (int g = keys; g < 2 * keys; g += spec.key_dim) op.unit_k(at + g, spec.key_dim, at + g);
    const float *b = projected + int64_t(row) * wide + channels + spec.values(), *a = b + heads;
    float *decay = steps + int64_t(row) * 2 * heads, *beta = decay + heads;
    for (int h = 0; h < heads; ++h) {
      decay[h] = std::exp(op.rate[h] * softplus(a[h] + op.dt_bias[h]));
      beta[h] = sigmoid(b[h]);
    }
  });
  const auto first_row = first_rows(chunk);
  cpu::eager_delta(static_cast<int>(chunk.pieces.size()) * heads, spec.value_dim, [&](int task) {
    const int p = task / heads, h = task % heads;
    const auto& piece = chunk.pieces[p];
    const auto& place = sequences[piece.sequence].recurrent[op.memory.cache];
    const int64_t row = first_row[p], state = int64_t(h) * spec.value_dim * spec.key_dim, group = h / (heads / spec.key_heads);
    cpu::DeltaHead s;
    s.q = mixed + row * channels + group * spec.key_dim;
    s.k = s.q + keys;
    s.v = mixed + row * channels + 2 * keys + int64_t(h) * spec.value_dim;
    s.decay = steps + row * 2 * heads + h;
    s.beta = s.decay + heads;
    s.qk_stride = s.v_stride = channels;
    s.step_stride = 2 * heads;
    s.y = scanned + row * spec.values() + int64_t(h) * spec.value_dim;
    s.y_stride = spec.values();
    s.state = (*out_)[place.out + 1].data<float>() + state;
    s.from = piece.first > 0 ? s.state : place.in < 0 ? nullptr : (*in_)[place.in + 1].data<float>() + state;
    s.tokens = piece.count;
    s.width = spec.key_dim;
    return s;
  });
  const auto gated = [&](int row, float* to) {
    const float* from = scanned + int64_t(row) * spec.values();
    for (int g = 0; g < spec.values(); g += spec.value_dim) op.norm(from + g, spec.value_dim, to + g);
    cpu::isa().silu_mul(projected + int64_t(row) * wide + channels, to, to, spec.values());
  };
  cpu::eager_map(op.out, rows, gated, exact(), y, width);
}

}  // namespace mlxlm::model::fused
