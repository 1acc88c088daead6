// Latent attention by blocks of keys, merged into spans and spans into rows in a fixed order (as eager_attention.cpp): what a row gets does
// not depend on threads or on what runs beside it.
#include "kernels/cpu/latent_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "kernels/cpu/eager.h"

namespace mlxlm::kernels::cpu {
namespace {

constexpr int span_keys = 512;
constexpr int tile_rows = 32;

int padded(int dims) {
  return (dims + 15) / 16 * 16;
}

/** What rows have seen so far. */
struct State {
  FloatBuffer buffer;
  float *out = nullptr, *peaks = nullptr, *totals = nullptr;
  void reset(int rows, int dims) {
    out = buffer.get(int64_t(rows) * dims + 2 * rows);
    peaks = out + int64_t(rows) * dims;
    totals = peaks + rows;
    std::fill(peaks, peaks + rows, -INFINITY);
    std::fill(totals, totals + rows, 0.f);
  }
};

/** Thread's own memory. */
struct Workspace {
  FloatBuffer q, k, v, scores, spare;
  State block, span, total;
};

Workspace& workspace() {
  thread_local Workspace w;
  return w;
}

/** Rows (token, head) of a sequence that are worked on together. */
class Tile {
 public:
  Tile(const LatentAttention& s, const LatentShape& shape, int first_row)
      : s_(s), shape_(shape), first_row_(first_row), rows_(std::min(tile_rows, shape.heads * s.tokens - first_row)) {
    key_dims_ = padded(shape.latent_dims + shape.more_dims);
    value_dims_ = padded(shape.latent_dims);
    for (int r = 0; r < rows_; ++r) {
      last_[r] = s.visible + (first_row + r) / shape.heads;
      first_[r] = s.window > 0 ? std::max(0, last_[r] - s.window) : 0;
    }
    from_ = first_[0];
    to_ = last_[rows_ - 1];
  }
  int rows() const { return rows_; }
  int value_dims() const { return value_dims_; }
  int first_span() const { return from_ / span_keys; }
  int end_span() const { return (to_ + span_keys - 1) / span_keys; }

  void load_queries(Workspace& w) const {
    const int dims = shape_.latent_dims + shape_.more_dims;
    float* q = w.q.get(int64_t(rows_) * key_dims_);
    const float* from = s_.q + int64_t(first_row_) * dims;
    for (int r = 0; r < rows_; ++r, q += key_dims_, from += dims) {
      for (int i = 0; i < dims; ++i) q[i] = from[i] * shape_.scale;
      std::fill(q + dims, q + key_dims_, 0.f);
    }
  }
  void run_span(Workspace& w, int span, State& result) const {
    result.reset(rows_, value_dims_);
    const int end = std::min(to_, (span + 1) * span_keys);
    for (int at = std::max(from_ / attention_block * attention_block, span * span_keys); at < end; at += attention_block) {
      run_block(w, at, std::min(attention_block, end - at));
      merge(w.block, result);
    }
  }
  void merge(const State& from, State& to) const {
    for (int r = 0; r < rows_; ++r) {
      const int64_t at = int64_t(r) * value_dims_;
      isa().merge_rows(to.peaks + r, to.totals + r, to.out + at, from.peaks[r], from.totals[r], from.out + at, value_dims_);
    }
  }
  void finish(const State& state) const {
    for (int r = 0; r < rows_; ++r) {
      float* to = s_.out + int64_t(first_row_ + r) * shape_.latent_dims;
      const float inverse = 1.f / state.totals[r];
      for (int i = 0; i < shape_.latent_dims; ++i) to[i] = state.out[int64_t(r) * value_dims_ + i] * inverse;
    }
  }

 private:
  void load_keys(Workspace& w, int at, int count) const {
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
    for (int64_t j = 0; j < count; ++j, k += key_dims_, v += value_dims_) {
      isa().load(static_cast<const uint8_t*>(latents) + (at + j) * latent * item, shape_.storage, v, latent);
      std::fill(v + latent, v + value_dims_, 0.f);
      std::copy_n(v, latent, k);
      isa().load(static_cast<const uint8_t*>(mores) + (at + j) * more * item, shape_.storage, k + latent, more);
      std::fill(k + latent + more, k + key_dims_, 0.f);
    }
  }

  void run_block(Workspace& w, int at, int count) const {
    int first[tile_rows], last[tile_rows];
    for (int r = 0; r < rows_; ++r) {
      first[r] = std::clamp(first_[r] - at, 0, count);
      last[r] = std::clamp(last_[r] - at, 0, count);
    }
    load_keys(w, at, count);
    w.block.reset(rows_, value_dims_);
    BlockAttention b{};
    b.q = w.q.get(0);
    b.k = w.k.get(0);
    b.v = w.v.get(0);
    b.storage = Storage::f32;
    b.rows = rows_;
    b.keys = count;
    b.key_dims = key_dims_;
    b.value_dims = value_dims_;
    b.first = first;
    b.last = last;
    b.out = w.block.out;
    b.peaks = w.block.peaks;
    b.totals = w.block.totals;
    b.scores = w.scores.get(4 * attention_block);
    b.spare = w.spare.get(value_dims_);
    isa().attention_block(b);
  }

  const LatentAttention& s_;
  const LatentShape& shape_;
  int first_row_, rows_, key_dims_ = 0, value_dims_ = 0, from_ = 0, to_ = 0;
  int first_[tile_rows], last_[tile_rows];
};

struct Task {
  int sequence, first_row;
  int span = -1;   // -1 = all spans, one after the other
  int state = -1;  // where the result of one span goes
};

}  // namespace

void eager_latent_attention(const std::vector<LatentAttention>& sequences, const LatentShape& shape) {
  static std::vector<std::unique_ptr<State>> states;
  std::vector<Task> tasks;
  int used = 0;
  for (int i = 0; i < static_cast<int>(sequences.size()); ++i) {
    const int rows = shape.heads * sequences[i].tokens;
    for (int row = 0; row < rows; row += tile_rows) {
      const Tile tile(sequences[i], shape, row);
      // A long prompt has tiles enough; a single token has one or two, whose contexts are cut.
      if (rows > 4 * tile_rows || tile.end_span() - tile.first_span() < 2) {
        tasks.push_back({i, row});
        continue;
      }
      for (int span = tile.first_span(); span < tile.end_span(); ++span) tasks.push_back({i, row, span, used++});
    }
  }
  while (static_cast<int>(states.size()) < used) states.push_back(std::make_unique<State>());
  const int count = static_cast<int>(tasks.size());
  // Last first: with a causal mask they are the longest.
  in_parallel(count, [&](int index) {
    const auto& t = tasks[count - 1 - index];
    const Tile tile(sequences[t.sequence], shape, t.first_row);
    auto& w = workspace();
    tile.load_queries(w);
    if (t.span >= 0) return tile.run_span(w, t.span, *states[t.state]);
    w.total.reset(tile.rows(), tile.value_dims());
    for (int span = tile.first_span(); span < tile.end_span(); ++span) {
      tile.run_span(w, span, w.span);
      tile.merge(w.span, w.total);
    }
    tile.finish(w.total);
  });
  for (int i = 0; i < count;) {
    if (tasks[i].span < 0) {
      ++i;
      continue;
    }
    const Tile tile(sequences[tasks[i].sequence], shape, tasks[i].first_row);
    auto& total = workspace().total;
    total.reset(tile.rows(), tile.value_dims());
    for (int span = tile.first_span(); span < tile.end_span(); ++span, ++i) tile.merge(*states[tasks[i].state], total);
    tile.finish(total);
  }
}

}  // namespace mlxlm::kernels::cpu
