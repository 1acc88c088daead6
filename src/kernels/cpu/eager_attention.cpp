// Attention over caches by blocks of keys. Blocks are merged into spans and spans into rows, always in the same order: what a row gets does
// not depend on which threads worked on it, nor on what runs beside it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/thread_pool.h"
#include "kernels/cpu/block.h"
#include "kernels/cpu/eager.h"

namespace mlxlm::kernels::cpu {
namespace {

constexpr int span_keys = 512;  // 8 blocks
constexpr int tile_rows = 32;

int padded(int dims) {
  return (dims + 15) / 16 * 16;
}

/** Rows of a head that are worked on together, and what they have seen so far. */
struct RowState {
  FloatBuffer buffer;
  float *out = nullptr, *peaks = nullptr, *totals = nullptr;
  void reset(int rows, int dims) {
    out = buffer.get(int64_t(rows) * dims + 2 * rows);
    peaks = out + int64_t(rows) * dims;
    totals = peaks + rows;
    std::fill(peaks, peaks + rows, -INFINITY);
    std::fill(totals, totals + rows, 0.f);  // `out` is written by the first block that a row sees
  }
};

/** Thread's own memory. */
struct Workspace {
  FloatBuffer q, k, v, scores, spare;
  RowState block, span, total;
};

Workspace& workspace() {
  thread_local Workspace w;
  return w;
}

class Tile {
 public:
  Tile(const EagerAttention& s, const AttentionShape& shape, int kv_head, int first_row)
      : s_(s), shape_(shape), kv_head_(kv_head), first_row_(first_row), group_(shape.heads / shape.kv_heads) {
    rows_ = std::min(tile_rows, group_ * s.tokens - first_row);
    key_dims_ = padded(shape.key_dims);
    value_dims_ = padded(shape.value_dims);
    for (int r = 0; r < rows_; ++r) {
      const int token = (first_row + r) / group_;
      last_[r] = s.visible + token;
      first_[r] = s.window > 0 ? std::max(0, last_[r] - s.window) : 0;
    }
    from_ = *std::min_element(first_, first_ + rows_);
    to_ = *std::max_element(last_, last_ + rows_);
  }

  int rows() const { return rows_; }
  int first_span() const { return from_ / span_keys; }
  int end_span() const { return (to_ + span_keys - 1) / span_keys; }
  int value_dims() const { return value_dims_; }

  void load_queries(Workspace& w) const {
    float* q = w.q.get(int64_t(rows_) * key_dims_);
    for (int r = 0; r < rows_; ++r, q += key_dims_) {
      const int row = first_row_ + r, head = kv_head_ * group_ + row % group_;
      const float* from = s_.q + (row / group_) * s_.q_stride + int64_t(head) * shape_.key_dims;
      for (int i = 0; i < shape_.key_dims; ++i) q[i] = from[i] * shape_.scale;
      std::fill(q + shape_.key_dims, q + key_dims_, 0.f);
    }
  }

  void run_span(Workspace& w, int span, RowState& result) const {
    result.reset(rows_, value_dims_);
    const int end = std::min(to_, (span + 1) * span_keys);
    for (int at = std::max(from_ / attention_block * attention_block, span * span_keys); at < end; at += attention_block) {
      run_block(w, at, std::min(attention_block, end - at));
      merge(w.block, result);
    }
  }

  void merge(const RowState& from, RowState& to) const {
    for (int r = 0; r < rows_; ++r) {
      isa().merge_rows(to.peaks + r, to.totals + r, to.out + int64_t(r) * value_dims_, from.peaks[r], from.totals[r],
                       from.out + int64_t(r) * value_dims_, value_dims_);
    }
  }

  void finish(const RowState& state) const {
    for (int r = 0; r < rows_; ++r) {
      const int row = first_row_ + r, head = kv_head_ * group_ + row % group_;
      float* to = s_.out + (row / group_) * s_.out_stride + int64_t(head) * shape_.value_dims;
      const float inverse = 1.f / state.totals[r];
      for (int i = 0; i < shape_.value_dims; ++i) to[i] = state.out[int64_t(r) * value_dims_ + i] * inverse;
    }
  }

 private:
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

  void run_block(Workspace& w, int at, int count) const {
    int first[tile_rows], last[tile_rows];
    for (int r = 0; r < rows_; ++r) {
      first[r] = std::clamp(first_[r] - at, 0, count);
      last[r] = std::clamp(last_[r] - at, 0, count);
    }
    w.block.reset(rows_, value_dims_);
    BlockAttention b{};
    b.q = w.q.get(0);
    // Four rows use a key once: it is converted on the way. More of them share a conversion.
    const bool quantized = s_.quantized_keys != nullptr;
    const bool as_stored =
        !quantized && (rows_ <= 4 || shape_.storage == Storage::f32) && key_dims_ == shape_.key_dims && value_dims_ == shape_.value_dims;
    b.storage = as_stored ? shape_.storage : Storage::f32;
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
    b.rows = rows_;
    b.keys = count;
    b.key_dims = key_dims_;
    b.value_dims = value_dims_;
    b.first = first;
    b.last = last;
    b.softcap = shape_.softcap;
    b.out = w.block.out;
    b.peaks = w.block.peaks;
    b.totals = w.block.totals;
    b.scores = w.scores.get(4 * attention_block);
    b.spare = w.spare.get(value_dims_);
    isa().attention_block(b);
  }

  const EagerAttention& s_;
  const AttentionShape& shape_;
  int kv_head_, first_row_, group_, rows_, key_dims_, value_dims_, from_, to_;
  int first_[tile_rows], last_[tile_rows];
};

struct Task {
  int sequence, kv_head, first_row;
  int span = -1;   // -1 = all spans, one after the other
  int state = -1;  // where the result of one span goes
};

void run_whole(const Tile& tile) {
  auto& w = workspace();
  tile.load_queries(w);
  w.total.reset(tile.rows(), tile.value_dims());
  for (int span = tile.first_span(); span < tile.end_span(); ++span) {
    tile.run_span(w, span, w.span);
    tile.merge(w.span, w.total);
  }
  tile.finish(w.total);
}

}  // namespace

void eager_attention(const std::vector<EagerAttention>& sequences, const AttentionShape& shape) {
  static std::vector<std::unique_ptr<RowState>> states;
  std::vector<Task> tasks;
  int used = 0;
  int64_t work = 0;
  const int group = shape.heads / shape.kv_heads;
  for (int i = 0; i < static_cast<int>(sequences.size()); ++i) {
    const auto& s = sequences[i];
    work += int64_t(s.tokens) * s.visible;
    for (int row = 0; row < group * s.tokens; row += tile_rows) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        const Tile tile(s, shape, h, row);
        const int spans = tile.end_span() - tile.first_span();
        // One tile a head does not keep all threads busy: long contexts are cut.
        if (spans < 2 || group * s.tokens > tile_rows) {
          tasks.push_back({i, h, row});
          continue;
        }
        for (int span = tile.first_span(); span < tile.end_span(); ++span) tasks.push_back({i, h, row, span, used++});
      }
    }
  }
  while (static_cast<int>(states.size()) < used) states.push_back(std::make_unique<RowState>());
  const auto run = [&](int index) {
    const auto& t = tasks[index];
    const Tile tile(sequences[t.sequence], shape, t.kv_head, t.first_row);
    if (t.span < 0) return run_whole(tile);
    auto& w = workspace();
    tile.load_queries(w);
    tile.run_span(w, t.span, *states[t.state]);
  };
  // A small step is over before another thread has taken it up.
  if (work * shape.heads < 400) {
    for (int i = 0; i < static_cast<int>(tasks.size()); ++i) run(i);
  } else {
    // Last first: with a causal mask they are the longest.
    in_parallel(static_cast<int>(tasks.size()), [&](int i) { run(static_cast<int>(tasks.size()) - 1 - i); });
  }
  for (std::size_t i = 0; i < tasks.size();) {
    if (tasks[i].span < 0) {
      ++i;
      continue;
    }
    const auto first = tasks[i];
    const Tile tile(sequences[first.sequence], shape, first.kv_head, first.first_row);
    auto& total = workspace().total;
    total.reset(tile.rows(), tile.value_dims());
    for (int span = tile.first_span(); span < tile.end_span(); ++span, ++i) tile.merge(*states[tasks[i].state], total);
    tile.finish(total);
  }
}

void eager_embedding(const PackedMatrix& table, int64_t n, float* out) {
  expand_row(table, std::clamp<int64_t>(n, 0, table.rows - 1), out);
}

}  // namespace mlxlm::kernels::cpu
