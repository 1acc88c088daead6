// Latent attention in the fused executor, absorbed: each token gets the same bits alone and in any chunk. Reference:
// mlx_lm/models/deepseek_v3.py
#include "kernels/cpu/latent_attention.h"
#include "model/fused_program.h"

namespace mlxlm::model::fused {

/** Rotation of a token's queries and key; its latent and key go to the cache. */
void Program::finish_latent(const FusedLatent& op, const Sequence& s, int position, int row, float* q, float* kv) {
  op.kv_norm(kv, op.latent, kv);
  if (op.memory.rotation >= 0) {
    const auto& r = rotations[op.memory.rotation];
    const int pairs = static_cast<int>(r.frequencies.size());
    const float *cosines = cosines_[op.memory.rotation].data() + int64_t(row) * pairs,
                *sines = sines_[op.memory.rotation].data() + int64_t(row) * pairs;
    for (int h = 0; h < op.heads; ++h) {
      cpu::isa().rope(q + h * (op.nope + op.rope) + op.nope, 1, op.rope, cosines, sines, pairs, r.rope.traditional, r.rope.input_scale);
    }
    cpu::isa().rope(kv + op.latent, 1, op.rope, cosines, sines, pairs, r.rope.traditional, r.rope.input_scale);
  }
  const auto& plan = s.memories[op.memory.cache]->plan;
  const auto storage = cpu::storage_of(plan.keys.dtype());
  const auto item = static_cast<int64_t>(mx::size_of(plan.keys.dtype()));
  const int64_t at = plan.write_at + position;
  cpu::isa().store(kv, storage, const_cast<uint8_t*>(plan.keys.data<uint8_t>()) + at * op.latent * item, op.latent);
  cpu::isa().store(kv + op.latent, storage, const_cast<uint8_t*>(plan.values.data<uint8_t>()) + at * op.rope * item, op.rope);
}

void Program::latent_attention(const FusedLatent& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk,
                               float* y) {
  const int rows = chunk.tokens, q_head = op.nope + op.rope, q_wide = op.heads * q_head, kv_wide = op.latent + op.rope;
  float *input = spare_[0].get(int64_t(rows) * width), *q = spare_[1].get(int64_t(rows) * q_wide),
        *kv = spare_[2].get(int64_t(rows) * kv_wide);
  for_rows(rows, width, [&](int row) { input_row(step, row, input + int64_t(row) * width); });
  const cpu::RowSource from_input = [&](int row, float* to) { std::memcpy(to, input + int64_t(row) * width, width * sizeof(float)); };
  if (op.q_norm) {
    const int dims = op.q_a.out_dims;
    float* low = spare_[3].get(int64_t(rows) * dims);
    cpu::eager_map(op.q_a, rows, from_input, exact(), low, dims);
    cpu::eager_map(op.q, rows, [&](int row, float* to) { (*op.q_norm)(low + int64_t(row) * dims, dims, to); }, exact(), q, q_wide);
  } else {
    cpu::eager_map(op.q, rows, from_input, exact(), q, q_wide);
  }
  cpu::eager_map(op.kv_a, rows, from_input, exact(), kv, kv_wide);
  std::vector<const Piece*> piece_of;
  std::vector<int> position;
  for (const auto& piece : chunk.pieces) {
    piece_of.insert(piece_of.end(), piece.count, &piece);
    for (int l = 0; l < piece.count; ++l) position.push_back(piece.first + l);
  }
  for_rows(rows, q_wide, [&](int row) {
    finish_latent(op, sequences[piece_of[row]->sequence], position[row], row, q + int64_t(row) * q_wide, kv + int64_t(row) * kv_wide);
  });
  attend_in_latent(op, sequences, chunk, q);
  const float* mixed = mixed_.get(0);
  std::vector<int> heads(int64_t(rows) * op.heads);
  for (std::size_t i = 0; i < heads.size(); ++i) heads[i] = static_cast<int>(i % op.heads);
  float* values = spare_[3].get(int64_t(rows) * op.heads * op.value);
  cpu::eager_gather(
      op.unembed_out, rows, op.heads, heads.data(), true,
      [&](int row, float* to) { std::memcpy(to, mixed + int64_t(row) * op.latent, op.latent * sizeof(float)); }, exact(), values, op.value);
  const int out_wide = op.heads * op.value;
  cpu::eager_map(
      op.o, rows, [&](int row, float* to) { std::memcpy(to, values + int64_t(row) * out_wide, out_wide * sizeof(float)); }, exact(), y,
      width);
}

/** q [rows][heads][nope + rope], rotated -> mixed_ [rows][heads][latent]. */
void Program::attend_in_latent(const FusedLatent& op, const std::vector<Sequence>& sequences, const Chunk& chunk, const float* q) {
  const int rows = chunk.tokens, q_head = op.nope + op.rope, wide = op.latent + op.rope, all = rows * op.heads;
  float *absorbed = qkv_.get(int64_t(all) * wide), *mixed = mixed_.get(int64_t(all) * op.latent);
  std::vector<int> heads(all);
  for (int i = 0; i < all; ++i) heads[i] = i % op.heads;
  cpu::eager_gather(
      op.embed_q, rows, op.heads, heads.data(), true,
      [&](int row, float* to) { std::memcpy(to, q + int64_t(row) * q_head, op.nope * sizeof(float)); }, exact(), absorbed, wide);
  for_rows(all, wide, [&](int row) {
    std::memcpy(absorbed + int64_t(row) * wide + op.latent, q + int64_t(row) * q_head + op.nope, op.rope * sizeof(float));
  });
  std::vector<cpu::LatentAttention> parts;
  int64_t at = 0;
  for (const auto& piece : chunk.pieces) {
    const auto& memory = *sequences[piece.sequence].memories[op.memory.cache];
    const int tokens = sequences[piece.sequence].tokens;
    parts.push_back({absorbed + at * op.heads * wide,
                     mixed + at * op.heads * op.latent,
                     piece.count,
                     memory.plan.keys.data<void>(),
                     memory.plan.values.data<void>(),
                     memory.plan.visible_rows - tokens + piece.first + 1,
                     memory.window,
                     {}});
    for (const auto& shared : memory.plan.shared)
      parts.back().shared.push_back({shared->keys.data<void>(), shared->values.data<void>(), shared->rows});
    at += piece.count;
  }
  const auto storage = cpu::storage_of(sequences[chunk.pieces[0].sequence].memories[op.memory.cache]->plan.keys.dtype());
  cpu::eager_latent_attention(parts, {op.heads, op.latent, op.rope, op.scale, storage});
}

}  // namespace mlxlm::model::fused
