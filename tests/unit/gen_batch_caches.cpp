// Batches over caches: brought where memory is short, and handed over by answers that were cancelled.
#include <atomic>
#include <filesystem>

#include <gtest/gtest.h>
#include <unistd.h>

#include "base/error.h"
#include "cache/prompt_file.h"
#include "gen/batch.h"
#include "gen/generate.h"
#include "parity/parity_case.h"
#include "tiny_tokenizer.h"

namespace mlxlm {
namespace {

using Tokens = std::vector<int>;

class BatchCaches : public testing::TestWithParam<std::string> {
 protected:
  BatchCaches() {
    const auto golden = tests::load_golden(GetParam());
    model_ = tests::make_model(tests::make_checkpoint(golden.info.at("config"), golden.info));
    for (int i = 0; i < 4; ++i) items_.push_back({.prompt = some_tokens(30 + 40 * i, i), .max_tokens = 12, .ignore_eos = true});
  }

  Tokens some_tokens(int count, int salt) const {
    Tokens tokens;
    for (int i = 0; i < count; ++i) tokens.push_back((i * 37 + i * i * 11 + (i < 24 ? 0 : salt * 19)) % model_->description().vocab);
    return tokens;
  }
  std::vector<gen::BatchAnswer> run(const std::vector<gen::BatchItem>& items, const gen::BatchRun& run = {},
                                    gen::BatchGenerator::Stats* stats = nullptr) {
    return gen::batch_generate(*model_, tokenizer_, items, run, stats);
  }
  /** Caches of these tokens, as `options` say. */
  cache::Caches caches(const Tokens& tokens, const gen::Options& options) {
    cache::Caches made;
    EXPECT_TRUE(gen::prefill(*model_, tokens, options, made));
    return made;
  }
  /** What was handed over goes on to the answer that nobody cancels. */
  void expect_going_on(std::size_t i, const gen::BatchAnswer& ended, const Tokens& whole) {
    SCOPED_TRACE(i);
    EXPECT_FALSE(ended.error) << ended.error->what();
    ASSERT_FALSE(ended.caches.empty());
    ASSERT_FALSE(ended.tokens.empty());
    ASSERT_LE(ended.tokens.size(), whole.size());
    EXPECT_TRUE(std::equal(ended.tokens.begin(), ended.tokens.end(), whole.begin()));
    EXPECT_EQ(cache::prompt_tokens(ended.caches), static_cast<int>(items_[i].prompt.size() + ended.tokens.size() - 1));
    const int left = static_cast<int>(whole.size() - ended.tokens.size());
    if (left == 0) return;
    auto on = items_[i];
    on.prompt = {ended.tokens.back()};
    on.max_tokens = left;
    on.caches = &ended.caches;
    EXPECT_EQ(run({on})[0].tokens, Tokens(whole.end() - left, whole.end()));
  }

  text::Tokenizer tokenizer_ = tests::byte_tokenizer();
  std::unique_ptr<model::CausalModel> model_;
  std::vector<gen::BatchItem> items_;
};

TEST_P(BatchCaches, OfCancelledAnswersAreHandedOver) {
  const auto whole = run(items_);
  std::atomic<bool> flag = false;
  gen::BatchRun all{.on_step = [&](const auto& stats) { flag = stats.generation_tokens >= 12; }, .cancel = &flag, .keep_caches = true};
  all.limits.prefill_tokens = 64;
  const auto stopped = run(items_, all);
  bool any = false;
  for (std::size_t i = 0; i < items_.size(); ++i) {
    EXPECT_EQ(stopped[i].finish, gen::Finish::cancelled);
    if (stopped[i].tokens.empty()) continue;  // was still in its prompt
    any = true;
    expect_going_on(i, stopped[i], whole[i].tokens);
  }
  EXPECT_TRUE(any);

  gen::BatchRun one{.on_text = [](std::size_t i, const std::string&) { return i != 1; }, .keep_caches = true};
  const auto without = run(items_, one);
  EXPECT_EQ(without[1].finish, gen::Finish::cancelled);
  EXPECT_LT(without[1].tokens.size(), whole[1].tokens.size());
  for (std::size_t i = 0; i < items_.size(); ++i) expect_going_on(i, without[i], whole[i].tokens);
}

TEST_P(BatchCaches, ACancelledRunLeavesAFolderThatServes) {
  const auto folder = std::filesystem::temp_directory_path() / ("mlxlm-batch-caches-" + std::to_string(::getpid()));
  std::filesystem::remove_all(folder);
  const auto whole = run(items_);
  for (const int64_t at : {1, 12}) {  // tokens: while prompts are computed, and when all decode
    SCOPED_TRACE(at);
    std::atomic<bool> flag = false;
    gen::BatchRun stopped{.on_step = [&](const auto& stats) { flag = stats.generation_tokens >= at; }, .cancel = &flag};
    stopped.prefixes.folder = folder;
    stopped.limits.prefill_tokens = 64;
    for (const auto& a : run(items_, stopped)) {
      EXPECT_EQ(a.finish, gen::Finish::cancelled);
      EXPECT_FALSE(a.error) << a.error->what();
    }
    gen::BatchRun again;
    again.prefixes.folder = folder;
    gen::BatchGenerator::Stats stats;
    const auto answers = run(items_, again, &stats);
    for (std::size_t i = 0; i < items_.size(); ++i) EXPECT_EQ(answers[i].tokens, whole[i].tokens) << i;
    EXPECT_GT(stats.reused_tokens, 24);
    std::filesystem::remove_all(folder);
  }
}

/** Room for one or two at a time: the others wait, and nobody fails or gets other tokens. */
TEST_P(BatchCaches, AreContinuedWhereMemoryIsShort) {
  const auto held = some_tokens(200, 7);
  for (const gen::Options& options : {gen::Options{}, {.max_kv_size_tokens = 50}, {.kv_quantization = {8, 32, 0}}}) {
    SCOPED_TRACE(testing::Message() << "max_kv_size " << options.max_kv_size_tokens << ", bits " << options.kv_quantization.bits);
    const auto given = caches(held, options);
    std::vector<gen::BatchItem> items;
    for (int i = 0; i < 7; ++i) {
      items.push_back({.prompt = some_tokens(3 + i, i), .max_tokens = 8, .kv_quantization = options.kv_quantization, .ignore_eos = true});
      items.back().caches = &given;
    }
    items[3].caches = nullptr;  // one of its own among them
    items[3].prompt = some_tokens(150, 3);
    gen::BatchRun tight;
    gen::ModelRunner runner(*model_, tight.limits);
    const auto one = runner.growth_bytes(runner.adopt(cache::copy(given)), std::nullopt, 217,
                                         {.kv_bits = options.kv_quantization.bits, .kv_group_size = 32, .quantized_from_tokens = 201});
    const auto own = runner.cost_bytes(158, {.kv_bits = options.kv_quantization.bits, .kv_group_size = 32, .quantized_from_tokens = 149});
    tight.limits.memory_bytes = std::max(one * 3 / 2, own);
    const auto answers = run(items, tight);
    for (std::size_t i = 0; i < items.size(); ++i) {
      EXPECT_FALSE(answers[i].error) << i << ": " << answers[i].error->what();
      EXPECT_EQ(answers[i].tokens, run({items[i]})[0].tokens) << i;
    }
    tight.limits.memory_bytes = std::min(one, own) / 2;
    for (const auto& a : run(items, tight)) {
      ASSERT_TRUE(a.error);
      EXPECT_EQ(a.error->code(), Code::out_of_memory);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Model, BatchCaches, testing::Values("qwen3.f32", "gemma3_text.f32"), tests::test_name);

}  // namespace
}  // namespace mlxlm
