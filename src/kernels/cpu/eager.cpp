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

  void fill(int m, const PackedMatrix& w, bool exact, const float* x) {
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
    a_.digit_count = precision() == Precision::fast ? 1 : 2;
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

struct Scratch {
  FloatBuffer x;
  Form form;
};

Scratch& shared_scratch() {
  static Scratch scratch;
  return scratch;
}

/** x [m][k] by the source, and its form for `w`, row by row in parallel when it pays. */
void prepare(Scratch& s, int m, const PackedMatrix& w, bool exact, const RowSource* source) {
  float* x = s.x.get(int64_t(m) * w.k);
  s.form.fill(m, w, exact, x);
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
  constexpr int m_block = 64;
  const int panels = w.panel_count(), blocks = (m + m_block - 1) / m_block;
  // Few rows: a thread takes a long run of panels, which it reads as one stream.
  const int grain =
      m <= 16 ? std::max(1, panels / (compute_pool().threads() * 6)) : std::max(1, std::min(8, panels / (compute_pool().threads() * 4)));
  const int chunks = (panels + grain - 1) / grain;
  in_parallel(chunks * blocks, [&](int task) {
    const int chunk = task / blocks, m0 = task % blocks * m_block, count = std::min(m_block, m - m0);
    alignas(64) float c[m_block * 16];
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
    if (prepared == nullptr || !Form::same(*prepared, w)) prepare(s, m, w, exact, prepared == nullptr ? &source : nullptr);
    prepared = &w;
    multiply(w, s.form.view(), m, part.bias.empty() ? nullptr : part.bias.data(), out + first, ld_out);
    first += w.rows;
  }
}

void eager_gather(const EagerMap& map, int m, int top_k, const int* experts, bool per_choice, const RowSource& source, bool exact,
                  float* out, int64_t ld_out) {
  auto& s = shared_scratch();
  std::vector<int> order(m * top_k);
  for (int i = 0; i < m * top_k; ++i) order[i] = i;
  std::ranges::stable_sort(order, {}, [&](int i) { return experts[i]; });
  int first = 0;
  const PackedMatrix* prepared = nullptr;
  for (const auto& part : map.parts) {
    const auto& w = *part.matrix;
    if (prepared == nullptr || !Form::same(*prepared, w))
      prepare(s, per_choice ? m * top_k : m, w, exact, prepared == nullptr ? &source : nullptr);
    prepared = &w;
    const int panels = w.panel_count();
    in_parallel(panels, [&](int index) {
      alignas(64) float c[16];
      const int at = index * 16, width = std::min(16, w.rows - at);
      for (const int i : order) {
        multiply_block16(w, std::clamp(experts[i], 0, w.matrices - 1), index, s.form.view(), per_choice ? i : i / top_k, 1, c);
        std::memcpy(out + i * ld_out + first + at, c, width * sizeof(float));
      }
    });
    first += w.rows;
  }
}

}  // namespace mlxlm::kernels::cpu
