// Attention over the caches of sequences: keys and values of each kv head, as they are stored or quantized.
#include <algorithm>

#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/block.h"
#include "kernels/cpu/eager.h"

namespace mlxlm::kernels::cpu {
namespace {

/** Rows (token, head of the group) of a kv head. */
class Tile final : public BlockTile {
 public:
  Tile(const EagerAttention& s, const AttentionShape& shape, int kv_head, int first_row, int rows)
      : BlockTile(first_row, std::min(shape.heads / shape.kv_heads * s.tokens, first_row + rows), shape.heads / shape.kv_heads, s.visible,
                  s.window),
        s_(s),
        shape_(shape),
        kv_head_(kv_head),
        group_(shape.heads / shape.kv_heads) {
    set_dims(shape.key_dims, shape.value_dims);
  }

 private:
  void load_queries(float* q) const override {
    for (int r = 0; r < rows_; ++r, q += key_dims_) {
      const float* from = s_.q + token_of(r) * s_.q_stride + int64_t(head_of(r)) * shape_.key_dims;
      for (int i = 0; i < shape_.key_dims; ++i) q[i] = from[i] * shape_.scale;
      std::fill(q + shape_.key_dims, q + key_dims_, 0.f);
    }
  }

  void load_block(TileWorkspace& w, int at, int count, BlockAttention& b) const override {
    // Four rows use a key once: it is converted on the way. More of them share a conversion.
    const bool quantized = s_.quantized_keys != nullptr;
    const bool as_stored =
        !quantized && (rows_ <= 4 || shape_.storage == Storage::f32) && key_dims_ == shape_.key_dims && value_dims_ == shape_.value_dims;
    b.storage = as_stored ? shape_.storage : Storage::f32;
    b.softcap = shape_.softcap;
    const Place place = place_of(at);
    if (as_stored) {
      b.k = stored_rows(place, place.keys, key_dims_);
      b.v = stored_rows(place, place.values, value_dims_);
    } else if (quantized) {
      b.k = load_quantized(w.k, *s_.quantized_keys, key_dims_, at, count);
      b.v = load_quantized(w.v, *s_.quantized_values, value_dims_, at, count);
    } else {
      b.k = load_rows(w.k, stored_rows(place, place.keys, shape_.key_dims), shape_.key_dims, key_dims_, count);
      b.v = load_rows(w.v, stored_rows(place, place.values, shape_.value_dims), shape_.value_dims, value_dims_, count);
    }
  }

  void store_rows(const RowState& state) const override {
    for (int r = 0; r < rows_; ++r) {
      float* to = s_.out + token_of(r) * s_.out_stride + int64_t(head_of(r)) * shape_.value_dims;
      const float inverse = 1.f / state.totals[r];
      for (int i = 0; i < shape_.value_dims; ++i) to[i] = state.out[int64_t(r) * value_dims_ + i] * inverse;
    }
  }

  int token_of(int r) const { return (first_row_ + r) / group_; }
  int head_of(int r) const { return kv_head_ * group_ + (first_row_ + r) % group_; }

  /** Where a block lies: in one of the shared parts, or after them in the sequence's own. */
  struct Place {
    const void *keys, *values;
    int64_t capacity;
    int row;
  };
  Place place_of(int at) const {
    for (const auto& part : s_.shared) {
      if (at < part.rows) return {part.keys, part.values, part.capacity, at};
      at -= part.rows;
    }
    return {s_.keys, s_.values, s_.capacity, at};
  }

  const uint8_t* stored_rows(const Place& place, const void* base, int dims) const {
    const int64_t item = shape_.storage == Storage::f32 ? 4 : 2;
    return static_cast<const uint8_t*>(base) + (int64_t(kv_head_) * place.capacity + place.row) * dims * item;
  }

  /** `count` rows of a head as floats, padded with zeros to whole vectors. */
  const float* load_rows(FloatBuffer& buffer, const uint8_t* from, int dims, int width, int count) const {
    const int64_t item = shape_.storage == Storage::f32 ? 4 : 2;
    float* to = buffer.get(int64_t(attention_block) * width);
    if (dims == width) {
      isa().load(from, shape_.storage, to, int64_t(count) * dims);
      return to;
    }
    for (int j = 0; j < count; ++j) {
      isa().load(from + j * dims * item, shape_.storage, to + int64_t(j) * width, dims);
      std::fill(to + int64_t(j) * width + dims, to + int64_t(j + 1) * width, 0.f);
    }
    return to;
  }

  /** Quantized dims are multiples of 32. */
  const float* load_quantized(FloatBuffer& buffer, QuantizedSpan span, int width, int at, int count) const {
    float* to = buffer.get(int64_t(attention_block) * width);
    const int64_t row = int64_t(kv_head_) * s_.capacity + at, item = span.storage == Storage::f32 ? 4 : 2;
    span.packed += row * span.packed_stride;
    span.scales = static_cast<const uint8_t*>(span.scales) + row * span.scale_stride * item;
    span.biases = static_cast<const uint8_t*>(span.biases) + row * span.scale_stride * item;
    isa().dequantize(span, count, to, width);
    std::fill(to + int64_t(count) * width, to + int64_t((count + 15) / 16 * 16) * width, 0.f);
    return to;
  }

  const EagerAttention& s_;
  const AttentionShape& shape_;
  int kv_head_, group_;
};

}  // namespace

void eager_attention(const std::vector<EagerAttention>& sequences, const AttentionShape& shape) {
  TileTasks tasks;
  int64_t work = 0, tiles = 0;
  const int group = shape.heads / shape.kv_heads;
  for (const auto& s : sequences) {
    work += int64_t(s.tokens) * s.visible;
    tiles += int64_t(group) * s.tokens * shape.kv_heads / BlockTile::most_rows;
  }
  // A large tile converts keys and values for more rows; smaller ones keep more threads busy.
  const int rows = tiles >= 4 * compute_pool().threads() ? BlockTile::most_rows : BlockTile::few_rows;
  for (int i = 0; i < static_cast<int>(sequences.size()); ++i) {
    const auto& s = sequences[i];
    // One tile a head does not keep all threads busy: long contexts are cut.
    const bool may_be_cut = group * s.tokens <= BlockTile::few_rows;
    for (int row = 0; row < group * s.tokens; row += rows) {
      for (int h = 0; h < shape.kv_heads; ++h) tasks.add(Tile(s, shape, h, row, rows), {i, h, row}, may_be_cut);
    }
  }
  // A small step is over before another thread has taken it up.
  tasks.run([&](const auto& t) { return Tile(sequences[t.sequence], shape, t.kv_head, t.first_row, rows); }, work * shape.heads < 400);
}

void eager_embedding(const PackedMatrix& table, int64_t n, float* out) {
  expand_row(table, std::clamp<int64_t>(n, 0, table.rows - 1), out);
}

}  // namespace mlxlm::kernels::cpu
