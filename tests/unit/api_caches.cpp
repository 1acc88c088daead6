// The public API: quantized caches, drafts, prompt caches, and batches with them.
#include <algorithm>

#include "mlxlm/batch_generate.h"
#include "unit/api_support.h"

namespace mlxlm {
namespace {

/** Heads that can be quantized. */
class ApiCaches : public Api {
 protected:
  ApiCaches() {
    auto config = tiny_config();
    config["head_dim"] = 32;
    write(folder / "config.json", config.dump());
    write_weights(folder, config);
  }
};

struct Answer {
  std::vector<int> tokens;
  GenerationResponse last;
};

Answer answer(Model& model, const std::string& prompt, const GenerateOptions& options) {
  Answer a;
  a.last = stream_generate(model, prompt, options, [&](const GenerationResponse& r) {
    a.tokens.push_back(r.token);
    return true;
  });
  return a;
}

TEST_F(ApiCaches, DraftsLeaveTheAnswerAsItIs) {
  auto model = open();
  const auto draft = open();
  const auto plain = answer(model, "hello", {.max_tokens = 24});
  EXPECT_EQ(plain.last.drafted_tokens, 0);
  const auto drafted = answer(model, "hello", {.max_tokens = 24, .draft_model = &draft, .num_draft_tokens = 4});
  EXPECT_EQ(drafted.tokens, plain.tokens);
  EXPECT_GT(drafted.last.accepted_tokens, 10);
  EXPECT_EQ(drafted.last.accepted_tokens, drafted.last.drafted_tokens);
  EXPECT_EQ(answer(model, "hello hello hello", {.max_tokens = 24, .ngram_draft_tokens = 6}).tokens,
            answer(model, "hello hello hello", {.max_tokens = 24}).tokens);
  EXPECT_THROW(answer(model, "hello", {.draft_model = &draft, .num_draft_tokens = 0}), Error);
  EXPECT_THROW(answer(model, "hello", {.draft_model = &draft, .ngram_draft_tokens = 2}), Error);
  EXPECT_THROW(answer(model, "hello", {.ngram_draft_tokens = -1}), Error);
}

TEST_F(ApiCaches, QuantizedCaches) {
  auto model = open();
  const GenerateOptions late{.max_tokens = 12, .kv_bits = 8, .kv_group_size = 32, .quantized_kv_start = 1000};
  EXPECT_EQ(answer(model, "hello", late).tokens, answer(model, "hello", {.max_tokens = 12}).tokens);
  auto now = late;
  now.quantized_kv_start = 0;
  PromptCache cache;
  now.prompt_cache = &cache;
  EXPECT_EQ(answer(model, "hello", now).tokens.size(), 12u);
  now.kv_bits = 4;  // it has 8
  EXPECT_THROW(answer(model, "more", now), Error);
  EXPECT_THROW(answer(model, "hello", {.kv_bits = 7}), Error);
  EXPECT_THROW(answer(model, "hello", {.kv_bits = 8, .kv_group_size = 64}), Error);
}

TEST_F(ApiCaches, APromptCacheGoesOn) {
  auto model = open();
  PromptCache cache;
  EXPECT_EQ(cache.tokens(), 0);
  EXPECT_EQ(cache.trim(3), 0);
  EXPECT_THROW(cache.save(model, (folder / "none.safetensors").string()), Error);
  GenerateOptions options{.max_tokens = 8};
  const auto whole = answer(model, "once upon a time there", options).tokens;
  options.prompt_cache = &cache;
  options.max_tokens = 1;
  answer(model, "once upon", options);
  ASSERT_EQ(cache.tokens(), 10);  // with the token that was generated
  EXPECT_EQ(cache.trim(1), 1);
  const auto file = (folder / "cache.safetensors").string();
  cache.save(model, file);
  auto copy = cache.copy();
  auto read = PromptCache::load(model, file);
  EXPECT_EQ(read.tokens(), 9);
  options.max_tokens = 8;
  for (auto* c : {&cache, &copy, &read}) {
    options.prompt_cache = c;
    EXPECT_EQ(answer(model, " a time there", options).tokens, whole);
    EXPECT_EQ(c->tokens(), 9 + 13 + 8);
  }
  PromptCache moved = std::move(read);
  EXPECT_EQ(moved.tokens(), 30);
  EXPECT_THROW(PromptCache::load(model, (folder / "missing").string()), Error);
  write(folder / "broken.safetensors", "nonsense");
  EXPECT_THROW(PromptCache::load(model, (folder / "broken.safetensors").string()), Error);
}

TEST_F(ApiCaches, ACacheOfAnotherModelIsRefused) {
  auto model = open();
  auto config = tiny_config();
  config["head_dim"] = 32;
  config["num_key_value_heads"] = 4;  // as many layers, other heads
  write(folder / "config.json", config.dump());
  write_weights(folder, config);
  auto other = open();
  PromptCache cache;
  const GenerateOptions options{.max_tokens = 4, .prompt_cache = &cache};
  answer(model, "hello", options);
  EXPECT_THROW(answer(other, "hello", options), Error);
  EXPECT_THROW(cache.save(other, (folder / "c.safetensors").string()), Error);
  EXPECT_EQ(cache.tokens(), 9);
  EXPECT_EQ(answer(model, "hello", options).tokens.size(), 4u);
}

TEST_F(ApiCaches, ABatchGivesWhatEachPromptGivesAlone) {
  auto model = open();
  const auto draft = open();
  std::vector<BatchPrompt> prompts;
  for (int i = 0; i < 6; ++i) prompts.push_back({"hello number " + std::string(1 + 7 * i, 'x'), {.max_tokens = 10 + i}});
  for (int i : {1, 4}) prompts[i].options.ngram_draft_tokens = 5;
  prompts[2].options.draft_model = &draft;
  for (int i : {3, 4}) {
    prompts[i].options.kv_bits = 4;
    prompts[i].options.kv_group_size = 32;
    prompts[i].options.quantized_kv_start = 30;
  }
  prompts[5].options.kv_bits = 7;
  std::vector<std::string> told(prompts.size());
  BatchOptions options;
  options.on_text = [&](std::size_t i, const std::string& text) {
    told[i] += text;
    return true;
  };
  BatchStats stats;
  const auto results = batch_generate(model, prompts, options, &stats);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(results[i].tokens, answer(model, prompts[i].prompt, prompts[i].options).tokens) << i;
    EXPECT_EQ(results[i].text, told[i]);
  }
  EXPECT_EQ(results[5].finish_reason, "error");
  EXPECT_GT(results[2].accepted_tokens, 5);
  EXPECT_GE(stats.drafted_tokens, stats.accepted_tokens);
  EXPECT_GE(stats.accepted_tokens, results[2].accepted_tokens);
  PromptCache cache;  // of nothing
  prompts[0].options.prompt_cache = &cache;
  EXPECT_EQ(batch_generate(model, prompts)[0].tokens, results[0].tokens);
  EXPECT_EQ(cache.tokens(), 0);
  const auto another = open();
  prompts[0].options.draft_model = &another;
  EXPECT_THROW(batch_generate(model, prompts), Error);
}

}  // namespace
}  // namespace mlxlm
