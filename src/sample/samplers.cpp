// Filters over log-probabilities and the sampler that chains them. Reference: mlx_lm/sample_utils.py 0.32.2
#include <cmath>
#include <limits>
#include <random>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/random.h>

#include "base/error.h"
#include "kernels/cpu/kernels.h"
#include "sample/sample.h"

namespace mlxlm::sample {

namespace {

mx::array minus_infinity(mx::Dtype dtype) {
  return mx::array(-std::numeric_limits<float>::infinity(), dtype);
}

/** Elements [begin, end) of the last axis. */
mx::array last_axis(const mx::array& a, int begin, int end) {
  mx::Shape start(a.ndim(), 0), stop = a.shape();
  start.back() = begin;
  stop.back() = end;
  return mx::slice(a, start, stop);
}

void check_real(const char* name, float value, float low, float high) {
  if (value >= low && value <= high) return;  // false for NaN
  if (std::isinf(high)) throw Error(Code::bad_request, name, fmt::format("got {}, wanted a finite number of at least {}", value, low));
  throw Error(Code::bad_request, name, fmt::format("got {}, wanted a number in [{}, {}]", value, low, high));
}

mx::array initial_key(const std::optional<uint64_t>& seed) {
  if (seed) return mx::random::key(*seed);
  std::random_device device;
  return mx::random::key((static_cast<uint64_t>(device()) << 32) | device());
}

}  // namespace

void check(const SamplerOptions& o, int vocab) {
  check_real("temperature", o.temperature, 0.f, std::numeric_limits<float>::max());
  check_real("top_p", o.top_p, 0.f, 1.f);
  check_real("min_p", o.min_p, 0.f, 1.f);
  check_real("xtc_probability", o.xtc_probability, 0.f, 1.f);
  check_real("xtc_threshold", o.xtc_threshold, 0.f, 0.5f);
  if (o.min_tokens_to_keep < 1) {
    throw Error(Code::bad_request, "min_tokens_to_keep", fmt::format("got {}, wanted at least 1", o.min_tokens_to_keep));
  }
  if (o.top_k < 0) throw Error(Code::bad_request, "top_k", fmt::format("got {}, wanted 0 (off) or more", o.top_k));
  if (vocab <= 0) return;
  if (o.top_k >= vocab) {
    throw Error(Code::bad_request, "top_k", fmt::format("got {}, wanted less than the vocabulary of {} tokens", o.top_k, vocab));
  }
  if (o.min_tokens_to_keep > vocab) {
    throw Error(Code::bad_request, "min_tokens_to_keep",
                fmt::format("got {}, wanted at most the vocabulary of {} tokens", o.min_tokens_to_keep, vocab));
  }
  for (int token : o.xtc_special_tokens) {
    if (token < 0 || token >= vocab) {
      throw Error(Code::bad_request, "xtc_special_tokens", fmt::format("got token {}, wanted 0 to {}", token, vocab - 1));
    }
  }
}

mx::array apply_top_p(const mx::array& logprobs, float top_p) {
  const auto sorted_logprobs = mx::sort(logprobs, -1);
  const auto sorted_probs = mx::exp(mx::astype(sorted_logprobs, mx::float32));
  const auto mass_above = mx::cumsum(sorted_probs, -1, /*reverse=*/true, /*inclusive=*/false);
  const auto total_mass = last_axis(mass_above, 0, 1) + last_axis(sorted_probs, 0, 1);
  const auto dropped = mx::sum(mx::greater_equal(mass_above, mx::array(top_p) * total_mass), -1, /*keepdims=*/true);
  const auto threshold = mx::take_along_axis(sorted_logprobs, dropped, -1);
  return mx::where(mx::less(logprobs, threshold), minus_infinity(logprobs.dtype()), logprobs);
}

mx::array apply_min_p(const mx::array& logprobs, float min_p, int min_tokens_to_keep) {
  const auto least = mx::max(logprobs, -1, true) + mx::array(static_cast<float>(std::log(static_cast<double>(min_p))), logprobs.dtype());
  auto remove = mx::less(logprobs, least);
  if (min_tokens_to_keep > 1) {
    const int vocab = logprobs.shape(-1);
    const auto order = mx::argpartition(logprobs, -min_tokens_to_keep, -1);
    remove = mx::put_along_axis(remove, last_axis(order, vocab - min_tokens_to_keep, vocab), mx::array(false), -1);
  }
  return mx::where(remove, minus_infinity(logprobs.dtype()), logprobs);
}

mx::array apply_top_k(const mx::array& logprobs, int top_k) {
  const int vocab = logprobs.shape(-1);
  if (top_k <= 0 || top_k >= vocab) {
    throw Error(Code::bad_request, "top_k", fmt::format("got {}, wanted 1 to {}", top_k, vocab - 1));
  }
  const auto order = mx::argpartition(mx::negative(logprobs), top_k - 1, -1);
  return mx::put_along_axis(logprobs, last_axis(order, top_k, vocab), minus_infinity(logprobs.dtype()), -1);
}

mx::array apply_xtc(const mx::array& logprobs, float threshold, const std::vector<int>& special_tokens) {
  const auto probs = mx::softmax(logprobs, -1);
  const auto infinity = mx::array(std::numeric_limits<float>::infinity(), probs.dtype());
  const auto candidates = mx::where(mx::greater(probs, mx::array(threshold, probs.dtype())), probs, infinity);
  auto mask = mx::greater(probs, mx::min(candidates, -1, true));
  if (!special_tokens.empty()) {
    const int count = static_cast<int>(special_tokens.size());
    mx::Shape shape = logprobs.shape();
    shape.back() = count;
    mx::Shape one(logprobs.ndim(), 1);
    one.back() = count;
    const auto ids = mx::broadcast_to(mx::array(special_tokens.data(), one, mx::int32), shape);
    mask = mx::put_along_axis(mask, ids, mx::array(false), -1);
  }
  return mx::where(mask, minus_infinity(logprobs.dtype()), logprobs);
}

Sampler::Sampler(SamplerOptions options) : options_(std::move(options)), key_(initial_key(options_.seed)) {
  check(options_);
}

/** The order of splits is that of the reference's global state, so that a seed draws the same numbers. */
mx::array Sampler::next_key() {
  auto [state, key] = mx::random::split(key_);
  key_ = state;
  return key;
}

/** Scores [B, V] at the temperature, -inf where a filter took the token. */
mx::array Sampler::filtered(const mx::array& logprobs) {
  mx::array x = logprobs;
  if (options_.top_p > 0.f && options_.top_p < 1.f) x = apply_top_p(x, options_.top_p);
  if (options_.min_p != 0.f) x = apply_min_p(x, options_.min_p, options_.min_tokens_to_keep);
  if (options_.xtc_probability > 0.f) {
    const auto draws = mx::random::uniform(mx::array(0.f), mx::array(1.f), {x.shape(0), 1}, mx::float32, next_key());
    const auto without = apply_xtc(x, options_.xtc_threshold, options_.xtc_special_tokens);
    x = mx::where(mx::greater(draws, mx::array(options_.xtc_probability)), x, without);
  }
  if (options_.top_k > 0) x = apply_top_k(x, options_.top_k);
  return x * mx::array(static_cast<float>(1.0 / static_cast<double>(options_.temperature)), x.dtype());
}

/** Whether kernels::cpu::draw does all that is asked for. */
bool Sampler::has_kernel(const mx::array& logprobs) const {
  return kernels::cpu::active() && logprobs.ndim() == 2 && logprobs.dtype() == mx::float32 && options_.xtc_probability == 0.f &&
         (options_.min_p == 0.f || options_.min_tokens_to_keep == 1);
}

mx::array log_probabilities(const mx::array& logits) {
  if (kernels::cpu::active() && logits.ndim() == 2) return kernels::cpu::log_softmax(logits);
  const auto x = mx::astype(logits, mx::float32);
  return x - mx::logsumexp(x, -1, true);
}

mx::array likeliest(const mx::array& logits) {
  if (kernels::cpu::active() && logits.ndim() == 2) return kernels::cpu::argmax(logits);
  return mx::astype(mx::argmax(logits, -1), mx::int32);
}

mx::array Sampler::operator()(const mx::array& logprobs) {
  if (greedy()) return likeliest(logprobs);
  if (has_kernel(logprobs)) {
    return kernels::cpu::draw(
        logprobs, next_key(),
        {.temperature = options_.temperature, .top_p = options_.top_p, .min_p = options_.min_p, .top_k = options_.top_k});
  }
  const auto scores = filtered(logprobs);
  return mx::astype(mx::random::categorical(scores, -1, next_key()), mx::int32);
}

}  // namespace mlxlm::sample
