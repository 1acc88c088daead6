// Which experts a token goes to. Reference: mlx_lm/models/deepseek_v3.py group_expert_select, qwen3_moe.py
#include <mlx/ops.h>

#include "nn/nn.h"

namespace mlxlm::nn {
namespace {

mx::array top_indices(const mx::array& scores, int k) {
  const int count = scores.shape(-1);
  const auto order = mx::argpartition(mx::negative(scores), k - 1, -1);
  return mx::slice(order, {0, 0}, {scores.shape(0), std::min(k, count)});
}

/** Sets the scores of all but the best groups to zero, as the reference does. A group counts by its two best. */
mx::array keep_groups(const mx::array& scores, int groups, int kept) {
  const int tokens = scores.shape(0), experts = scores.shape(1);
  const auto grouped = mx::reshape(scores, {tokens, groups, experts / groups});
  const auto strength = mx::sum(mx::topk(grouped, 2, -1), -1);  // [T, G]
  if (groups == kept) return scores;
  const int dropped = groups - kept;
  const auto worst = mx::slice(mx::argpartition(strength, dropped - 1, -1), {0, 0}, {tokens, dropped});
  const auto zeroed = mx::put_along_axis(grouped, mx::expand_dims(worst, -1), mx::array(0.f), 1);
  return mx::reshape(zeroed, {tokens, experts});
}

}  // namespace

std::vector<mx::array> route(const mx::array& logits, const arch::Moe& spec, const std::optional<mx::array>& correction_bias) {
  auto weights = mx::astype(logits, mx::float32);
  if (spec.route == arch::Route::softmax) weights = mx::softmax(weights, -1, true);
  if (spec.route == arch::Route::sigmoid) weights = mx::sigmoid(weights);
  auto scores = correction_bias ? mx::add(weights, *correction_bias) : weights;
  if (spec.groups > 1) scores = keep_groups(scores, spec.groups, spec.groups_kept);
  const auto indices = top_indices(scores, spec.top_k);
  auto chosen = mx::take_along_axis(weights, indices, -1);
  if (spec.route == arch::Route::softmax_after_topk) chosen = mx::softmax(chosen, -1, true);
  // The sigmoid routers of the reference leave a single expert's weight alone.
  if (spec.renormalize && (spec.top_k > 1 || spec.route != arch::Route::sigmoid)) {
    chosen = mx::divide(chosen, mx::add(mx::sum(chosen, -1, true), mx::array(spec.renormalize_eps)));
  }
  if (spec.scale != 1.f) chosen = mx::multiply(chosen, mx::array(spec.scale));
  return {indices, chosen};
}

}  // namespace mlxlm::nn
