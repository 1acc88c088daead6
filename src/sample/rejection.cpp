// Drafts judged, by drawing or by rejection sampling: whatever they were, the tokens that come out are distributed as the model's own.
#include <mlx/ops.h>
#include <mlx/random.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "sample/sample.h"

namespace mlxlm::sample {

namespace {

mx::array row(const mx::array& a, int i) {
  return mx::slice(a, {i, 0}, {i + 1, a.shape(1)});
}

/** Element ids[i] of row i, as floats on this side. */
std::vector<float> picked(const mx::array& rows, const std::vector<int>& ids) {
  const int count = static_cast<int>(ids.size());
  const auto columns = mx::array(ids.data(), {count, 1}, mx::int32);
  auto values = mx::contiguous(mx::take_along_axis(mx::slice(rows, {0, 0}, {count, rows.shape(1)}), columns, -1));
  mx::eval(values);
  return {values.data<float>(), values.data<float>() + count};
}

Verdict judge_greedily(const mx::array& logprobs, const std::vector<int>& draft) {
  auto best = likeliest(logprobs);
  mx::eval(best);
  const int* tokens = best.data<int>();
  int accepted = 0;
  while (accepted < static_cast<int>(draft.size()) && tokens[accepted] == draft[accepted]) ++accepted;
  return {accepted, tokens[accepted]};
}

}  // namespace

mx::array Sampler::probabilities(const mx::array& logprobs) {
  if (!greedy()) return mx::softmax(mx::astype(filtered(logprobs), mx::float32), -1);
  const auto best = mx::expand_dims(mx::argmax(logprobs, -1), 1);
  return mx::put_along_axis(mx::zeros(logprobs.shape(), mx::float32), best, mx::array(1.f), -1);
}

mx::array Sampler::draw(const mx::array& weights) {
  return mx::astype(mx::random::categorical(mx::log(weights), -1, next_key()), mx::int32);
}

/** The tokens of operator(), one set of random numbers each, up to the first that the draft has not. */
Verdict Sampler::judge_by_drawing(const mx::array& logprobs, const std::vector<int>& draft) {
  const int count = static_cast<int>(draft.size());
  for (int i = 0;; ++i) {
    const int token = (*this)(row(logprobs, i)).item<int>();
    if (i == count || token != draft[i]) return {i, token};
  }
}

Verdict Sampler::judge(const mx::array& logprobs, const std::vector<int>& draft, const std::optional<mx::array>& draft_probabilities) {
  const int count = static_cast<int>(draft.size());
  if (logprobs.ndim() != 2 || logprobs.shape(0) != count + 1 ||
      (draft_probabilities && count > 0 && draft_probabilities->shape(0) != count)) {
    throw Error(Code::internal, "judge", "the rows do not fit the draft");
  }
  if (greedy()) return judge_greedily(logprobs, draft);
  if (count == 0 || !draft_probabilities) return judge_by_drawing(logprobs, draft);
  const auto wanted = probabilities(logprobs);
  const auto p = picked(wanted, draft), q = picked(*draft_probabilities, draft);
  auto coins = mx::random::uniform(mx::array(0.f), mx::array(1.f), {count}, mx::float32, next_key());
  mx::eval(coins);
  int accepted = 0;
  while (accepted < count && coins.data<float>()[accepted] * q[accepted] < p[accepted]) ++accepted;
  auto weights = row(wanted, accepted);
  if (accepted < count) {
    const auto left = mx::maximum(mx::subtract(weights, row(*draft_probabilities, accepted)), mx::array(0.f));
    // Nothing is left when both are the same but for rounding.
    if (mx::sum(left).item<float>() > 0.f) weights = left;
  }
  return {accepted, draw(weights).item<int>()};
}

}  // namespace mlxlm::sample
