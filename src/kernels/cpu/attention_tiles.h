// Attention by blocks of keys, over any kind of cache. Blocks are merged into spans and spans into rows, always in the same order: what a
// row gets does not depend on which threads worked on it, nor on what runs beside it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/cpu/eager.h"
#include "kernels/cpu/isa.h"

namespace mlxlm::kernels::cpu {

/** What rows have seen so far. */
struct RowState {
  FloatBuffer buffer;
  float *out = nullptr, *peaks = nullptr, *totals = nullptr;
  void reset(int rows, int dims);
};

/** A thread's own memory. */
struct TileWorkspace {
  FloatBuffer q, q_lanes, k, v, scores;
  RowState span, total;
};
TileWorkspace& tile_workspace();

/** Query rows, in order of their tokens, that are worked on together. What keys and values look like is the derived class's. */
class BlockTile {
 public:
  static constexpr int few_rows = 32, most_rows = 96, span_keys = 512;  // 8 blocks

  int rows() const { return rows_; }
  int spans() const { return end_span() - first_span(); }
  int first_span() const { return from_ / span_keys; }
  int end_span() const { return (to_ + span_keys - 1) / span_keys; }

  /** All spans, one after the other, to the output. */
  void run() const;
  /** One span. */
  void run(int span, RowState& result) const;
  /** The same as run() out of the results of all spans. */
  void merge(const std::unique_ptr<RowState>* spans) const;

 protected:
  /** Rows [first_row, end_row), at most most_rows. Row r is of token r / rows_per_token; the first token sees `visible` keys, of those only
   * the last `window` if > 0. */
  BlockTile(int first_row, int end_row, int rows_per_token, int visible, int window);
  BlockTile(const BlockTile&) = default;
  ~BlockTile() = default;
  /** In floats; the kernels want whole vectors. */
  void set_dims(int key_dims, int value_dims);

  /** Queries, scaled: rows() rows of key_dims_, zeros behind what they have. */
  virtual void load_queries(float* q) const = 0;
  /** Sets storage, k, v and softcap for keys [at, at + count), which lie in one block. */
  virtual void load_block(TileWorkspace& w, int at, int count, BlockAttention& block) const = 0;
  /** A row is its `out` over its total. */
  virtual void store_rows(const RowState& state) const = 0;

  /** Many rows are worked on in lanes; keys and values are floats then. */
  bool in_lanes() const { return rows_ >= 16 && key_dims_ <= 256; }

  int first_row_, rows_, key_dims_ = 0, value_dims_ = 0;

 private:
  void load_queries(TileWorkspace& w) const;
  void run_span(TileWorkspace& w, int span, RowState& result) const;
  void run_block(TileWorkspace& w, int at, int count, RowState& state) const;
  void add(const RowState& from, RowState& to) const;

  int from_, to_;
  int first_[most_rows], last_[most_rows];
};

/** The work of one call: tiles, and spans of those tiles whose context is cut so that more threads have a part of it. */
class TileTasks {
 public:
  struct Task {
    int sequence, kv_head, first_row;
    int span = -1;   // -1 = all spans
    int state = -1;  // where the result of one span goes
  };
  void add(const BlockTile& tile, Task task, bool may_be_cut);

  /** tile_of(task) makes a tile anew. `alone`: in this thread. */
  template <class TileOf>
  void run(const TileOf& tile_of, bool alone) const {
    const auto* states = kept_states(used_states_);
    const auto run_one = [&](int i) {
      const auto tile = tile_of(tasks_[i]);
      if (tasks_[i].span < 0) return tile.run();
      tile.run(tasks_[i].span, *states[tasks_[i].state]);
    };
    const int count = static_cast<int>(tasks_.size());
    if (alone) {
      for (int i = 0; i < count; ++i) run_one(i);
    } else {
      // Last first: with a causal mask they are the longest.
      compute_pool().parallel_for_in_order(count, [&](int i, int) { run_one(count - 1 - i); });
    }
    for (int i = 0; i < count;) {
      if (tasks_[i].span < 0) {
        ++i;
        continue;
      }
      const auto tile = tile_of(tasks_[i]);
      tile.merge(states + tasks_[i].state);
      i += tile.spans();
    }
  }

 private:
  static const std::unique_ptr<RowState>* kept_states(int count);
  std::vector<Task> tasks_;
  int used_states_ = 0;
};

}  // namespace mlxlm::kernels::cpu
