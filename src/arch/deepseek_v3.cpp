// DeepSeek V3 and R1, Kimi K2: absorbed latent attention, grouped sigmoid routing. Reference: mlx_lm/models/deepseek_v3.py
#include <cmath>

#include "arch/families.h"
#include "base/error.h"

namespace mlxlm::arch {
namespace {

const json& defaults() {
  static const json values = {
      {"vocab_size", 102400},    {"hidden_size", 4096},       {"intermediate_size", 11008}, {"moe_intermediate_size", 1407},
      {"num_hidden_layers", 30}, {"num_attention_heads", 32}, {"kv_lora_rank", 512},        {"q_lora_rank", 1536},
      {"qk_rope_head_dim", 64},  {"v_head_dim", 128},         {"qk_nope_head_dim", 128},    {"max_position_embeddings", 2048},
      {"rms_norm_eps", 1e-6}};
  return values;
}

Mla attention(const Config& c) {
  Mla a{.heads = c.positive("num_attention_heads"),
        .q_lora = c.has("q_lora_rank") ? c.positive("q_lora_rank") : 0,  // null = none
        .kv_lora = c.positive("kv_lora_rank"),
        .nope_dim = c.positive("qk_nope_head_dim"),
        .rope_dim = c.positive("qk_rope_head_dim"),
        .v_dim = c.positive("v_head_dim"),
        .bias = c.flag("attention_bias", false),
        .norm_eps = 1e-6f};
  a.scale = 1.f / std::sqrt(float(a.nope_dim) + float(a.rope_dim));
  a.rope = rope(c, a.rope_dim, true);
  const Config scaling = rope_scaling(c);
  const float all_dim = scaling.real("mscale_all_dim", 0.f), factor = scaling.real("factor", 1.f);
  if (all_dim != 0.f && factor > 1.f) {
    const float s = 0.1f * all_dim * std::log(factor) + 1.f;
    a.scale *= s * s;
  }
  return a;
}

Moe experts(const Config& c) {
  if (const auto method = c.text("topk_method", "noaux_tc"); method != "noaux_tc") {
    throw Error(Code::unsupported, c.where(), "topk_method: got '" + method + "', wanted noaux_tc");
  }
  Moe f{.experts = c.positive("n_routed_experts"),
        .top_k = c.positive("num_experts_per_tok", 1),
        .hidden = c.positive("moe_intermediate_size"),
        .route = Route::sigmoid,
        .correction_bias = true,
        .router_is_parameter = true,
        .renormalize = c.flag("norm_topk_prob", true),
        .scale = c.real("routed_scaling_factor", 1.f),
        .groups = c.positive("n_group", 1),
        .groups_kept = c.positive("topk_group", 1)};
  const int shared = c.has("n_shared_experts") ? c.positive("n_shared_experts") : 0;
  if (shared > 1024) c.fail("n_shared_experts", "got " + std::to_string(shared) + ", wanted at most 1024");
  if (f.hidden > max_hidden) c.fail("moe_intermediate_size", "got " + std::to_string(f.hidden) + ", out of range");
  f.shared_hidden = f.hidden * shared;
  return f;
}

}  // namespace

Model deepseek_v3(const Config& written) {
  const Config c = with_defaults(written, defaults(), /*keep_null=*/true);
  Model m = decoder(c);
  silu_only(c);
  const int layers = layer_count(c);
  const int dense_first = c.integer("first_k_dense_replace", 0), every = c.positive("moe_layer_freq", 1);
  for (int i = 0; i < layers; ++i) {
    const bool sparse = c.has("n_routed_experts") && i >= dense_first && i % every == 0;
    Op f = sparse ? Op{experts(c)} : Op{Glu{.hidden = c.positive("intermediate_size")}};
    m.layers.push_back({pre_norm(rms(c, "input_layernorm"), attention(c)), pre_norm(rms(c, "post_attention_layernorm"), std::move(f))});
  }
  // Layers past the last one predict further tokens; they are not used.
  const int unused = c.integer("num_nextn_predict_layers", 1);
  if (unused < 0 || unused > max_layers) c.fail("num_nextn_predict_layers", "got " + std::to_string(unused) + ", out of range");
  for (int extra = 0; extra < unused; ++extra) {
    m.rules.push_back({Rule::drop, "model.layers." + std::to_string(layers + extra) + ".*"});
  }
  m.rules.insert(m.rules.end(), {{Rule::dequant_blocks, "*.weight"},
                                 {Rule::stack, "*.mlp.experts.{e}.*", "*.mlp.switch_mlp.*"},
                                 {Rule::absorb_mla, "*.kv_b_proj.*"}});
  m.keep_f32 = {"e_score_correction_bias"};
  c.ignore({"scoring_func", "num_key_value_heads", "tie_word_embeddings", "ep_size", "aux_loss_alpha", "seq_aux"});
  return m;
}

}  // namespace mlxlm::arch
