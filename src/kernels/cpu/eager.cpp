// Linear maps over plain rows. A row's result depends on that row alone.
#include "kernels/cpu/eager.h"

#include <algorithm>
#include <cstring>

#include "base/thread_pool.h"
#include "kernels/cpu/block.h"
#include "kernels/cpu/rows.h"

namespace mlxlm::kernels::cpu {
namespace {

/** Activations of m rows in the form that one kind of matrix reads. */
class Form {
 public:
  static bool same(const PackedMatrix& a, const PackedMatrix& b) {
    if (a.quantized() != b.quantized()) return false;
    return !a.quantized() || (a.panels.digit_form() == b.panels.digit_form() && a.panels.takes_digits() == b.panels.takes_digits() &&
                              a.panels.group == b.panels.group);
  }

  void fill(int m, const PackedMatrix& w, bool exact, bool output_layer, const float* x) {
    const int k = w.k;
    a_ = {};
    a_.x = x;
    a_.k = k;
    if (!w.quantized()) return;
    const int group = w.panels.group, groups = k / group;
    const bool digits = !exact && precision() != Precision::exact && isa().uses_digits && w.panels.takes_digits();
    a_.groups = groups;
    float* sums = sums_.get(int64_t(m) * groups);
    float* steps = digits ? steps_.get(int64_t(m) * groups) : nullptr;
    a_.digit_count = digits_of_activations(output_layer);
    if (digits && static_cast<int64_t>(digits_.size()) < 2 * int64_t(m) * k) digits_.resize(2 * int64_t(m) * k + 64);
    a_.sums = a_.digit_sums = sums;
    a_.steps = steps;
    a_.digits = digits ? digits_.data() : nullptr;
    digit_form_ = w.panels.digit_form();
    group_ = group;
    quantized_ = true;
  }
  void row(int i) {
    if (a_.groups == 0) return;
    const float* x = a_.x + int64_t(i) * a_.k;
    auto* sums = const_cast<float*>(a_.sums) + int64_t(i) * a_.groups;
    if (a_.digits == nullptr) return isa().group_sums(x, a_.k, group_, sums);
    isa().make_digits(x, a_.k, group_, digit_form_, a_.digit_count, const_cast<int8_t*>(a_.digits) + a_.digit_count * int64_t(i) * a_.k,
                      const_cast<float*>(a_.steps) + int64_t(i) * a_.groups, sums);
  }
  const Activations& view() const { return a_; }

 private:
  Activations a_;
  FloatBuffer sums_, steps_;
  std::vector<int8_t> digits_;
  DigitForm digit_form_ = DigitForm::bytes;
  int group_ = 0;
  bool quantized_ = false;
};

/** Rows of activations in another order, some of them several times. */
class GatheredForm {
 public:
  /** Row i is row order[i] / top_k of `from`. */
  void gather(const Activations& from, const std::vector<int>& order, int top_k) {
    a_ = from;
    const int rows = static_cast<int>(order.size()), wide = from.digits == nullptr ? from.k : 0;
    const int64_t digits = from.digits == nullptr ? 0 : from.digit_count * int64_t(from.k), groups = from.groups;
    float *x = x_.get(int64_t(rows) * wide), *sums = sums_.get(rows * groups), *steps = steps_.get(rows * groups);
    if (static_cast<int64_t>(digits_.size()) < rows * digits) digits_.resize(rows * digits + 64);
    const int chunks = std::min(rows, compute_pool().threads() * 4);
    in_parallel(chunks, [&](int chunk) {
      for (int64_t i = int64_t(rows) * chunk / chunks; i < int64_t(rows) * (chunk + 1) / chunks; ++i) {
        const int64_t row = order[i] / top_k;
        if (wide > 0) std::memcpy(x + i * wide, from.x + row * wide, wide * sizeof(float));
        if (groups > 0) std::memcpy(sums + i * groups, from.sums + row * groups, groups * sizeof(float));
        if (digits == 0) continue;
        std::memcpy(digits_.data() + i * digits, from.digits + row * digits, digits);
        std::memcpy(steps + i * groups, from.steps + row * groups, groups * sizeof(float));
      }
    });
    if (wide > 0) a_.x = x;
    if (groups > 0) a_.sums = a_.digit_sums = sums;
    if (digits > 0) {
      a_.digits = digits_.data();
      a_.steps = steps;
    }
  }
  const Activations& view() const { return a_; }

 private:
  Activations a_;
  FloatBuffer x_, sums_, steps_;
  std::vector<int8_t> digits_;
};

struct Scratch {
  FloatBuffer x;
  Form form;
  GatheredForm gathered;
};

Scratch& shared_scratch() {
  static Scratch scratch;
  return scratch;
}

/** x [m][k] by the source, and its form for `w`, row by row in parallel when it pays. */
void prepare(Scratch& s, int m, const PackedMatrix& w, bool exact, const RowSource* source, bool output_layer = false) {
  float* x = s.x.get(int64_t(m) * w.k);
  s.form.fill(m, w, exact, output_layer, x);
  const int chunks = int64_t(m) * w.k < 8192 ? 1 : std::min(m, compute_pool().threads() * 4);
  in_parallel(chunks, [&](int chunk) {
    for (int i = int(int64_t(m) * chunk / chunks); i < int(int64_t(m) * (chunk + 1) / chunks); ++i) {
      if (source != nullptr) (*source)(i, x + int64_t(i) * w.k);
      s.form.row(i);
    }
  });
}

void store_block(const float* c, int count, int width, const float* bias, float* out, int64_t ld_out) {
  for (int i = 0; i < count; ++i, c += 16, out += ld_out) {
    if (bias == nullptr) {
      std::memcpy(out, c, width * sizeof(float));
    } else {
      for (int n = 0; n < width; ++n) out[n] = c[n] + bias[n];
    }
  }
}

void multiply(const PackedMatrix& w, const Activations& a, int m, const float* bias, float* out, int64_t ld_out) {
  const int panels = w.panel_count(), blocks = (m + rows_at_once - 1) / rows_at_once;
  // Few rows: a thread takes a long run of panels, which it reads as one stream.
  const int grain =
      m <= 16 ? std::max(1, panels / (compute_pool().threads() * 6)) : std::max(1, std::min(8, panels / (compute_pool().threads() * 4)));
  const int chunks = (panels + grain - 1) / grain;
  in_parallel(chunks * blocks, [&](int task) {
    const int chunk = task / blocks, m0 = task % blocks * rows_at_once, count = std::min(rows_at_once, m - m0);
    alignas(64) float c[rows_at_once * 16];
    for (int index = chunk * grain; index < std::min(panels, (chunk + 1) * grain); ++index) {
      const int first = index * 16, width = std::min(16, w.rows - first);
      if (w.quantized() && width == 16 && bias == nullptr) {
        isa().panel(w.panels, w.panel(0, index), a, m0, count, out + m0 * ld_out + first, ld_out);
        continue;
      }
      multiply_block16(w, 0, index, a, m0, count, c);
      store_block(c, count, width, bias == nullptr ? nullptr : bias + first, out + m0 * ld_out + first, ld_out);
    }
  });
}

std::vector<int> by_expert(const int* experts, int total) {
  std::vector<int> order(total);
  for (int i = 0; i < total; ++i) order[i] = i;
  std::ranges::stable_sort(order, {}, [&](int i) { return experts[i]; });
  return order;
}

/** Rows of `a` in order of their experts, each expert's weights read once for rows_at_once of them; results go to out[order[i]]. `one_row`:
 * all use row 0. */
void multiply_experts(const PackedMatrix& w, const Activations& a, const std::vector<int>& order, const int* experts, bool one_row,
                      float* out, int64_t ld_out) {
  struct Run {
    int expert, first, count;
  };
  std::vector<Run> runs;
  for (int i = 0; i < static_cast<int>(order.size()); ++i) {
    const int expert = std::clamp(experts[order[i]], 0, w.matrices - 1);
    const bool more = !one_row && !runs.empty() && runs.back().expert == expert && runs.back().count < rows_at_once;
    if (more)
      ++runs.back().count;
    else
      runs.push_back({expert, i, 1});
  }
  const int panels = w.panel_count(), threads = compute_pool().threads(), count = static_cast<int>(runs.size());
  const int pieces = std::clamp(threads * 6 / count, 1, panels),
            grain = std::max(1, std::min((panels + pieces - 1) / pieces, count > 1 && order.size() > 64 ? 8 : panels));
  const int chunks = (panels + grain - 1) / grain;
  in_parallel(chunks * count, [&](int task) {
    const auto& run = runs[task / chunks];
    const int from = task % chunks * grain;
    alignas(64) float c[rows_at_once * 16];
    for (int index = from; index < std::min(panels, from + grain); ++index) {
      multiply_block16(w, run.expert, index, a, one_row ? 0 : run.first, run.count, c);
      const int at = index * 16, width = std::min(16, w.rows - at);
      for (int i = 0; i < run.count; ++i) std::memcpy(out + order[run.first + i] * ld_out + at, c + i * 16, width * sizeof(float));
    }
  });
}

}  // namespace

void in_parallel(int chunks, const std::function<void(int)>& body) {
  if (chunks == 1) return body(0);
  compute_pool().parallel_for(chunks, [&](int chunk, int) { body(chunk); });
}

void eager_map(const EagerMap& map, int m, const RowSource& source, bool exact, float* out, int64_t ld_out) {
  auto& s = shared_scratch();
  int first = 0;
  const PackedMatrix* prepared = nullptr;
  for (const auto& part : map.parts) {
    const auto& w = *part.matrix;
    if (prepared == nullptr || !Form::same(*prepared, w))
      prepare(s, m, w, exact, prepared == nullptr ? &source : nullptr, map.output_layer);
    prepared = &w;
    multiply(w, s.form.view(), m, part.bias.empty() ? nullptr : part.bias.data(), out + first, ld_out);
    first += w.rows;
  }
}

void eager_gather(const EagerMap& map, int m, int top_k, const int* experts, bool per_choice, const RowSource& source, bool exact,
                  float* out, int64_t ld_out) {
  auto& s = shared_scratch();
  const int total = m * top_k;
  const auto order = by_expert(experts, total);
  // A single token's choices are all its own row; of several tokens, each expert's rows are brought together.
  const RowSource sorted = [&](int i, float* to) { source(order[i], to); };
  int first = 0;
  const PackedMatrix* prepared = nullptr;
  for (const auto& part : map.parts) {
    const auto& w = *part.matrix;
    if (prepared == nullptr || !Form::same(*prepared, w)) {
      if (per_choice) {
        prepare(s, total, w, exact, prepared == nullptr ? &sorted : nullptr);
      } else {
        prepare(s, m, w, exact, prepared == nullptr ? &source : nullptr);
        if (m > 1) s.gathered.gather(s.form.view(), order, top_k);
      }
    }
    prepared = &w;
    const auto& a = per_choice || m == 1 ? s.form.view() : s.gathered.view();
    multiply_experts(w, a, order, experts, !per_choice && m == 1, out + first, ld_out);
    first += w.rows;
  }
}

}  // namespace mlxlm::kernels::cpu
