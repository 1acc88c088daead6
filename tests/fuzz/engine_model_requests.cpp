// The real engine on tiny models of several families: random requests at random times, each compared with itself run alone.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <random>

#include <gtest/gtest.h>
#include <mlx/ops.h>

#include "engine/engine.h"
#include "fuzz/tiny_models.h"
#include "gen/generate.h"
#include "gen/runner.h"
#include "parity/parity_case.h"
#include "tiny_tokenizer.h"

namespace mlxlm::tests {
namespace {

using namespace engine;

const text::Tokenizer& tokenizer() {
  static const text::Tokenizer shared = byte_tokenizer();
  return shared;
}

/** The same by gen::stream_generate, in chunks of its own and without drafts. */
std::vector<int> run_alone(model::CausalModel& model, const Request& r, int chunk_tokens) {
  gen::Options o;
  o.max_tokens = r.max_tokens;
  o.sampler = gen::sampler_options(r.sampling);
  o.processors = gen::processor_options(r.sampling);
  o.max_kv_size_tokens = r.max_kv_size_tokens;
  o.prefill_step_tokens = chunk_tokens;
  o.kv_quantization = {r.kv_bits, r.kv_group_size, r.quantized_kv_start};
  o.ignore_eos = true;
  o.want_logprob = r.sampling.want_logprob || r.sampling.top_logprobs > 0;
  std::vector<int> tokens;
  gen::stream_generate(model, tokenizer(), r.tokens, o, [&](const gen::Response& response) {
    tokens.push_back(response.token);
    return true;
  });
  return tokens;
}

class ModelFuzz : public TinyModels {
 protected:
  Request request() {
    Request r;
    // Few beginnings, so that prefixes are shared: mostly short ones, and some beyond a block of the caches, of which memory is shared.
    const bool is_long = pick(0, 4) == 0;
    const int family = pick(0, 2), length = is_long ? pick(100, 400) : pick(1, 60), same = is_long ? pick(64, 300) : 30;
    for (int i = 0; i < length; ++i) r.tokens.push_back(((i * 37 + family * 11 + i * i) ^ (i > same ? pick(0, 3) : 0)) % vocab_);
    r.max_tokens = pick(1, 24);
    auto& s = r.sampling;
    if (pick(0, 1)) {
      s.temperature = 0.5f + 0.25f * pick(0, 4);
      s.seed = pick(0, 1000);
      if (pick(0, 2) == 0) s.top_p = 0.9f;
      if (pick(0, 2) == 0) s.top_k = pick(1, vocab_ - 1);
      if (pick(0, 2) == 0) s.min_p = 0.05f;
      if (pick(0, 3) == 0) s.xtc_probability = 0.5f;
    }
    if (pick(0, 3) == 0) s.repetition_penalty = 1.3f;
    if (pick(0, 5) == 0) s.frequency_penalty = 0.5f;
    if (pick(0, 5) == 0) s.logit_bias = {{pick(0, vocab_ - 1), 2.f}};
    s.want_logprob = pick(0, 4) == 0;
    if (pick(0, 4) == 0) s.top_logprobs = 3;
    if (pick(0, 3) == 0) r.max_kv_size_tokens = pick(4, 40);
    if (pick(0, 2) == 0) r.boundaries = {pick(1, 60), pick(1, 60)};
    r.use_prefix_cache = pick(0, 4) > 0;
    if (quantizable_ && pick(0, 3) == 0) {
      r.kv_bits = pick(0, 1) ? 8 : 4;
      r.kv_group_size = 32;
      r.quantized_kv_start = pick(0, 1) ? 0 : pick(1, 70);
    }
    if (pick(0, 1)) (pick(0, 1) ? r.drafts.ngram_tokens : r.drafts.model_tokens) = pick(1, 7);
    return r;
  }

  void story(uint32_t seed) {
    random_.seed(seed);
    const int chunk = pick(1, 48);
    Limits limits{.max_sequences = pick(2, 9),
                  .prefill_tokens = chunk,
                  .least_prefill_tokens = pick(1, 8),
                  .prefix_cache_bytes = pick(0, 1) ? 1 << 22 : 0};
    if (pick(0, 1)) limits.step_tokens = pick(2, 40);
    if (pick(0, 2) == 0) limits.limited_chunk_tokens = pick(1, 50);
    if (pick(0, 1)) limits.draft_tokens = pick(0, 20);
    gen::ModelRunner runner(*model_, limits, draft_model_.get());
    if (pick(0, 1)) limits.memory_bytes = 4 * runner.cost_bytes(430, {.with_drafts = true}) + limits.prefix_cache_bytes;
    Told told;
    {
      Engine engine(runner, limits);
      play(engine, told);
      if (HasFailure()) return;
      for (const auto& e : engine.step().events) told.ends[e.id] = e.finish;
    }
    EXPECT_EQ(runner.count(), 0u);
    for (const auto& [id, r] : told.requests) {
      compare(id, r, told, limits);
      if (HasFailure()) return;
    }
  }

  struct Told {
    std::map<SequenceId, Request> requests;
    std::map<SequenceId, std::vector<int>> answers;
    std::map<SequenceId, Finish> ends;
  };

  /** Requests come, and some are cancelled, while others are answered. */
  void play(Engine& engine, Told& told) {
    int left = 12;
    while (left > 0 || engine.has_work()) {
      while (left > 0 && pick(0, 2) == 0) {
        --left;
        auto r = request();
        told.requests.emplace(engine.submit(r), r);
      }
      if (!told.requests.empty() && pick(0, 30) == 0) engine.cancel(told.requests.rbegin()->first - pick(0, 3));
      for (auto& e : engine.step().events) take(e, told);
      for (const auto& violation : check_invariants(engine.snapshot())) ADD_FAILURE() << violation;
      if (HasFailure()) return;
    }
  }

  static void take(const Event& e, Told& told) {
    if (e.chosen) {
      told.answers[e.id].push_back(e.chosen->token);
      const auto& s = told.requests.at(e.id).sampling;
      EXPECT_EQ(e.chosen->top.size(), static_cast<std::size_t>(s.top_logprobs));
      if (s.temperature == 0 && s.top_logprobs > 0) {
        EXPECT_EQ(e.chosen->top.front().logprob, e.chosen->logprob);
      }
    }
    if (e.finish != Finish::none) told.ends[e.id] = e.finish;
    if (e.error) ADD_FAILURE() << e.error->what();
  }

  void compare(SequenceId id, const Request& r, Told& told, const Limits& limits) {
    // What a limited cache forgets depends on the chunks, alone as well.
    const bool limited = (r.max_kv_size_tokens > 0 && r.tokens.size() > static_cast<std::size_t>(r.max_kv_size_tokens)) || r.kv_bits > 0;
    const auto wanted = run_alone(*model_, r, limited ? limits.limited_chunk_tokens : pick(1, 64));
    const auto& got = told.answers[id];
    if (told.ends.at(id) == Finish::length) {
      EXPECT_EQ(got, wanted) << "request " << id << " of " << told.requests.size() << ": prompt " << r.tokens.size() << ", max_kv "
                             << r.max_kv_size_tokens << ", temperature " << r.sampling.temperature << ", boundaries " << r.boundaries.size()
                             << ", bits " << r.kv_bits << " from " << r.quantized_kv_start << ", limited chunk "
                             << limits.limited_chunk_tokens << " prefill " << limits.prefill_tokens << " step " << limits.step_tokens
                             << ", drafts " << r.drafts.ngram_tokens << " " << r.drafts.model_tokens;
    } else {
      EXPECT_EQ(told.ends.at(id), Finish::cancelled);
      EXPECT_TRUE(got.size() <= wanted.size() && std::equal(got.begin(), got.end(), wanted.begin()));
    }
  }
};

/** FUZZ_LONG=1 goes on for longer, FUZZ_SEED=n begins at a story. */
TEST_P(ModelFuzz, EveryAnswerIsTheOneGivenAlone) {
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t seed = (std::getenv("FUZZ_SEED") ? std::atoi(std::getenv("FUZZ_SEED")) : 1u);
       seed <= (std::getenv("FUZZ_LONG") ? 400u : 12u) &&
       std::chrono::steady_clock::now() - start < std::chrono::seconds(std::getenv("FUZZ_LONG") ? 40 : 4);
       ++seed) {
    SCOPED_TRACE(seed);
    story(seed);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Family, ModelFuzz,
                         testing::Values("llama.f32", "llama.q4", "mistral.q4", "gemma3_text.q4", "nemotron_h.f32", "nemotron_h.q4",
                                         "lfm2_biased.q4", "deepseek_v3.q4", "qwen3_moe.q4", "phi3.q4", "llama.bf16", "falcon_h1.q4",
                                         "llama4.f32", "llama4.q4"),
                         test_name);

}  // namespace
}  // namespace mlxlm::tests
