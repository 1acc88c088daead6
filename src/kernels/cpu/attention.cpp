// Softmax attention over a cache: four rows share a pass over the keys.
#include <algorithm>

#include <mlx/ops.h>

#include "base/thread_pool.h"
#include "kernels/cpu/kernel.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/rows.h"

namespace mlxlm::kernels::cpu {
namespace {

/** One batch entry and kv head; its query rows are all (head of the group, token) pairs, four at a time. */
class Runner {
 public:
  Runner(const std::vector<mx::array>& in, mx::array& out, const AttentionOptions& options)
      : q_(in[0]), k_(in[1]), v_(in[2]), out_(out), options_(options) {
    batch_ = q_.shape(0);
    heads_ = q_.shape(1);
    length_ = q_.shape(2);
    kv_heads_ = k_.shape(1);
    keys_ = k_.shape(2);
    group_ = heads_ / kv_heads_;
  }

  void run() {
    const int tiles = (group_ * length_ + 3) / 4;
    compute_pool().parallel_for(batch_ * kv_heads_ * tiles, [&](int task, int) {
      // Last tiles first: with a causal mask they are the longest.
      const int tile = tiles - 1 - task / (batch_ * kv_heads_), pair = task % (batch_ * kv_heads_);
      run_tile(pair / kv_heads_, pair % kv_heads_, tile);
    });
  }

 private:
  void run_tile(int b, int kv_head, int tile) {
    AttentionTile t{};
    t.e = q_.shape(3);
    t.f = v_.shape(3);
    t.rows = std::min(4, group_ * length_ - tile * 4);
    t.storage = storage_of(k_.dtype());
    t.softcap = options_.softcap;
    t.score_stride = keys_ + 16;
    t.scores = scratch(1, 4 * t.score_stride);
    float *q = scratch(2, 4 * t.e), *o = scratch(3, 4 * t.f);
    const auto item = static_cast<int64_t>(mx::size_of(k_.dtype()));
    t.k = k_.data<uint8_t>() + (b * k_.strides(0) + kv_head * k_.strides(1)) * item;
    t.v = v_.data<uint8_t>() + (b * v_.strides(0) + kv_head * v_.strides(1)) * item;
    t.k_stride = k_.strides(2);
    t.v_stride = v_.strides(2);
    const Rows queries(q_);
    for (int r = 0; r < t.rows; ++r) {
      const int row = tile * 4 + r, l = row / group_, h = kv_head * group_ + row % group_;
      t.q[r] = q + r * t.e;
      t.out[r] = o + r * t.f;
      queries.load((int64_t(b) * heads_ + h) * length_ + l, q + r * t.e);
      for (int i = 0; i < t.e; ++i) q[r * t.e + i] *= options_.scale;
      t.visible[r] = options_.causal ? keys_ - length_ + l + 1 : keys_;
      t.first[r] = options_.window > 0 ? std::max(0, t.visible[r] - options_.window) : 0;
    }
    isa().attention(t);
    for (int r = 0; r < t.rows; ++r) {
      const int row = tile * 4 + r, l = row / group_, h = kv_head * group_ + row % group_;
      store_row(out_, (int64_t(b) * length_ + l) * heads_ + h, t.f, o + r * t.f);
    }
  }

  const mx::array &q_, &k_, &v_;
  mx::array& out_;
  const AttentionOptions& options_;
  int batch_, heads_, length_, kv_heads_, keys_, group_;
};

/** The kernel reads keys and values with a contiguous last axis. Views of a cache have one; others are copied. */
mx::array with_plain_rows(const mx::array& a) {
  return a.strides(3) == 1 || a.shape(3) == 1 ? mx::array::unsafe_weak_copy(a) : copy_without_gaps(a);
}

mx::array with_dtype(const mx::array& a, mx::Dtype dtype) {
  return a.dtype() == dtype ? a : mx::astype(a, dtype);
}

}  // namespace

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options) {
  const bool axes = q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4;
  if (!axes || k.shape(0) != q.shape(0) || v.shape(0) != q.shape(0) || k.shape(3) != q.shape(3) || v.shape(1) != k.shape(1) ||
      v.shape(2) != k.shape(2) || k.shape(2) < q.shape(2) || k.shape(1) == 0 || q.shape(1) % k.shape(1) != 0) {
    throw Error(Code::internal, "attention", "shapes do not fit");
  }
  storage_of(q.dtype());
  storage_of(k.dtype());
  return make_kernel("Attention", {q.shape(0), q.shape(2), q.shape(1), v.shape(3)}, q.dtype(), {q, k, with_dtype(v, k.dtype())},
                     [options](const auto& in, auto& out) {
                       const std::vector<mx::array> plain{mx::array::unsafe_weak_copy(in[0]), with_plain_rows(in[1]),
                                                          with_plain_rows(in[2])};
                       Runner(plain, out[0], options).run();
                     });
}

}  // namespace mlxlm::kernels::cpu
