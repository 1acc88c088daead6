// Tiles of query rows over blocks and spans of keys.
#include "kernels/cpu/attention_tiles.h"

#include <algorithm>
#include <cmath>

namespace mlxlm::kernels::cpu {

static int padded(int count, int to) {
  return (count + to - 1) / to * to;
}

void RowState::reset(int rows, int dims) {
  rows = padded(rows, most_lane_rows);
  out = buffer.get(int64_t(rows) * dims + 2 * rows);
  peaks = out + int64_t(rows) * dims;
  totals = peaks + rows;
  std::fill(out, peaks, 0.f);
  std::fill(peaks, totals, -INFINITY);
  std::fill(totals, totals + rows, 0.f);
}

TileWorkspace& tile_workspace() {
  thread_local TileWorkspace w;
  return w;
}

BlockTile::BlockTile(int first_row, int end_row, int rows_per_token, int visible, int window)
    : first_row_(first_row), rows_(end_row - first_row) {
  for (int r = 0; r < rows_; ++r) {
    last_[r] = visible + (first_row + r) / rows_per_token;
    first_[r] = window > 0 ? std::max(0, last_[r] - window) : 0;
  }
  from_ = first_[0];
  to_ = last_[rows_ - 1];
}

void BlockTile::set_dims(int key_dims, int value_dims) {
  key_dims_ = padded(key_dims, 16);
  value_dims_ = padded(value_dims, 16);
}

void BlockTile::load_queries(TileWorkspace& w) const {
  float* q = w.q.get(int64_t(rows_) * key_dims_);
  load_queries(q);
  if (in_lanes()) isa().queries_to_lanes(q, rows_, key_dims_, w.q_lanes.get(int64_t(padded(rows_, most_lane_rows)) * key_dims_));
}

void BlockTile::run() const {
  auto& w = tile_workspace();
  load_queries(w);
  w.total.reset(rows_, value_dims_);
  for (int span = first_span(); span < end_span(); ++span) {
    run_span(w, span, w.span);
    add(w.span, w.total);
  }
  store_rows(w.total);
}

void BlockTile::run(int span, RowState& result) const {
  auto& w = tile_workspace();
  load_queries(w);
  run_span(w, span, result);
}

void BlockTile::merge(const std::unique_ptr<RowState>* spans) const {
  auto& total = tile_workspace().total;
  total.reset(rows_, value_dims_);
  for (int i = 0; i < this->spans(); ++i) add(*spans[i], total);
  store_rows(total);
}

void BlockTile::run_span(TileWorkspace& w, int span, RowState& result) const {
  result.reset(rows_, value_dims_);
  const int end = std::min(to_, (span + 1) * span_keys);
  for (int at = std::max(from_ / attention_block * attention_block, span * span_keys); at < end; at += attention_block)
    run_block(w, at, std::min(attention_block, end - at), result);
}

void BlockTile::run_block(TileWorkspace& w, int at, int count, RowState& state) const {
  int first[most_rows], last[most_rows];
  for (int r = 0; r < padded(rows_, most_lane_rows); ++r) {
    const int row = std::min(r, rows_ - 1);  // of rows that are not there nobody asks
    first[r] = std::clamp(first_[row] - at, 0, count);
    last[r] = std::clamp(last_[row] - at, 0, count);
  }
  BlockAttention b{};
  load_block(w, at, count, b);
  b.q = w.q.get(0);
  if (in_lanes()) b.q_lanes = w.q_lanes.get(0);
  b.rows = rows_;
  b.keys = count;
  b.key_dims = key_dims_;
  b.value_dims = value_dims_;
  b.first = first;
  b.last = last;
  b.out = state.out;
  b.peaks = state.peaks;
  b.totals = state.totals;
  b.scores = w.scores.get(attention_block * most_lane_rows);
  isa().attention_block(b);
}

void BlockTile::add(const RowState& from, RowState& to) const {
  for (int r = 0; r < rows_; ++r) {
    const int64_t at = int64_t(r) * value_dims_;
    isa().merge_rows(to.peaks + r, to.totals + r, to.out + at, from.peaks[r], from.totals[r], from.out + at, value_dims_);
  }
}

void TileTasks::add(const BlockTile& tile, Task task, bool may_be_cut) {
  if (!may_be_cut || tile.spans() < 2) return tasks_.push_back(task);
  for (int i = 0; i < tile.spans(); ++i) {
    task.span = tile.first_span() + i;
    task.state = used_states_++;
    tasks_.push_back(task);
  }
}

const std::unique_ptr<RowState>* TileTasks::kept_states(int count) {
  static std::vector<std::unique_ptr<RowState>> states;
  while (static_cast<int>(states.size()) < count) states.push_back(std::make_unique<RowState>());
  return states.data();
}

}  // namespace mlxlm::kernels::cpu
