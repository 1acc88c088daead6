// Broken and hostile configs end in one clear error, quickly.
#include <gtest/gtest.h>

#include "arch/registry.h"
#include "base/error.h"

namespace mlxlm::arch {
namespace {

json llama() {
  return json::parse(R"({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5})");
}

json deepseek() {
  return json::parse(R"({"model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 128,
    "num_attention_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "kv_lora_rank": 64})");
}

json nemotron() {
  return json::parse(R"({"model_type": "nemotron_h", "hidden_size": 64, "hybrid_override_pattern": "M*-", "intermediate_size": 96,
    "vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16,
    "conv_kernel": 4, "n_groups": 2, "layer_norm_epsilon": 1e-5})");
}

json lfm2() {
  return json::parse(R"({"model_type": "lfm2", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "norm_eps": 1e-5, "conv_bias": false, "conv_L_cache": 3, "block_ff_dim": 96, "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": true, "full_attn_idxs": [1]})");
}

json qwen3_next() {
  return json::parse(R"({"model_type": "qwen3_next", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "partial_rotary_factor": 0.25, "rope_theta": 1e7, "rms_norm_eps": 1e-6,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "full_attention_interval": 2})");
}

json falcon_h1() {
  return json::parse(R"({"model_type": "falcon_h1", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "mamba_d_conv": 4, "mamba_d_head": 16, "mamba_d_ssm": 64,
    "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_n_heads": 4, "rms_norm_eps": 1e-5, "mlp_multipliers": [0.5, 2.0],
    "ssm_multipliers": [1, 1, 1, 1, 1], "embedding_multiplier": 2.0})");
}

json llama4() {
  return json::parse(R"({"model_type": "llama4", "text_config": {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 128,
    "intermediate_size": 32, "intermediate_size_mlp": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "attention_chunk_size": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "floor_scale": 8}})");
}

json llama4_text() {
  json config = llama4()["text_config"];
  config["model_type"] = "llama4_text";
  config["no_rope_layers"] = {1, 1, 1, 0};
  return config;
}

/** `config` with a key of text_config set. */
json with_text(json config, const char* key, const json& value) {
  config["text_config"][key] = value;
  return config["text_config"];
}

json qwen3_5() {
  json config = qwen3_next();
  config["model_type"] = "qwen3_5";
  config["rope_parameters"] = {{"rope_theta", 1e6}, {"partial_rotary_factor", 0.5}};
  return config;
}

struct Case {
  json config;
  std::string key;
  json value;           // null removes the key
  std::string message;  // a part of it
  Code code = Code::bad_config;
};

void expect_error(const Case& t) {
  json config = t.config;
  if (t.value.is_null())
    config.erase(t.key);
  else
    config[t.key] = t.value;
  const std::string what = t.key + " = " + to_text(t.value);
  try {
    build(Config(config));
    ADD_FAILURE() << what << ": built";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), t.code) << what << ": " << e.what();
    EXPECT_NE(std::string(e.what()).find(t.message), std::string::npos) << what << ": " << e.what();
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << what;
  }
}

TEST(BadConfig, TheBasesAreFine) {
  for (const auto& config : {llama(), deepseek(), nemotron(), lfm2(), qwen3_next(), qwen3_5(), falcon_h1(), llama4(), llama4_text()})
    EXPECT_FALSE(build(Config(config)).layers.empty());
}

TEST(BadConfig, MissingKeys) {
  for (const char* key : {"hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads"}) {
    expect_error({llama(), key, nullptr, std::string("config.json: ") + key + ": missing, wanted an integer"});
  }
  expect_error({llama(), "rms_norm_eps", nullptr, "rms_norm_eps: missing, wanted a number"});
  expect_error({llama(), "model_type", nullptr, "model_type: missing"});
}

TEST(BadConfig, WrongTypes) {
  expect_error({llama(), "hidden_size", "64", "hidden_size: got \"64\", wanted an integer"});
  expect_error({llama(), "hidden_size", 64.5, "hidden_size: got 64.5, wanted an integer"});
  expect_error({llama(), "hidden_size", json::array({64}), "hidden_size: got a list of 1, wanted an integer"});
  expect_error({llama(), "attention_bias", 1, "attention_bias: got 1, wanted true or false"});
  expect_error({llama(), "rope_scaling", "linear", "rope_scaling: got \"linear\", wanted an object"});
  expect_error({llama(), "layer_types", json::array({1, 2}), "layer_types: got 1 in the list, wanted a string"});
  expect_error({llama(), "model_type", 3, "model_type: got 3, wanted a string"});
  expect_error({llama(), "rms_norm_eps", json::parse(R"({"__float__": "Infinity"})"), "wanted a finite number"});
}

TEST(BadConfig, AbsurdSizes) {
  expect_error({llama(), "num_hidden_layers", 1000000000, "num_hidden_layers: got 1000000000, wanted at most 4096"});
  expect_error({llama(), "num_hidden_layers", 0, "num_hidden_layers: got 0, wanted at least 1"});
  expect_error({llama(), "hidden_size", -64, "hidden_size: got -64, wanted at least 1"});
  expect_error({llama(), "hidden_size", 9223372036854775807LL, "wanted an integer of 32 bits"});
  expect_error({llama(), "hidden_size", 18446744073709551615ULL, "wanted an integer of 32 bits"});
  expect_error({llama(), "hidden_size", 1e300, "wanted an integer of 32 bits"});
  expect_error({llama(), "hidden_size", 2147483647, "hidden_size: got 2147483647, wanted 1 to"});
  expect_error({llama(), "vocab_size", 2147483647, "vocab_size: got 2147483647, wanted 1 to"});
  expect_error({llama(), "intermediate_size", 2147483647, "intermediate_size: got 2147483647, wanted 1 to"});
  expect_error({llama(), "num_attention_heads", 2147483647, "num_attention_heads: got 2147483647, wanted 1 to"});
  expect_error({llama(), "head_dim", 2147483646, "head_dim: got 2147483646, wanted 1 to"});
  expect_error({llama(), "num_attention_heads", 128, "head_dim: got 0"});  // wider than the model, no head_dim
  expect_error({deepseek(), "n_shared_experts", 2000000000, "n_shared_experts: got 2000000000"});
  expect_error({deepseek(), "num_nextn_predict_layers", 2000000000, "num_nextn_predict_layers: got 2000000000"});
  expect_error({deepseek(), "kv_lora_rank", 2000000000, "kv_lora_rank: got 2000000000"});
  expect_error({nemotron(), "mamba_num_heads", 2000000000, "mamba_num_heads"});
  expect_error({nemotron(), "ssm_state_size", 2000000000, "ssm_state_size: got 2000000000"});
  expect_error({nemotron(), "conv_kernel", 2000000000, "conv_kernel: got 2000000000"});
  expect_error({nemotron(), "hybrid_override_pattern", std::string(100000, 'M'), "hybrid_override_pattern: got 100000 layers"});
}

TEST(BadConfig, TooManyParametersTogether) {
  json config = deepseek();
  config["hidden_size"] = 1 << 20;
  config["moe_intermediate_size"] = 1 << 20;
  expect_error({config, "n_routed_experts", 1 << 16, "more than 10^15 parameters"});
}

TEST(BadConfig, Contradictions) {
  expect_error({llama(), "num_key_value_heads", 3, "num_key_value_heads: got 3, wanted a divisor of 4 heads"});
  expect_error({llama(), "head_dim", 15, "got 15 rotated of 15, wanted an even part"});
  expect_error({llama(), "layer_types", json::array({"full_attention"}), "layer_types: got 1 entries, wanted one for each of 2 layers"});
  expect_error({llama(), "layer_types", json::array({"full_attention", "sliding_attention"}), "sliding_window: missing"});
  expect_error({llama(), "layer_types", json::array({"full_attention", "chunked_attention"}), "got 'chunked_attention'"});
  expect_error({deepseek(), "num_experts_per_tok", 9, "num_experts_per_tok: got 9, wanted 1 to 8 experts"});
  expect_error({deepseek(), "n_group", 3, "n_group: got 3"});
  expect_error({deepseek(), "n_group", 8, "n_group: got 8"});
  expect_error({deepseek(), "topk_group", 5, "topk_group: got 5 of 4 groups"});
  expect_error({deepseek(), "qk_rope_head_dim", 15, "got 15 rotated of 15"});
  expect_error({nemotron(), "hybrid_override_pattern", "MX", "got 'X', wanted M, *, - or E"});
  expect_error({nemotron(), "hybrid_override_pattern", nullptr, "hybrid_override_pattern: got 0 layers"});
  expect_error({nemotron(), "n_groups", 3, "n_groups: got 3, wanted a divisor of 4 heads"});
  expect_error({nemotron(), "time_step_limit", json::array({0.5, 0.1}), "time_step_limit"});
  expect_error({qwen3_next(), "linear_num_value_heads", 3, "linear_num_value_heads: got 3, wanted a multiple of 2 key heads"});
  expect_error({qwen3_next(), "linear_conv_kernel_dim", 1, "linear_conv_kernel_dim: got 1, wanted 2 to 1024"});
  expect_error({qwen3_next(), "linear_key_head_dim", 2000000000, "linear_key_head_dim: got 2000000000"});
  expect_error({qwen3_next(), "partial_rotary_factor", 0.1, "head_dim: got 3 rotated of 32"});
  expect_error({qwen3_next(), "head_dim", nullptr, "head_dim: missing"});
  expect_error({qwen3_5(), "rope_parameters", 3, "rope_parameters"});
  expect_error({falcon_h1(), "mamba_d_ssm", 32, "mamba_d_ssm: got 32, wanted mamba_n_heads of mamba_d_head, 64"});
  expect_error({falcon_h1(), "mlp_multipliers", json::array({1.0}), "mlp_multipliers: got 1 numbers, wanted 2"});
  expect_error({falcon_h1(), "ssm_multipliers", json::array({1.0}), "ssm_multipliers: got 1 numbers, wanted 5"});
  expect_error({falcon_h1(), "embedding_multiplier", 0, "embedding_multiplier: wanted a positive number"});
  expect_error({falcon_h1(), "mamba_n_heads", 1 << 30, "mamba_n_heads"});
  expect_error({llama4(), "text_config", with_text(llama4(), "attention_chunk_size", 0), "attention_chunk_size: got 0"});
  expect_error({llama4(), "text_config", with_text(llama4(), "floor_scale", 0), "floor_scale: got 0"});
  expect_error({llama4(), "text_config", with_text(llama4(), "num_experts_per_tok", 2), "num_experts_per_tok: got 2, wanted 1"});
  expect_error({llama4(), "text_config", nullptr, "missing"});
  expect_error({llama4_text(), "no_rope_layers", json::array({1}), "no_rope_layers: got 1 layers, wanted 4"});
  expect_error({lfm2(), "conv_L_cache", 1, "conv_L_cache: got 1, wanted 2 to 1024"});
  expect_error({lfm2(), "full_attn_idxs", json::array({2}), "full_attn_idxs: got 2 of 2 layers"});
  expect_error({lfm2(), "full_attn_idxs", nullptr, "layer_types: got 0 entries"});
  expect_error({lfm2(), "block_dim", 128, "block_dim: got 128, wanted hidden_size, 64"});
  expect_error({lfm2(), "block_ff_dim", 2000000000, "block_ff_dim"});
  expect_error({lfm2(), "block_multiple_of", 2000000000, "block_multiple_of"});
  expect_error({lfm2(), "block_ffn_dim_multiplier", 1e30, "block_ffn_dim_multiplier"});
}

TEST(BadConfig, Rope) {
  const auto scaling = [](const char* text) { return json::parse(text); };
  expect_error({llama(), "rope_theta", 0, "rope_theta: got 0.000000, wanted a number above 1"});
  expect_error({llama(), "rope_scaling", scaling(R"({"type": "linear"})"), "rope_scaling.factor: missing, wanted a number"});
  expect_error({llama(), "rope_scaling", scaling(R"({"type": "linear", "factor": 0})"), "rope_scaling.factor"});
  expect_error({llama(), "rope_scaling", scaling(R"({"type": "linear", "factor": -4})"), "rope_scaling.factor"});
  expect_error({llama(), "rope_scaling", scaling(R"({"rope_type": "swirl"})"), "got type 'swirl', wanted default,", Code::unsupported});
  expect_error({llama(), "rope_scaling", scaling(R"({"rope_type": "longrope", "long_factor": [1, 2]})"), "got 2 factors, wanted 8"});
  expect_error({llama(), "rope_scaling", scaling(R"({"rope_type": "dynamic", "factor": 2})"), "max_position_embeddings: missing"});
  expect_error({llama(), "rope_scaling", scaling(R"({"rope_type": "proportional", "partial_rotary_factor": 2})"), "partial_rotary_factor"});
  expect_error({llama(), "rope_scaling", scaling(R"({"rope_type": "mrope", "mrope_section": [1, 2]})"), "mrope_section"});
}

TEST(BadConfig, UnsupportedModels) {
  expect_error(
      {llama(), "model_type", "lama", "config.json: model_type: got 'lama', no such architecture; nearest: llama", Code::unsupported});
  expect_error({llama(), "model_type", std::string(100000, 'x'), "known: deepseek_v3, ", Code::unsupported});
  expect_error({llama(), "model_file", "model.py", "model_file", Code::unsupported});
  expect_error({llama(), "hidden_act", "gelu", "hidden_act: got 'gelu', wanted silu", Code::unsupported});
  expect_error({deepseek(), "topk_method", "greedy", "topk_method: got 'greedy', wanted noaux_tc", Code::unsupported});
}

TEST(BadConfig, NotAnObject) {
  EXPECT_THROW(Config(json::array()), Error);
  EXPECT_THROW(Config(json(3)), Error);
  EXPECT_THROW(build(Config(json::object())), Error);
}

/** Every key of every base with every odd value: an Error or a model, never anything else. */
TEST(BadConfig, AnyValueAnywhere) {
  const json odd[] = {nullptr,
                      true,
                      -1,
                      0,
                      1,
                      3,
                      1e9,
                      1e300,
                      -1e300,
                      "",
                      "x",
                      json::array(),
                      json::array({1}),
                      json::object(),
                      json::array({nullptr}),
                      json::parse(R"({"__float__": "NaN"})"),
                      2147483647,
                      -2147483648LL,
                      9223372036854775807LL};
  for (json base : {llama(), deepseek(), nemotron(), lfm2(), qwen3_next(), qwen3_5(), falcon_h1(), llama4(), llama4_text()}) {
    for (const char* key : {"rope_scaling", "rope_parameters", "layer_types", "q_lora_rank", "rope_theta", "head_dim", "sliding_window",
                            "moe_latent_size", "time_step_limit", "max_position_embeddings", "norm_topk_prob", "layers_block_type"}) {
      if (!base.contains(key)) base[key] = nullptr;
    }
    for (const auto& [key, unused] : base.items()) {
      for (const auto& value : odd) {
        json config = base;
        config[key] = value;
        try {
          const Config reader(config);
          build(reader);
          reader.unread_keys();
        } catch (const Error&) {
        }
      }
    }
  }
}

}  // namespace
}  // namespace mlxlm::arch
