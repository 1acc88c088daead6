// What caches will take, and what is reserved for those that requests bring.
#include <gtest/gtest.h>
#include <mlx/ops.h>

#include "arch/config.h"
#include "arch/registry.h"
#include "cache/prompt_file.h"
#include "gen/generate.h"
#include "gen/memory.h"
#include "gen/runner.h"
#include "parity/parity_case.h"

namespace {

using namespace mlxlm;

/** One full layer and one with a window of 100: 2 heads of 64, so 256 numbers a token in each. */
arch::Model model() {
  return arch::build(arch::Config({{"model_type", "llama"},
                                   {"hidden_size", 64},
                                   {"intermediate_size", 64},
                                   {"num_hidden_layers", 2},
                                   {"num_attention_heads", 2},
                                   {"num_key_value_heads", 2},
                                   {"head_dim", 64},
                                   {"rms_norm_eps", 1e-5},
                                   {"vocab_size", 16},
                                   {"rope_theta", 1e4},
                                   {"sliding_window", 100},
                                   {"layer_types", {"full_attention", "sliding_attention"}}}));
}

TEST(CacheBytes, CountWhatIsKept) {
  EXPECT_EQ(gen::cache_bytes(model(), 1000, {}), 1100 * 256 * 2);
  EXPECT_EQ(gen::cache_bytes(model(), 50, {.value_bytes = 4}), 100 * 256 * 4);
  EXPECT_EQ(gen::cache_bytes(model(), 1000, {.max_kv_size_tokens = 300}), 400 * 256 * 2);
}

TEST(CacheBytes, StatesStayFloat32) {
  const auto hybrid = arch::build(arch::Config({{"model_type", "lfm2"},
                                                {"hidden_size", 64},
                                                {"num_hidden_layers", 2},
                                                {"num_attention_heads", 2},
                                                {"num_key_value_heads", 1},
                                                {"norm_eps", 1e-5},
                                                {"conv_L_cache", 3},
                                                {"block_ff_dim", 64},
                                                {"block_multiple_of", 32},
                                                {"vocab_size", 16},
                                                {"full_attn_idxs", {1}}}));
  EXPECT_EQ(gen::cache_bytes(hybrid, 100, {}), 2 * 64 * 4 + 100 * 2 * 32 * 2);
  auto caches = cache::make_caches(hybrid);
  dynamic_cast<cache::RecurrentCache&>(*caches[0]).set_slot(0, mlx::core::zeros({1, 2, 64}));
  EXPECT_EQ(gen::value_bytes(caches), 0);
  const auto x = mlx::core::zeros({1, 1, 3, 32}, mlx::core::bfloat16);
  dynamic_cast<cache::AttentionCache&>(*caches[1]).update(x, x);
  EXPECT_EQ(gen::value_bytes(caches), 2);
}

TEST(CacheBytes, ChunksAreBounded) {
  const auto chunked = arch::build(arch::Config({{"model_type", "llama4"},
                                                 {"text_config",
                                                  {{"hidden_size", 64},
                                                   {"intermediate_size", 32},
                                                   {"intermediate_size_mlp", 64},
                                                   {"num_hidden_layers", 4},
                                                   {"num_attention_heads", 4},
                                                   {"num_key_value_heads", 2},
                                                   {"head_dim", 32},
                                                   {"num_local_experts", 2},
                                                   {"rms_norm_eps", 1e-5},
                                                   {"vocab_size", 16},
                                                   {"rope_theta", 1e4},
                                                   {"attention_chunk_size", 64}}}}));
  EXPECT_EQ(gen::cache_bytes(chunked, 1000, {}), (3 * 64 + 1000) * 128 * 2);
  EXPECT_EQ(gen::cache_bytes(chunked, 50, {}), 4 * 50 * 128 * 2);
  EXPECT_EQ(gen::cache_bytes(chunked, 1000, {.max_kv_size_tokens = 10}), (3 * 64 + 10) * 128 * 2);
}

TEST(CacheBytes, QuantizedOnesAreFloatsAtFirst) {
  const cache::Quantization q{.bits = 4, .group_size = 64, .start_tokens = 0};
  const int64_t row = 256 / 2 + 256 / 64 * 2 * 2;  // codes, and a scale and a bias a group
  // Short steps: the quantized end is what counts. One long step: everything stands there as floats once.
  EXPECT_EQ(gen::cache_bytes(model(), 10000, {.quantization = q, .prefill_step_tokens = 64}), 10100 * row);
  EXPECT_EQ(gen::cache_bytes(model(), 10000, {.quantization = q, .prefill_step_tokens = 10000}), 10100 * 256 * 2);
  const cache::Quantization later{.bits = 4, .group_size = 64, .start_tokens = 5000};
  EXPECT_EQ(gen::cache_bytes(model(), 4999, {.quantization = later, .prefill_step_tokens = 64}), 5099 * 256 * 2);
  EXPECT_EQ(gen::cache_bytes(model(), 6000, {.quantization = later, .prefill_step_tokens = 64}), (5064 + 100) * 256 * 2);
}

TEST(CacheBytes, ValueSizesComeFromTheCaches) {
  auto caches = cache::make_caches(model());
  EXPECT_EQ(gen::value_bytes(caches), 0);
  const auto x = mlx::core::zeros({1, 2, 3, 64}, mlx::core::float16);
  dynamic_cast<cache::AttentionCache&>(*caches[1]).update(x, x);
  EXPECT_EQ(gen::value_bytes(caches), 2);
  cache::quantize_caches(caches, {.bits = 4, .group_size = 64});
  EXPECT_EQ(gen::value_bytes(caches), 2);
}

// ---- caches that requests bring ------------------------------------------------------------------------------------------

class Brought : public testing::Test {
 protected:
  Brought() {
    const auto golden = tests::load_golden("qwen3.f32");
    model_ = tests::make_model(tests::make_checkpoint(golden.info.at("config"), golden.info));
    for (int i = 0; i < 300; ++i) tokens_.push_back((i * 37 + i * i * 11) % model_->description().vocab);
  }

  /** Of the tokens but the last. */
  cache::Caches caches(const gen::Options& options) {
    cache::Caches made;
    gen::prefill(*model_, {tokens_.begin(), tokens_.end() - 1}, options, made);
    return made;
  }

  std::unique_ptr<model::CausalModel> model_;
  std::vector<int> tokens_;
};

constexpr int64_t kRowValues = 2 * 2 * 2 * 32;                       // layers, keys and values, heads, numbers
constexpr int64_t kRow4 = kRowValues / 2 + kRowValues / 32 * 2 * 4;  // 4 bits: codes, and a scale and a bias a group of 32

TEST_F(Brought, WhatIsQuantizedHoldsNoFloats) {
  gen::ModelRunner runner(*model_);
  const auto id = runner.adopt(caches({.kv_quantization = {4, 32, 0}}));
  constexpr int64_t rows = (400 * 3 / 2 + 256) / 256 * 256;
  // Whatever the request says: its caches are as they are.
  for (const engine::CacheOptions& o :
       {engine::CacheOptions{.kv_bits = 4, .kv_group_size = 32, .quantized_from_tokens = 300},
        engine::CacheOptions{.kv_bits = 4, .kv_group_size = 32, .quantized_from_tokens = 500}, engine::CacheOptions{}}) {
    EXPECT_EQ(runner.growth_bytes(id, std::nullopt, 400, o), rows * kRow4);
  }
  const auto floats = runner.adopt(caches({}));
  EXPECT_EQ(runner.growth_bytes(floats, std::nullopt, 400, {}), rows * kRowValues * 4);
  EXPECT_GT(runner.growth_bytes(floats, std::nullopt, 400, {.kv_bits = 4, .kv_group_size = 32, .quantized_from_tokens = 300}),
            512 * kRowValues * 4);
}

TEST_F(Brought, APromptAddsNoFloatsToWhatIsQuantized) {
  const auto given = caches({.kv_quantization = {4, 32, 0}});
  for (const gen::Options& options : {gen::Options{}, {.kv_quantization = {4, 32, 0}}, {.kv_quantization = {4, 32, 5000}}}) {
    EXPECT_EQ(gen::prompt_bytes(*model_, 1701, options, given), 2000 * kRow4 - cache::total_bytes(given));
  }
  EXPECT_EQ(gen::prompt_bytes(*model_, 1701, {}, caches({})), 2000 * kRowValues * 4 - cache::total_bytes(caches({})));
}

TEST_F(Brought, OnlyWhatChunksDoNotShowInIsReplaceable) {
  gen::ModelRunner runner(*model_);
  EXPECT_TRUE(runner.is_replaceable(runner.adopt(caches({}))));
  EXPECT_FALSE(runner.is_replaceable(runner.adopt(caches({.max_kv_size_tokens = 400}))));
  EXPECT_FALSE(runner.is_replaceable(runner.adopt(caches({.kv_quantization = {4, 32, 0}}))));
  for (const auto& [name, replaceable] : {std::pair("gemma3_text.f32", true), {"nemotron_h.f32", true}, {"llama4.f32", true}}) {
    const auto golden = tests::load_golden(name);
    const auto other = tests::make_model(tests::make_checkpoint(golden.info.at("config"), golden.info));
    gen::ModelRunner runner_of_other(*other);
    cache::Caches made;
    gen::prefill(*other, {tokens_.begin(), tokens_.begin() + 40}, {}, made);
    EXPECT_EQ(runner_of_other.is_replaceable(runner_of_other.adopt(std::move(made))), replaceable) << name;
    made.clear();
    gen::prefill(*other, {tokens_.begin(), tokens_.begin() + 40}, {.max_kv_size_tokens = 6}, made);
    EXPECT_FALSE(runner_of_other.is_replaceable(runner_of_other.adopt(std::move(made)))) << name;
  }
}

/** The floats that its tokens would be do not count, neither when the request comes nor while it waits. */
TEST_F(Brought, QuantizedCachesFitWhereTheirFloatsWouldNot) {
  const auto given = caches({.kv_quantization = {4, 32, 0}});
  constexpr int64_t rows = (310 * 3 / 2 + 256) / 256 * 256;
  engine::Limits limits{.max_sequences = 1, .memory_bytes = 2 * rows * kRow4};
  gen::ModelRunner runner(*model_, limits);
  ASSERT_GT(runner.cost_bytes(310, {}), limits.memory_bytes);
  engine::Engine engine(runner, limits);
  for (const int bits : {0, 4}) {
    engine.submit({.tokens = {tokens_.back()},
                   .max_tokens = 10,
                   .kv_bits = bits,
                   .kv_group_size = 32,
                   .cache = runner.adopt(cache::copy(given)),
                   .cache_tokens = {tokens_.begin(), tokens_.end() - 1}});
  }
  int generated = 0;
  while (engine.has_work()) {
    for (const auto& e : engine.step().events) {
      EXPECT_FALSE(e.error) << e.error->what();
      generated += e.chosen.has_value();
    }
  }
  EXPECT_EQ(generated, 20);
}

}  // namespace
