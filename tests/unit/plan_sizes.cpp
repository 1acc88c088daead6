// Sizes and rotations that the goldens of mlx_lm do not show.
#include <cmath>
#include <filesystem>

#include <gtest/gtest.h>

#include "arch/registry.h"
#include "plan/plan.h"

namespace mlxlm::plan {
namespace {

json tiny(const std::string& name) {
  return read_json_file(std::filesystem::path(MLXLM_TEST_DATA).parent_path() / "arch" / (name + ".json"));
}

arch::Model built(const std::string& name) {
  return arch::build(arch::Config(tiny(name)));
}

TEST(Summary, CountsOnlyChosenExpertsAsActive) {
  const auto s = summarize(built("qwen3_moe"));
  const int64_t attention = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 2 * 32, norms = 2 * 64;
  const int64_t expert = 3 * 64 * 32, sparse = 8 * expert + 8 * 64, dense = 3 * 64 * 96;
  const int64_t rest = 2 * 128 * 64 + 64;
  // of four layers, with decoder_sparse_step 2 and layer 3 dense, layer 1 has experts
  EXPECT_EQ(s.parameters, rest + 4 * (attention + norms) + sparse + 3 * dense);
  EXPECT_EQ(s.active_parameters, s.parameters - 6 * expert);
  EXPECT_EQ(s.cache_values_per_token, 4 * 2 * 2 * 32);
  EXPECT_EQ(s.cache_values_fixed, 0);
}

TEST(Summary, LatentAttentionCachesLatentAndRotaryKey) {
  EXPECT_EQ(summarize(built("deepseek_v3")).cache_values_per_token, 3 * (64 + 16));
}

TEST(Summary, WindowsAndStatesAreFixed) {
  const auto gemma = summarize(built("gemma3_text"));  // layers 2 and 5 are global
  EXPECT_EQ(gemma.cache_values_per_token, 2 * 2 * 32);
  EXPECT_EQ(gemma.cache_values_fixed, 4 * 8 * 2 * 32);
  const auto delta = summarize(built("qwen3_next"));
  EXPECT_EQ(delta.cache_values_per_token, 2 * 2 * 2 * 32);
  EXPECT_EQ(delta.cache_values_fixed, 2 * (3 * (2 * 2 * 24 + 4 * 16) + 4 * 16 * 24));
  EXPECT_EQ(summarize(built("lfm2")).cache_values_fixed, 3 * 2 * 64);
  const auto hybrid = summarize(built("nemotron_h"));
  EXPECT_EQ(hybrid.cache_values_per_token, 2 * 2 * 32);
  EXPECT_EQ(hybrid.cache_values_fixed, 2 * (3 * (64 + 2 * 2 * 16) + 64 * 16));
}

TEST(Summary, AHeadThatCheckpointsLeaveOutIsNotCounted) {
  auto model = built("gemma3_text");
  const auto tied = summarize(model).parameters;
  model.tied_unless_stored = false;
  EXPECT_EQ(summarize(model).parameters - tied, 128 * 64);
}

struct Known {
  const char* config;
  int64_t parameters;
};

/** Released models: sizes as in their config.json, parameters as their publishers' index files count them. */
TEST(Summary, ReleasedModels) {
  const Known known[] = {
      {R"({"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
           "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "vocab_size": 49152, "tie_word_embeddings": true})",
       134515008},
      {R"({"model_type": "lfm2", "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8, "norm_eps": 1e-5,
           "block_dim": 1024, "block_ff_dim": 6656, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": true,
           "conv_L_cache": 3, "conv_bias": false, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "vocab_size": 65536})",
       354483968},
      {R"({"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 128256, "tie_word_embeddings": true})",
       1235814400},
      {R"({"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14,
           "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 151936, "tie_word_embeddings": true})",
       494032768},
      {R"({"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128,
           "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "vocab_size": 151936, "rope_theta": 1000000, "tie_word_embeddings": true})",
       596049920},
      {R"({"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144, "moe_intermediate_size": 768,
           "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "head_dim": 128, "num_key_value_heads": 4,
           "rms_norm_eps": 1e-6, "vocab_size": 151936, "rope_theta": 1000000, "tie_word_embeddings": false})",
       30532122624},
      {R"({"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048, "num_attention_heads": 4,
           "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144})",
       268098176},
      {R"({"model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "intermediate_size": 8192, "num_attention_heads": 24,
           "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 200064, "tie_word_embeddings": true})",
       3836021760},
      {R"({"model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008, "num_attention_heads": 16,
           "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 128256, "tie_word_embeddings": true})",
       3075098624},
      {R"({"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "intermediate_size": 18432, "moe_intermediate_size": 2048,
           "num_attention_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
           "first_k_dense_replace": 3, "vocab_size": 129280, "max_position_embeddings": 163840})",
       671026419200},
  };
  for (const auto& model : known) {
    EXPECT_EQ(summarize(arch::build(arch::Config(parse_json(model.config, "test")))).parameters, model.parameters) << model.config;
  }
}

TEST(Rope, ProportionalLeavesTheOthersStill) {
  const arch::Rope r{.dims = 8, .base = 100.f, .kind = arch::RopeKind::proportional, .factor = 2.f, .rotated_dims = 4};
  const auto f = rope_frequencies(r);
  ASSERT_EQ(f.size(), 4u);
  EXPECT_FLOAT_EQ(f[0], 0.5f);
  EXPECT_FLOAT_EQ(f[1], 0.5f / std::pow(100.f, 0.25f));
  EXPECT_EQ(f[2], 0.f);
  EXPECT_EQ(f[3], 0.f);
}

TEST(Rope, DynamicStretchesOnlyBeyondTheTrainedLength) {
  const arch::Rope r{.dims = 8, .base = 100.f, .kind = arch::RopeKind::dynamic_ntk, .factor = 2.f, .max_positions = 64};
  const arch::Rope plain{.dims = 8, .base = 100.f};
  EXPECT_EQ(rope_frequencies(r, 64), rope_frequencies(plain));
  EXPECT_LT(rope_frequencies(r, 65).back(), rope_frequencies(plain).back());
}

TEST(Rope, TransformersFiveSpellings) {
  json config = tiny("llama");
  const auto want = arch::build(arch::Config(config));
  config["rope_parameters"] = config["rope_scaling"];
  config["rope_parameters"]["rope_theta"] = config["rope_theta"];
  config.erase("rope_scaling");
  config.erase("rope_theta");
  const auto got = arch::build(arch::Config(config));
  const auto rope = [](const arch::Model& m) { return *std::get<arch::Attention>(m.layers[0][0].ops[0]).rope; };
  EXPECT_EQ(rope_frequencies(rope(got)), rope_frequencies(rope(want)));
}

TEST(Rope, GemmaNestsOneRotationForEachKindOfLayer) {
  json config = tiny("gemma3_text");
  const auto want = arch::build(arch::Config(config));
  for (const char* key : {"rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern"}) config.erase(key);
  config["rope_parameters"] = parse_json(R"({"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}})",
                                         "test");
  config["layer_types"] = {"sliding_attention", "sliding_attention", "full_attention",
                           "sliding_attention", "sliding_attention", "full_attention"};
  const arch::Config reader(config);
  const auto got = arch::build(reader);
  EXPECT_EQ(reader.unread_keys(), std::vector<std::string>{"unknown_knob"});
  for (int i = 0; i < 6; ++i) {
    const auto& a = std::get<arch::Attention>(got.layers[i][0].ops[0]);
    const auto& b = std::get<arch::Attention>(want.layers[i][0].ops[0]);
    EXPECT_EQ(a.window, b.window) << i;
    EXPECT_EQ(rope_frequencies(*a.rope), rope_frequencies(*b.rope)) << i;
  }
}

}  // namespace
}  // namespace mlxlm::plan
