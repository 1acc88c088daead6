// Latent attention: keys that all heads share, whose first part is the value.
#include "kernels/cpu/latent_attention.h"

#include <algorithm>

#include "kernels/cpu/attention_tiles.h"

namespace mlxlm::kernels::cpu {
namespace {

/** Rows (token, head) of a sequence. */
class Tile final : public BlockTile {
 public:
  Tile(const LatentAttention& s, const LatentShape& shape, int first_row)
      : BlockTile(first_row, std::min(shape.heads * s.tokens, first_row + few_rows), shape.heads, s.visible, s.window),
        s_(s),
        shape_(shape) {
    set_dims(shape.latent_dims + shape.more_dims, shape.latent_dims);
  }

 private:
  void load_queries(float* q) const override {
    const int dims = shape_.latent_dims + shape_.more_dims;
    const float* from = s_.q + int64_t(first_row_) * dims;
    for (int r = 0; r < rows_; ++r, q += key_dims_, from += dims) {
      for (int i = 0; i < dims; ++i) q[i] = from[i] * shape_.scale;
      std::fill(q + dims, q + key_dims_, 0.f);
    }
  }

  void load_block(TileWorkspace& w, int at, int count, BlockAttention& block) const override {
    const int64_t item = shape_.storage == Storage::f32 ? 4 : 2, latent = shape_.latent_dims, more = shape_.more_dims;
    const void *latents = s_.latent, *mores = s_.more;
    for (const auto& part : s_.shared) {  // a block lies in one part
      if (at < part.rows) {
        latents = part.latent;
        mores = part.more;
        break;
      }
      at -= part.rows;
    }
    float *k = w.k.get(int64_t(attention_block) * key_dims_), *v = w.v.get(int64_t(attention_block) * value_dims_);
    block.storage = Storage::f32;
    block.k = k;
    block.v = v;
    for (int64_t j = 0; j < count; ++j, k += key_dims_, v += value_dims_) {
      isa().load(static_cast<const uint8_t*>(latents) + (at + j) * latent * item, shape_.storage, v, latent);
      std::fill(v + latent, v + value_dims_, 0.f);
      std::copy_n(v, latent, k);
      isa().load(static_cast<const uint8_t*>(mores) + (at + j) * more * item, shape_.storage, k + latent, more);
      std::fill(k + latent + more, k + key_dims_, 0.f);
    }
  }

  void store_rows(const RowState& state) const override {
    for (int r = 0; r < rows_; ++r) {
      float* to = s_.out + int64_t(first_row_ + r) * shape_.latent_dims;
      const float inverse = 1.f / state.totals[r];
      for (int i = 0; i < shape_.latent_dims; ++i) to[i] = state.out[int64_t(r) * value_dims_ + i] * inverse;
    }
  }

  const LatentAttention& s_;
  const LatentShape& shape_;
};

}  // namespace

void eager_latent_attention(const std::vector<LatentAttention>& sequences, const LatentShape& shape) {
  TileTasks tasks;
  for (int i = 0; i < static_cast<int>(sequences.size()); ++i) {
    const int rows = shape.heads * sequences[i].tokens;
    // A long prompt has tiles enough; a single token has one or two, whose contexts are cut.
    const bool may_be_cut = rows <= 4 * BlockTile::few_rows;
    for (int row = 0; row < rows; row += BlockTile::few_rows) tasks.add(Tile(sequences[i], shape, row), {i, 0, row}, may_be_cut);
  }
  tasks.run([&](const auto& t) { return Tile(sequences[t.sequence], shape, t.first_row); }, false);
}

}  // namespace mlxlm::kernels::cpu
