// Filters, samplers and penalties against vectors of mlx_lm/sample_utils.py 0.32.2.
#include <cmath>
#include <limits>

#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "sample/sample.h"

namespace {

using namespace mlxlm::sample;
using Ids = std::vector<int>;

mx::array logprobs() {
  return mx::log(mx::array({0.05f, 0.3f, 0.1f, 0.05f, 0.25f, 0.1f, 0.15f, 0.0f}, {1, 8}) + mx::array(1e-9f));
}

Ids kept(mx::array a) {
  mx::eval(a);
  Ids ids;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a.data<float>()[i] > -1e30f) ids.push_back(static_cast<int>(i));
  }
  return ids;
}

std::vector<float> values(mx::array a) {
  a = mx::contiguous(a);
  mx::eval(a);
  return {a.data<float>(), a.data<float>() + a.size()};
}

Ids draws(SamplerOptions options) {
  options.seed = 7;
  Sampler sampler(options);
  Ids ids;
  for (int i = 0; i < 16; ++i) ids.push_back(sampler(logprobs()).item<int>());
  return ids;
}

TEST(TopP, KeepsTies) {
  EXPECT_EQ(kept(apply_top_p(logprobs(), 0.3f)), (Ids{1}));
  EXPECT_EQ(kept(apply_top_p(logprobs(), 0.5f)), (Ids{1, 4}));
  EXPECT_EQ(kept(apply_top_p(logprobs(), 0.8f)), (Ids{1, 2, 4, 5, 6}));
  EXPECT_EQ(kept(apply_top_p(logprobs(), 0.95f)), (Ids{0, 1, 2, 3, 4, 5, 6}));
}

TEST(MinP, ScalesByTheBest) {
  EXPECT_EQ(kept(apply_min_p(logprobs(), 0.5f, 1)), (Ids{1, 4, 6}));
  EXPECT_EQ(kept(apply_min_p(logprobs(), 0.1f, 1)), (Ids{0, 1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(kept(apply_min_p(logprobs(), 0.9f, 1)), (Ids{1}));
  EXPECT_EQ(kept(apply_min_p(logprobs(), 0.9f, 3)), (Ids{1, 4, 6}));
}

TEST(TopK, KeepsK) {
  EXPECT_EQ(kept(apply_top_k(logprobs(), 1)), (Ids{1}));
  EXPECT_EQ(kept(apply_top_k(logprobs(), 3)), (Ids{1, 4, 6}));
  EXPECT_THROW(apply_top_k(logprobs(), 8), mlxlm::Error);
}

TEST(Xtc, RemovesAllButTheLeastLikelyCandidate) {
  EXPECT_EQ(kept(apply_xtc(logprobs(), 0.1f, {})), (Ids{0, 2, 3, 5, 7}));
  EXPECT_EQ(kept(apply_xtc(logprobs(), 0.2f, {})), (Ids{0, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(kept(apply_xtc(logprobs(), 0.5f, {})), (Ids{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(kept(apply_xtc(logprobs(), 0.1f, {1})), (Ids{0, 1, 2, 3, 5, 7}));
  EXPECT_EQ(kept(apply_xtc(logprobs(), 0.1f, {1, 4})), (Ids{0, 1, 2, 3, 4, 5, 7}));
}

TEST(Sampler, DrawsWhatTheReferenceDrawsFromASeed) {
  EXPECT_EQ(draws({.temperature = 0.f, .top_p = 0.5f}), Ids(16, 1));
  EXPECT_EQ(draws({.temperature = 1.f}), (Ids{1, 6, 1, 1, 2, 1, 4, 2, 1, 2, 5, 4, 6, 1, 2, 1}));
  EXPECT_EQ(draws({.temperature = 0.7f, .top_p = 0.8f}), (Ids{1, 6, 1, 1, 2, 1, 4, 2, 1, 1, 5, 4, 6, 1, 2, 1}));
  EXPECT_EQ(draws({.temperature = 1.3f, .min_p = 0.2f}), (Ids{1, 6, 1, 1, 2, 1, 4, 2, 1, 2, 5, 5, 6, 2, 4, 1}));
  EXPECT_EQ(draws({.temperature = 1.f, .xtc_probability = 0.5f}), (Ids{5, 2, 0, 2, 2, 4, 1, 2, 2, 1, 4, 0, 5, 5, 3, 2}));
  EXPECT_EQ(draws({.temperature = 1.f, .top_k = 3}), (Ids{1, 6, 1, 1, 1, 1, 4, 1, 1, 1, 4, 4, 6, 1, 4, 1}));
  EXPECT_EQ(draws({.temperature = 0.9f, .top_p = 0.95f, .min_p = 0.05f, .top_k = 4, .xtc_probability = 0.3f}),
            (Ids{5, 2, 1, 2, 2, 4, 1, 1, 2, 1, 4, 1, 5, 6, 3, 2}));
}

TEST(Sampler, WithoutASeedTwoSamplersDiffer) {
  Sampler a({.temperature = 1.f}), b({.temperature = 1.f});
  int equal = 0;
  for (int i = 0; i < 64; ++i) equal += a(logprobs()).item<int>() == b(logprobs()).item<int>();
  EXPECT_LT(equal, 64);
}

TEST(Sampler, RefusesValuesOutOfRange) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(check(SamplerOptions{.temperature = -1.f}), mlxlm::Error);
  EXPECT_THROW(check(SamplerOptions{.temperature = nan}), mlxlm::Error);
  EXPECT_THROW(check(SamplerOptions{.temperature = std::numeric_limits<float>::infinity()}), mlxlm::Error);
  EXPECT_THROW(check(SamplerOptions{.top_p = 1.5f}), mlxlm::Error);
  EXPECT_THROW(check(SamplerOptions{.min_p = nan}), mlxlm::Error);
  EXPECT_THROW(check(SamplerOptions{.min_tokens_to_keep = 0}), mlxlm::Error);
  EXPECT_THROW(check(SamplerOptions{.top_k = -1}), mlxlm::Error);
  EXPECT_THROW(check(SamplerOptions{.top_k = 8}, 8), mlxlm::Error);
  EXPECT_NO_THROW(check(SamplerOptions{.top_k = 7}, 8));
  EXPECT_THROW(check(SamplerOptions{.xtc_threshold = 0.6f}), mlxlm::Error);
  EXPECT_THROW(check(ProcessorOptions{.logit_bias = {{8, 1.f}}}, 8), mlxlm::Error);
  EXPECT_THROW(check(ProcessorOptions{.logit_bias = {{-1, 1.f}}}), mlxlm::Error);
  EXPECT_THROW(check(ProcessorOptions{.repetition_penalty = -1.f}), mlxlm::Error);
  EXPECT_THROW(check(ProcessorOptions{.presence_penalty = nan}), mlxlm::Error);
}

TEST(Processors, MatchTheReference) {
  const auto logits = mx::array({1.f, -2.f, 3.f, -4.f, 0.5f, 0.25f}, {1, 6});
  const Ids tokens{0, 1, 1, 2, 3, 1};
  using V = std::vector<float>;
  EXPECT_EQ(values(process(logits, tokens, {.repetition_penalty = 2.f})), (V{0.5f, -4.f, 1.5f, -8.f, 0.5f, 0.25f}));
  EXPECT_EQ(values(process(logits, tokens, {.repetition_penalty = 2.f, .repetition_context_size = 2})),
            (V{1.f, -4.f, 3.f, -8.f, 0.5f, 0.25f}));
  EXPECT_EQ(values(process(logits, tokens, {.presence_penalty = 0.5f, .presence_context_size = 3})),
            (V{1.f, -2.5f, 2.5f, -4.5f, 0.5f, 0.25f}));
  EXPECT_EQ(values(process(logits, tokens, {.frequency_penalty = 0.5f})), (V{0.5f, -3.5f, 2.5f, -4.5f, 0.5f, 0.25f}));
  const ProcessorOptions all{.logit_bias = {{4, 1.5f}, {0, -10.f}},
                             .repetition_penalty = 1.5f,
                             .presence_penalty = 0.25f,
                             .frequency_penalty = 0.5f,
                             .frequency_context_size = 0};
  EXPECT_EQ(values(process(logits, tokens, all)), (V{-14.25f, -4.75f, 1.25f, -6.75f, 2.f, 0.25f}));
  EXPECT_EQ(values(process(logits, {}, {.repetition_penalty = 2.f})), values(logits));
}

}  // namespace
