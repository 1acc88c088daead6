// Routed experts in the fused executor. Reference: mlx_lm/models/qwen3_moe.py, deepseek_v3.py, nemotron_h.py
#include <array>
#include <cmath>
#include <numeric>

#include "model/fused_program.h"

namespace mlxlm::model::fused {
namespace {

void softmax(float* x, int n) {
  const float peak = *std::max_element(x, x + n);
  float total = 0.f;
  for (int i = 0; i < n; ++i) total += x[i] = std::exp(x[i] - peak);
  for (int i = 0; i < n; ++i) x[i] /= total;
}

/** Positions of the k largest values, largest first; of equals the first. */
void top(const float* x, int n, int k, int* chosen) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int a, int b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
  std::copy_n(order.begin(), k, chosen);
}

/** Sets the scores of all but the best groups to zero, as the reference does. A group counts by its two best. */
void keep_groups(float* scores, const arch::Moe& spec) {
  const int width = spec.experts / spec.groups;
  std::vector<float> strength(spec.groups);
  for (int g = 0; g < spec.groups; ++g) {
    std::array<float, 2> best{-INFINITY, -INFINITY};
    for (int i = g * width; i < (g + 1) * width; ++i) {
      if (scores[i] > best[0])
        best = {scores[i], best[0]};
      else
        best[1] = std::max(best[1], scores[i]);
    }
    strength[g] = best[0] + best[1];
  }
  std::vector<int> order(spec.groups);
  top(strength.data(), spec.groups, spec.groups, order.data());
  for (int g = spec.groups_kept; g < spec.groups; ++g) std::fill_n(scores + order[g] * width, width, 0.f);
}

/** logits [experts], overwritten -> the experts of one token and what their outputs are multiplied by. */
void route(const arch::Moe& spec, const std::vector<float>& correction, float* logits, int* chosen, float* weights) {
  const int n = spec.experts, k = spec.top_k;
  if (spec.route == arch::Route::softmax) softmax(logits, n);
  if (spec.route == arch::Route::sigmoid) {
    for (int i = 0; i < n; ++i) logits[i] = sigmoid(logits[i]);
  }
  if (correction.empty() && spec.groups <= 1) {
    top(logits, n, k, chosen);
  } else {
    std::vector<float> scores(logits, logits + n);
    for (int i = 0; i < static_cast<int>(correction.size()); ++i) scores[i] += correction[i];
    if (spec.groups > 1) keep_groups(scores.data(), spec);
    top(scores.data(), n, k, chosen);
  }
  for (int j = 0; j < k; ++j) weights[j] = logits[chosen[j]];
  if (spec.route == arch::Route::softmax_after_topk) softmax(weights, k);
  // The sigmoid routers of the reference leave a single expert's weight alone.
  if (spec.renormalize && (k > 1 || spec.route != arch::Route::sigmoid)) {
    float total = spec.renormalize_eps;
    for (int j = 0; j < k; ++j) total += weights[j];
    for (int j = 0; j < k; ++j) weights[j] /= total;
  }
  for (int j = 0; j < k; ++j) weights[j] *= spec.scale;
}

}  // namespace

void Program::experts(const FusedExperts& op, const FusedStep& step, int rows, float* y) {
  const auto& spec = op.spec;
  const int k = spec.top_k, wide = op.up.out_dims, inner = spec.latent > 0 ? spec.latent : width;
  float* input = spare_[0].get(int64_t(rows) * width);
  for_rows(rows, width, [&](int row) { input_row(step, row, input + int64_t(row) * width); });
  const cpu::RowSource from_input = [&](int row, float* to) { std::memcpy(to, input + int64_t(row) * width, width * sizeof(float)); };

  float* logits = spare_[1].get(int64_t(rows) * spec.experts);
  cpu::eager_map(op.router, rows, from_input, exact(), logits, spec.experts);
  std::vector<int> chosen(int64_t(rows) * k);
  std::vector<float> weights(int64_t(rows) * k);
  for_rows(rows, spec.experts * 16, [&](int row) {
    route(spec, op.correction, logits + int64_t(row) * spec.experts, chosen.data() + int64_t(row) * k, weights.data() + int64_t(row) * k);
  });

  const float* latent = input;
  if (spec.latent > 0) {
    float* to = spare_[2].get(int64_t(rows) * inner);
    cpu::eager_map(op.into_latent, rows, from_input, exact(), to, inner);
    latent = to;
  }
  float *hidden = hidden_.get(int64_t(rows) * k * wide), *outputs = spare_[3].get(int64_t(rows) * k * inner);
  cpu::eager_gather(
      op.up, rows, k, chosen.data(), false,
      [&](int row, float* to) {
        const float *from = latent + int64_t(row) * inner, weight = spec.weigh_input ? weights[row] : 1.f;
        for (int i = 0; i < inner; ++i) to[i] = from[i] * weight;
      },
      exact(), hidden, wide);
  cpu::eager_gather(
      op.down, rows, k, chosen.data(), true,
      [&](int row, float* to) {
        const float* from = hidden + int64_t(row) * wide;
        act_row(spec.act, from, spec.gated ? from + spec.hidden : nullptr, to, spec.hidden);
      },
      exact(), outputs, inner);
  const auto combine = [&](int row, float* to) {
    std::fill_n(to, inner, 0.f);
    for (int j = 0; j < k; ++j) {
      const float weight = spec.weigh_input ? 1.f : weights[int64_t(row) * k + j];
      cpu::isa().add_scaled(to, outputs + (int64_t(row) * k + j) * inner, weight, inner);
    }
  };
  if (spec.latent > 0)
    cpu::eager_map(op.from_latent, rows, combine, exact(), y, width);
  else
    for_rows(rows, int64_t(k) * width, [&](int row) { combine(row, y + int64_t(row) * width); });
  if (spec.shared_hidden == 0) return;

  const int shared_wide = op.shared_up.out_dims, shared = spec.shared_hidden;
  hidden = hidden_.get(int64_t(rows) * shared_wide);
  cpu::eager_map(op.shared_up, rows, from_input, exact(), hidden, shared_wide);
  float* more = spare_[3].get(int64_t(rows) * width);
  cpu::eager_map(
      op.shared_down, rows,
      [&](int row, float* to) {
        const float* from = hidden + int64_t(row) * shared_wide;
        act_row(spec.act, from, spec.shared_gated ? from + shared : nullptr, to, shared);
      },
      exact(), more, width);
  if (spec.shared_gate.empty()) return cpu::isa().add_scaled(y, more, 1.f, int64_t(rows) * width);
  float* gates = spare_[1].get(rows);
  cpu::eager_map(op.shared_gate, rows, from_input, exact(), gates, 1);
  for (int64_t row = 0; row < rows; ++row) cpu::isa().add_scaled(y + row * width, more + row * width, sigmoid(gates[row]), width);
}

}  // namespace mlxlm::model::fused
