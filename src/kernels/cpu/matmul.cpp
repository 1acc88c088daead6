// Matrix products with packed weights. A row's result depends on that row alone: not on its batch, the chunking or the threads.
#include <algorithm>
#include <atomic>

#include <mlx/ops.h>

#include "base/thread_pool.h"
#include "kernels/cpu/block.h"
#include "kernels/cpu/kernel.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/panels.h"
#include "kernels/cpu/rows.h"

namespace mlxlm::kernels::cpu {
namespace {

/** Activations of `m` rows in the forms that panels need. Buffers live until the next call on this thread. */
struct Prepared {
  Activations a;
  std::vector<float> x, sums, steps, digit_sums;
  std::vector<int8_t> digits;

  /** x has m rows; `exact`: float32 arithmetic instead of digits. */
  void prepare(const Rows& rows, int m, const PackedMatrix& w, bool exact, bool output_layer = false) {
    const int k = w.k;
    x.resize(int64_t(m) * k + 64);
    a.k = k;
    a.x = x.data();
    a.digits = nullptr;
    const bool quantized = w.quantized();
    const bool use_digits = quantized && !exact && precision() != Precision::exact && isa().uses_digits && w.panels.takes_digits();
    if (quantized) {
      a.groups = k / w.panels.group;
      sums.resize(int64_t(m) * a.groups);
      if (use_digits) {
        a.digit_count = digits_of_activations(output_layer);
        digits.resize(a.digit_count * int64_t(m) * k);
        steps.resize(int64_t(m) * a.groups);
      }
    }
    compute_pool().parallel_for(chunks_for(m, 4), [&](int chunk, int) {
      const int chunks = chunks_for(m, 4);
      for (int64_t i = int64_t(m) * chunk / chunks; i < int64_t(m) * (chunk + 1) / chunks; ++i) {
        float* xi = x.data() + i * k;
        rows.load(i, xi);
        if (!quantized) continue;
        if (use_digits) {
          isa().make_digits(xi, k, w.panels.group, w.panels.digit_form(), a.digit_count, digits.data() + a.digit_count * i * k,
                            steps.data() + i * a.groups, sums.data() + i * a.groups);
        } else {
          isa().group_sums(xi, k, w.panels.group, sums.data() + i * a.groups);
        }
      }
    });
    a.sums = a.digit_sums = sums.data();
    if (use_digits) {
      a.digits = digits.data();
      a.steps = steps.data();
    }
  }
};

Prepared& prepared() {
  thread_local Prepared p;
  return p;
}

void add_bias_and_store(mx::array& out, int64_t row, int n_total, int first, int count, float* c, const float* bias) {
  if (bias != nullptr) {
    for (int i = 0; i < count; ++i) c[i] += bias[first + i];
  }
  const int64_t item = static_cast<int64_t>(mx::size_of(out.dtype()));
  isa().store(c, storage_of(out.dtype()), out.data<uint8_t>() + (row * n_total + first) * item, count);
}

void run_matmul(const std::vector<mx::array>& in, mx::array& out, const PackedMatrix& w, bool output_layer) {
  const Rows rows(in[0]);
  const int m = static_cast<int>(rows.count()), n = w.rows;
  if (m == 0) return;
  auto& p = prepared();
  p.prepare(rows, m, w, in[0].dtype() == mx::float32, output_layer);
  std::vector<float> bias;
  if (in.size() > 1) {
    bias.resize(n);
    Rows(in[1]).load(0, bias.data());
  }
  const int panels = w.panel_count(), blocks = (m + rows_at_once - 1) / rows_at_once;
  const int grain = m == 1 ? std::max(1, panels / (compute_pool().threads() * 8)) : 1;
  const int chunks = (panels + grain - 1) / grain;
  compute_pool().parallel_for(chunks * blocks, [&](int task, int) {
    const int chunk = task / blocks, m0 = task % blocks * rows_at_once, count = std::min(rows_at_once, m - m0);
    float* c = scratch(0, int64_t(rows_at_once) * 16);
    for (int index = chunk * grain; index < std::min(panels, (chunk + 1) * grain); ++index) {
      multiply_block16(w, 0, index, p.a, m0, count, c);
      const int first = index * 16, width = std::min(16, n - first);
      for (int i = 0; i < count; ++i) {
        add_bias_and_store(out, m0 + i, n, first, width, c + i * 16, bias.empty() ? nullptr : bias.data());
      }
    }
  });
}

struct Assignment {
  int expert, row, slot;  // x row, output row
};

std::vector<Assignment> assignments(const mx::array& indices, const PackedMatrix& w, bool per_expert_input) {
  std::vector<Assignment> list;
  const int per_token = indices.shape(-1);
  for (int64_t i = 0; i < static_cast<int64_t>(indices.size()); ++i) {
    int64_t at = 0, rest = i;
    for (int axis = static_cast<int>(indices.ndim()) - 1; axis >= 0; --axis) {
      at += rest % indices.shape(axis) * indices.strides(axis);
      rest /= indices.shape(axis);
    }
    const int64_t expert = indices.data<int32_t>()[at];
    list.push_back({static_cast<int>(std::clamp<int64_t>(expert, 0, w.matrices - 1)),
                    static_cast<int>(per_expert_input ? i : i / per_token), static_cast<int>(i)});
  }
  std::ranges::stable_sort(list, {}, &Assignment::expert);
  return list;
}

void run_gather(const std::vector<mx::array>& in, mx::array& out, const PackedMatrix& w, bool per_expert_input) {
  const Rows rows(in[0]);
  const int m = static_cast<int>(rows.count());
  if (m == 0) return;
  auto& p = prepared();
  p.prepare(rows, m, w, in[0].dtype() == mx::float32);
  const auto list = assignments(in[1], w, per_expert_input);
  const int panels = w.panel_count(), total = static_cast<int>(list.size());
  compute_pool().parallel_for(panels, [&](int index, int) {
    float* c = scratch(0, 16);
    for (int i = 0; i < total; ++i) {
      multiply_block16(w, list[i].expert, index, p.a, list[i].row, 1, c);
      const int first = index * 16;
      add_bias_and_store(out, list[i].slot, w.rows, first, std::min(16, w.rows - first), c, nullptr);
    }
  });
}

}  // namespace

void multiply_block16(const PackedMatrix& w, int matrix, int index, const Activations& a, int m0, int count, float* c) {
  if (w.quantized()) {
    isa().panel(w.panels, w.panel(matrix, index), a, m0, count, c, 16);
    return;
  }
  const int first = index * 16, last = std::min(first + 16, w.rows);
  for (int n = first; n < last;) {
    // Four rows at a time while they lie in one part.
    const auto* at = static_cast<const uint8_t*>(w.dense_row(matrix, n));
    const int64_t row_bytes = int64_t(w.k) * (w.storage == Storage::f32 ? 4 : 2);
    const bool four = n + 4 <= last && w.dense_row(matrix, n + 3) == at + 3 * row_bytes;
    isa().dense(at, w.storage, w.k, four ? 4 : 1, a.x + int64_t(m0) * w.k, count, w.k, c + (n - first), 16);
    n += four ? 4 : 1;
  }
}

void expand_row(const PackedMatrix& w, int64_t n, float* out) {
  if (!w.quantized()) {
    isa().load(w.dense_row(0, static_cast<int>(n)), w.storage, out, w.k);
    return;
  }
  expand_panel_row(w.panels, w.panel(0, static_cast<int>(n / 16)), static_cast<int>(n % 16), out);
}

mx::array matmul(const mx::array& x, const PackedMatrixPtr& w, const std::optional<mx::array>& bias, bool output_layer) {
  if (x.ndim() == 0 || x.shape(-1) != w->k) throw Error(Code::internal, "matmul", "x does not have the width of the weights");
  storage_of(x.dtype());  // throws here, not on the stream's thread
  auto shape = x.shape();
  shape.back() = w->rows;
  std::vector<mx::array> inputs{x};
  if (bias) {
    if (bias->shape() != mx::Shape{w->rows}) throw Error(Code::internal, "matmul", "the bias does not have one value a row of the weights");
    storage_of(bias->dtype());
    inputs.push_back(*bias);
  }
  return make_kernel("Matmul", std::move(shape), x.dtype(), std::move(inputs),
                     [w, output_layer](const auto& in, auto& out) { run_matmul(in, out[0], *w, output_layer); });
}

mx::array gather_matmul(const mx::array& x, const PackedMatrixPtr& w, const mx::array& indices, bool per_expert_input,
                        const std::optional<mx::array>& bias) {
  if (x.ndim() == 0 || x.shape(-1) != w->k) throw Error(Code::internal, "gather_matmul", "x does not have the width of the weights");
  if (bias) throw Error(Code::unsupported, "gather_matmul", "a bias of stacked experts");
  storage_of(x.dtype());
  auto shape = indices.shape();
  const auto rows = x.size() / w->k,
             wanted = per_expert_input || shape.empty() ? indices.size() : indices.size() / std::max(1, shape.back());
  if (rows != wanted) throw Error(Code::internal, "gather_matmul", "x and indices are of different tokens");
  shape.push_back(w->rows);
  return make_kernel("GatherMatmul", std::move(shape), x.dtype(), {x, mx::astype(indices, mx::int32)},
                     [w, per_expert_input](const auto& in, auto& out) { run_gather(in, out[0], *w, per_expert_input); });
}

mx::array take_rows(const PackedMatrixPtr& w, const mx::array& indices, mx::Dtype dtype) {
  storage_of(dtype);
  auto shape = indices.shape();
  shape.push_back(w->k);
  return make_kernel("TakeRows", std::move(shape), dtype, {mx::contiguous(mx::astype(indices, mx::int32))}, [w](const auto& in, auto& out) {
    float* row = scratch(0, w->k);
    for (int64_t i = 0; i < static_cast<int64_t>(in[0].size()); ++i) {
      const int64_t n = std::clamp<int64_t>(in[0].template data<int32_t>()[i], 0, w->rows - 1);
      expand_row(*w, n, row);
      store_row(out[0], i, w->k, row);
    }
  });
}

}  // namespace mlxlm::kernels::cpu
