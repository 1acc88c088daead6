// logits -> token. Reference: mlx_lm/sample_utils.py
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include <mlx/array.h>

namespace mlxlm::sample {

namespace mx = mlx::core;

struct SamplerOptions {
  float temperature = 0.f;  // 0 = argmax
  float top_p = 1.f;        // 0 or 1 = off
  float min_p = 0.f;
  int min_tokens_to_keep = 1;
  int top_k = 0;
  float xtc_probability = 0.f;
  float xtc_threshold = 0.1f;
  std::vector<int> xtc_special_tokens{};
  std::optional<uint64_t> seed{};
  bool rejects_drafts = false;  // with a seed, too: see Sampler::draws_ahead()
};

/** Throws Error(bad_request) naming the option, its value and its range. vocab 0 = not known yet. */
void check(const SamplerOptions& options, int vocab = 0);

/** What a model makes of a draft: the first `accepted` tokens of the draft stand, `token` comes after them. */
struct Verdict {
  int accepted = 0, token = 0;
};

/** logits [B, V] -> float32 [B, V]. In float32 whatever the logits are: the reference normalizes in their dtype, and float16 rounds what it
 * samples from. */
mx::array log_probabilities(const mx::array& logits);
/** [B, V] -> int32 [B]. */
mx::array likeliest(const mx::array& logits);

/** A sampler with a random state of its own. Thread: the one that owns MLX. */
class Sampler {
 public:
  explicit Sampler(SamplerOptions options);
  /** logprobs [B, V] -> tokens int32 [B]. Filters in the reference's order: top-p, min-p, XTC, top-k, then categorical at the temperature.
   */
  mx::array operator()(const mx::array& logprobs);

  /** logprobs [B, V] -> float32 [B, V], what operator() draws from: filtered, at the temperature, each row a sum of 1. */
  mx::array probabilities(const mx::array& logprobs);
  /** One draw a row, int32 [B], from weights [B, V] of any sum above 0. */
  mx::array draw(const mx::array& weights);
  /** Judges `draft`, k tokens, by the model's logprobs [k+1, V] after each of its prefixes, so that what comes out has the distribution of
   *  operator(). Without draft_probabilities it is what operator() would draw one by one, with the same random numbers: the draft stands as
   *  far as it is that. draft_probabilities [k, V]: what each was drawn from (as probabilities() gives it), with random numbers of its own;
   *  more of the draft stands then, but what comes out depends on it.
   *  Reference: Leviathan, Kalman, Matias 2023, "Fast inference from transformers via speculative decoding" (mlx_lm demands equality). */
  Verdict judge(const mx::array& logprobs, const std::vector<int>& draft,
                const std::optional<mx::array>& draft_probabilities = std::nullopt);
  bool greedy() const { return options_.temperature == 0.f; }
  /** Whether a draft model is to draw with copies of this sampler: with a seed, whose tokens are then the same whatever was drafted. */
  bool draws_ahead() const { return !greedy() && options_.seed.has_value() && !options_.rejects_drafts; }

 private:
  mx::array next_key();
  Verdict judge_by_drawing(const mx::array& logprobs, const std::vector<int>& draft);
  mx::array filtered(const mx::array& logprobs);
  bool has_kernel(const mx::array& logprobs) const;
  SamplerOptions options_;
  mx::array key_;
};

/** The filters, each logprobs [B, V] -> the same with -inf where masked. */
mx::array apply_top_p(const mx::array& logprobs, float top_p);
mx::array apply_min_p(const mx::array& logprobs, float min_p, int min_tokens_to_keep);
mx::array apply_top_k(const mx::array& logprobs, int top_k);
mx::array apply_xtc(const mx::array& logprobs, float threshold, const std::vector<int>& special_tokens);

struct ProcessorOptions {
  std::map<int, float> logit_bias{};
  float repetition_penalty = 0.f;  // 0 = off
  int repetition_context_size = 20;
  float presence_penalty = 0.f;
  int presence_context_size = 20;
  float frequency_penalty = 0.f;
  int frequency_context_size = 20;
  bool any() const { return !logit_bias.empty() || repetition_penalty != 0.f || presence_penalty != 0.f || frequency_penalty != 0.f; }
};
void check(const ProcessorOptions& options, int vocab = 0);

/** logits [1, V] after logit bias, repetition, presence and frequency penalties over `tokens` (prompt and generated). */
mx::array process(const mx::array& logits, const std::vector<int>& tokens, const ProcessorOptions& options);

}  // namespace mlxlm::sample
