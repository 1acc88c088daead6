// A prompt that is stopped inside a chunk: the call ends early, and the caches are as before it. And answers that outgrow the memory.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/prompt_file.h"
#include "gen/batch.h"
#include "gen/generate.h"
#include "gen/memory.h"
#include "parity/parity_case.h"
#include "tiny_tokenizer.h"

namespace mlxlm {
namespace {

namespace mx = mlx::core;
using Tokens = std::vector<int>;

const text::Tokenizer& tokenizer() {
  static const text::Tokenizer shared = tests::byte_tokenizer();
  return shared;
}

std::unique_ptr<model::CausalModel> tiny_model(const std::string& name, bool graph = false) {
  const auto golden = tests::load_golden(name);
  auto c = tests::make_checkpoint(golden.info.at("config"), golden.info);
  return model::make_model(std::move(c.description), std::move(c.tensors), c.quant,
                           {.executor = graph ? model::Executor::graph : model::Executor::best});
}

/** Sets the flag while it works on its call number `at`, as Ctrl-C would. */
class Interrupted final : public model::CausalModel {
 public:
  Interrupted(model::CausalModel& model, std::atomic<bool>& flag, int at) : model_(model), flag_(flag), at_(at) {}
  mx::array run(const mx::array& tokens, const std::vector<model::Segment>& segments) override {
    if (++calls == at_) flag_ = true;
    const model::StopScope scope(model_, stop());
    return model_.run(tokens, segments);
  }
  const arch::Model& description() const override { return model_.description(); }
  const char* executor() const override { return model_.executor(); }
  int64_t weight_bytes() const override { return 0; }
  int cache_value_bytes() const override { return model_.cache_value_bytes(); }
  int calls = 0;

 private:
  model::CausalModel& model_;
  std::atomic<bool>& flag_;
  int at_;
};

Tokens some_tokens(int count, int vocab) {
  Tokens tokens;
  for (int i = 0; i < count; ++i) tokens.push_back((i * 37 + i * i * 11) % vocab);
  return tokens;
}

Tokens answer(model::CausalModel& model, const Tokens& prompt, const gen::Options& options, cache::Caches& caches) {
  Tokens tokens;
  gen::stream_generate(
      model, tokenizer(), prompt, options,
      [&](const gen::Response& r) {
        if (r.generation_tokens > 0) tokens.push_back(r.token);
        return true;
      },
      &caches);
  return tokens;
}

struct Case {
  std::string name;
  bool graph;
};

class Stopped : public testing::TestWithParam<Case> {
 protected:
  std::unique_ptr<model::CausalModel> model_ = tiny_model(GetParam().name, GetParam().graph);
};

TEST_P(Stopped, ACallEndsEarlyAndAFlagThatIsNotSetChangesNoBit) {
  const auto prompt = some_tokens(64, model_->description().vocab);
  const mx::array tokens(prompt.data(), {64}, mx::int32);
  std::atomic<bool> flag = false;
  const auto logits = [&](const std::atomic<bool>* stop) {
    auto caches = cache::make_caches(model_->description());
    const model::StopScope scope(*model_, stop);
    auto out = mx::astype(model_->run(tokens, {{64, 2, &caches}}), mx::float32);
    mx::eval(out);
    EXPECT_EQ(out.shape(), (mx::Shape{2, model_->description().vocab}));
    return std::vector<float>(out.data<float>(), out.data<float>() + out.size());
  };
  const auto plain = logits(nullptr);
  EXPECT_EQ(logits(&flag), plain);
  flag = true;
  const auto stopped = logits(&flag);
  EXPECT_TRUE(std::ranges::all_of(stopped, [](float x) { return x == 0.f; }));
  EXPECT_TRUE(std::ranges::any_of(plain, [](float x) { return x != 0.f; }));
}

TEST_P(Stopped, TheCachesAreAsBeforeTheChunk) {
  const auto prompt = some_tokens(150, model_->description().vocab);
  for (const int max_kv_size : {0, 40}) {
    gen::Options options{.max_tokens = 6, .prefill_step_tokens = 40, .max_kv_size_tokens = max_kv_size, .ignore_eos = true};
    cache::Caches whole;
    const auto wanted = answer(*model_, prompt, options, whole);
    for (const int at : {1, 3, 4}) {
      SCOPED_TRACE(fmt::format("max_kv_size {}, call {}", max_kv_size, at));
      std::atomic<bool> flag = false;
      Interrupted interrupted(*model_, flag, at);
      int processed = -1;
      auto stoppable = options;
      stoppable.cancel = &flag;
      stoppable.on_prefill = [&](int done, int) { processed = done; };
      cache::Caches caches;
      EXPECT_TRUE(answer(interrupted, prompt, stoppable, caches).empty());
      EXPECT_EQ(interrupted.calls, at);
      EXPECT_EQ(processed, (at - 1) * 40);
      EXPECT_EQ(cache::prompt_tokens(caches), processed);
      EXPECT_EQ(answer(*model_, {prompt.begin() + processed, prompt.end()}, options, caches), wanted);
    }
  }
}

/** Where the last step of a prompt is the one that would convert them, what is stopped there has converted none. */
TEST(StoppedBeforeItIsQuantized, CachesStayFloats) {
  for (const bool graph : {false, true}) {
    const auto model = tiny_model("gemma3_text.f32", graph);
    const auto prompt = some_tokens(50, model->description().vocab);
    const gen::Options options{.max_tokens = 6, .prefill_step_tokens = 40, .kv_quantization = {4, 32, 50}, .ignore_eos = true};
    cache::Caches whole;
    const auto wanted = answer(*model, prompt, options, whole);
    std::atomic<bool> flag = false;
    Interrupted interrupted(*model, flag, 3);
    auto stoppable = options;
    stoppable.cancel = &flag;
    cache::Caches caches;
    EXPECT_TRUE(answer(interrupted, prompt, stoppable, caches).empty());
    EXPECT_EQ(interrupted.calls, 3);
    EXPECT_EQ(cache::prompt_tokens(caches), 49);
    for (const auto& c : caches) EXPECT_TRUE(dynamic_cast<cache::AttentionCache&>(*c).can_quantize());
    EXPECT_EQ(answer(*model, {prompt.back()}, options, caches), wanted);
  }
}

TEST_P(Stopped, ABatchEndsAndTellsNothingOfTheStep) {
  const auto tokens = some_tokens(300, model_->description().vocab);
  for (const int count : {1, 3}) {  // of three prompts, two have a part of the step that is stopped
    std::atomic<bool> flag = false;
    Interrupted interrupted(*model_, flag, 3);  // the first one is the runner's own
    gen::BatchRun run{.cancel = &flag};
    run.limits.prefill_tokens = 64;
    std::vector<gen::BatchItem> items(count);
    for (int i = 0; i < count; ++i) {
      items[i].prompt.assign(tokens.begin() + i * 300 / count, tokens.begin() + (i + 1) * 300 / count);
    }
    const auto answers = gen::batch_generate(interrupted, tokenizer(), items, run);
    EXPECT_EQ(interrupted.calls, 3);
    for (const auto& a : answers) {
      EXPECT_EQ(a.finish, gen::Finish::cancelled);
      EXPECT_FALSE(a.error) << a.error->what();
      EXPECT_TRUE(a.tokens.empty());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Model, Stopped,
                         testing::Values(Case{"llama.f32", false}, Case{"llama.f32", true}, Case{"gemma3_text.f32", false},
                                         Case{"gemma3_text.f32", true}, Case{"nemotron_h.f32", false}, Case{"nemotron_h.f32", true},
                                         Case{"llama4.f32", false}, Case{"qwen3_next.f32", true}),
                         [](const auto& info) {
                           return info.param.name.substr(0, info.param.name.find('.')) + (info.param.graph ? "_graph" : "");
                         });

// ---- answers that grow ---------------------------------------------------------------------------------------------------

class Growing : public testing::Test {
 protected:
  void TearDown() override { ::unsetenv("MLXLM_MEMORY_BYTES"); }

  /** Tokens until memory was refused, or all. */
  static int tokens_within(model::CausalModel& model, int64_t bytes, gen::Options options, std::string& error) {
    ::setenv("MLXLM_MEMORY_BYTES", std::to_string(bytes).c_str(), 1);
    int tokens = 0;
    options.ignore_eos = true;
    try {
      gen::stream_generate(model, tokenizer(), some_tokens(20, 100), options, [&](const gen::Response& r) {
        tokens = r.generation_tokens;
        return true;
      });
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::out_of_memory);
      error = e.what();
    }
    ::unsetenv("MLXLM_MEMORY_BYTES");
    return tokens;
  }
};

TEST_F(Growing, AnAnswerIsRefusedMemoryBeforeItTakesIt) {
  for (const bool graph : {false, true}) {
    const auto model = tiny_model("qwen3.f32", graph);
    const int64_t row = gen::cache_bytes(model->description(), 1, {.value_bytes = 4});
    for (gen::Options options : {gen::Options{.max_tokens = 1500}, gen::Options{.max_tokens = 1500, .ngram_draft_tokens = 4},
                                 gen::Options{.max_tokens = 1500, .draft_model = model.get()}}) {
      std::string error;
      EXPECT_EQ(tokens_within(*model, row * 4096, options, error), 1500);
      EXPECT_EQ(error, "");
      // 256, 512 and 768 rows fit, 1280 do not: they are asked for when 64 more might not find a place.
      const int tokens = tokens_within(*model, row * 1000, options, error);
      EXPECT_GE(tokens, 768 - 20 - 128);
      EXPECT_LE(tokens, 768 - 20 + 1);  // the latest is not in the caches
      EXPECT_NE(error.find("answer: a cache for 1"), std::string::npos) << error;
      EXPECT_NE(error.find("available are"), std::string::npos) << error;
    }
  }
}

TEST_F(Growing, FloatsCountWithTheirRealSize) {
  const auto model = tiny_model("qwen3.f32");
  const int64_t row = gen::cache_bytes(model->description(), 1, {.value_bytes = 4});
  gen::Options options{.max_tokens = 1};
  ::setenv("MLXLM_MEMORY_BYTES", std::to_string(row * 150).c_str(), 1);
  cache::Caches caches;
  EXPECT_THROW(answer(*model, some_tokens(200, 100), options, caches), Error);  // at 2 bytes a number it would seem to fit
  EXPECT_TRUE(caches.empty());
}

TEST_F(Growing, WhatIsBoundedGoesOn) {
  const auto model = tiny_model("qwen3.f32");
  const int64_t row = gen::cache_bytes(model->description(), 1, {.value_bytes = 4});
  std::string error;
  EXPECT_EQ(tokens_within(*model, row * 300, {.max_tokens = 1500, .max_kv_size_tokens = 100}, error), 1500) << error;
}

}  // namespace
}  // namespace mlxlm
