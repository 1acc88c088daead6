// A step from tokens to logits, layer by layer, and its feed-forward ops.
#include "model/fused_program.h"

#include <cmath>

#include "kernels/cpu/rows.h"

namespace mlxlm::model::fused {

void Program::rotate_tables(const std::vector<Sequence>& sequences, const Chunk& chunk) {
  cosines_.resize(rotations.size());
  sines_.resize(rotations.size());
  for (std::size_t i = 0; i < rotations.size(); ++i) {
    const auto& frequencies = rotations[i].frequencies;
    const std::size_t pairs = frequencies.size();
    cosines_[i].resize(chunk.tokens * pairs);
    sines_[i].resize(chunk.tokens * pairs);
    std::size_t at = 0;
    for (const auto& piece : chunk.pieces) {
      for (int l = 0; l < piece.count; ++l) {
        const double position = sequences[piece.sequence].offset + piece.first + l;
        for (std::size_t p = 0; p < pairs; ++p, ++at) {
          const double angle = position * frequencies[p];
          cosines_[i][at] = static_cast<float>(std::cos(angle));
          sines_[i][at] = static_cast<float>(std::sin(angle));
        }
      }
    }
  }
}

void Program::run_op(const FusedOp& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y) {
  if (const auto* a = std::get_if<FusedAttention>(&op))
    attention(*a, step, sequences, chunk, y);
  else if (const auto* l = std::get_if<FusedLatent>(&op))
    latent_attention(*l, step, sequences, chunk, y);
  else if (const auto* e = std::get_if<FusedExperts>(&op))
    experts(*e, step, chunk.tokens, y);
  else if (const auto* m = std::get_if<FusedMamba>(&op))
    mamba(*m, step, sequences, chunk, y);
  else if (const auto* c = std::get_if<FusedShortConv>(&op))
    short_conv(*c, step, sequences, chunk, y);
  else if (const auto* d = std::get_if<FusedGatedDelta>(&op))
    gated_delta(*d, step, sequences, chunk, y);
  else
    feed_forward(std::get<FusedFeedForward>(op), step, chunk.tokens, y);
}

void Program::run_chunk(const int* tokens, const std::vector<Sequence>& sequences, const Chunk& chunk, mx::array& logits, int& next_row) {
  const int rows = chunk.tokens;
  x_ = x_buffer_.get(int64_t(rows) * width);
  for_rows(rows, width, [&](int row) {
    float* x = x_ + int64_t(row) * width;
    cpu::eager_embedding(*embedding, tokens[row], x);
    if (embed_scale != 1.f) {
      for (int i = 0; i < width; ++i) x[i] *= embed_scale;
    }
  });
  rotate_tables(sequences, chunk);
  float *y = y_.get(int64_t(rows) * width), *more = nullptr;
  for (const auto& step : steps) {
    for (std::size_t i = 0; i < step.ops.size(); ++i) {
      if (stopped()) return;
      if (i > 0) more = more_.get(int64_t(rows) * width);
      float* out = i == 0 ? y : more;
      run_op(step.ops[i], step, sequences, chunk, out);
      if (i > 0) cpu::isa().add_scaled(y, more, 1.f, int64_t(rows) * width);
    }
    for_rows(rows, width, [&](int row) {
      float *x = x_ + int64_t(row) * width, *from = y + int64_t(row) * width;
      if (step.post) (*step.post)(from, width, from);
      cpu::isa().add_scaled(x, from, step.scale, width);
    });
  }
  write_logits(sequences, chunk, logits, next_row);
}

float softplus(float x) {
  return x > 20.f ? x : std::log1p(std::exp(x));
}

float sigmoid(float x) {
  return 1.f / (1.f + std::exp(-x));
}

void act_row(arch::Act act, const float* gate, const float* up, float* out, int n) {
  switch (act) {
    case arch::Act::silu:
      return cpu::isa().silu_mul(gate, up, out, n);
    case arch::Act::gelu_tanh:
      return cpu::isa().gelu_tanh_mul(gate, up, out, n);
    case arch::Act::gelu:
      for (int i = 0; i < n; ++i) out[i] = 0.5f * gate[i] * (1.f + std::erf(gate[i] * 0.70710678f)) * (up == nullptr ? 1.f : up[i]);
      return;
    case arch::Act::relu2:
      for (int i = 0; i < n; ++i) {
        const float positive = gate[i] > 0.f ? gate[i] : 0.f;
        out[i] = positive * positive;
      }
      for (int i = 0; i < n && up != nullptr; ++i) out[i] *= up[i];
  }
}

void Program::feed_forward(const FusedFeedForward& op, const FusedStep& step, int rows, float* y) {
  const int wide = op.gated ? 2 * op.hidden : op.hidden;
  float* hidden = hidden_.get(int64_t(rows) * wide);
  cpu::eager_map(op.up, rows, [&](int row, float* to) { input_row(step, row, to); }, exact(), hidden, wide);
  cpu::eager_map(
      op.down, rows,
      [&](int row, float* to) {
        const float* from = hidden + int64_t(row) * wide;
        act_row(op.act, from, op.gated ? from + op.hidden : nullptr, to, op.hidden);
      },
      exact(), y, width);
}

void Program::write_logits(const std::vector<Sequence>& sequences, const Chunk& chunk, mx::array& logits, int& next_row) {
  std::vector<int> rows;  // of the chunk
  int at = 0;
  for (const auto& piece : chunk.pieces) {
    const auto& s = sequences[piece.sequence];
    for (int l = std::max(0, s.tokens - s.wanted_rows - piece.first); l < piece.count; ++l) rows.push_back(at + l);
    at += piece.count;
  }
  constexpr int rows_at_once = 32;  // logits are wide
  const auto storage = cpu::storage_of(dtype);
  const int64_t item = static_cast<int64_t>(mx::size_of(dtype));
  for (std::size_t first = 0; first < rows.size(); first += rows_at_once) {
    const int count = static_cast<int>(std::min<std::size_t>(rows_at_once, rows.size() - first));
    float* out = logits_.get(int64_t(count) * vocab);
    cpu::eager_map(
        head, count, [&](int row, float* to) { final_norm(x_ + int64_t(rows[first + row]) * width, width, to); }, exact(), out, vocab);
    constexpr int columns = 8192;
    const int blocks = (vocab + columns - 1) / columns;
    cpu::in_parallel(count * blocks, [&](int task) {
      const int row = task / blocks, from = task % blocks * columns, n = std::min(columns, vocab - from);
      float* l = out + int64_t(row) * vocab + from;
      for (int i = 0; i < n && logit_scale != 1.f; ++i) l[i] *= logit_scale;
      for (int i = 0; i < n && logit_softcap > 0.f; ++i) l[i] = std::tanh(l[i] / logit_softcap) * logit_softcap;
      cpu::isa().store(l, storage, logits.data<uint8_t>() + (int64_t(next_row + row) * vocab + from) * item, n);
    });
    next_row += count;
  }
}

}  // namespace mlxlm::model::fused
