// What caches will take, and how a prompt meets quantized and bounded ones.
#include <gtest/gtest.h>
#include <mlx/ops.h>

#include "arch/config.h"
#include "arch/registry.h"
#include "gen/memory.h"

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

}  // namespace
