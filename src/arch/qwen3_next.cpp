// Qwen3-Next and Qwen3.5: gated delta nets, gated attention in every fourth layer, experts. Reference: mlx_lm/models/qwen3_next.py,
// qwen3_5.py
#include <algorithm>

#include "arch/families.h"

namespace mlxlm::arch {
namespace {

GatedDelta delta_net(const Config& c, bool split) {
  return {.key_heads = c.positive("linear_num_key_heads"),
          .value_heads = c.positive("linear_num_value_heads"),
          .key_dim = c.positive("linear_key_head_dim"),
          .value_dim = c.positive("linear_value_head_dim"),
          .conv = c.positive("linear_conv_kernel_dim"),
          .split = split,
          .norm_eps = rms(c, "norm").eps};
}

Attention gated_attention(const Config& c) {
  Attention a = gqa(c);
  a.rope = rope(c, part_of(c, "partial_rotary_factor", a.head_dim));
  a.qkv_bias = a.out_bias = c.flag("attention_bias", false);
  a.gated = true;
  a.q_norm = rms(c, "q_norm");
  a.k_norm = rms(c, "k_norm");
  return a;
}

Moe experts(const Config& c, bool renormalize) {
  return {.experts = c.positive("num_experts"),
          .top_k = c.positive("num_experts_per_tok"),
          .hidden = c.positive("moe_intermediate_size"),
          .renormalize = c.flag("norm_topk_prob", renormalize),
          .shared_at = "shared_expert",
          .shared_hidden = c.positive("shared_expert_intermediate_size"),
          .shared_gate = "shared_expert_gate"};
}

void add_layer(const Config& c, Model& m, bool attends, bool split, Op feed_forward) {
  Op mixer = attends ? Op{gated_attention(c)} : Op{delta_net(c, split)};
  m.layers.push_back(
      {pre_norm(rms(c, "input_layernorm"), std::move(mixer)), pre_norm(rms(c, "post_attention_layernorm"), std::move(feed_forward))});
}

/** Published weights of these norms are those of mlx_lm minus one; `sign` as in Rule::add_one. */
void shift_norms(Model& m, const char* sign) {
  for (const char* norm :
       {"*.input_layernorm.weight", "*.post_attention_layernorm.weight", "*model.norm.weight", "*.q_norm.weight", "*.k_norm.weight"}) {
    m.rules.push_back({Rule::add_one, norm, sign});
  }
}

void quantize_routers(Model& m) {
  for (const char* path : {"mlp.gate", "shared_expert_gate"}) m.quant.push_back({.path_suffix = path, .bits = 8, .group_size = 64});
}

void ignore_usual(const Config& c) {
  c.ignore({"layer_types", "output_router_logits", "router_aux_loss_coef", "mlp_only_layers", "decoder_sparse_step", "use_sliding_window",
            "sliding_window", "max_window_layers", "attn_output_gate", "mamba_ssm_dtype", "mtp_num_hidden_layers",
            "mtp_use_dedicated_embeddings", "mtp_num_layers"});
}

/** rope_parameters rule, as in the reference, unless they are there and empty. */
Config with_rope(const Config& c) {
  json filled = c.object();
  json p = filled.contains("rope_parameters") ? filled["rope_parameters"] : json{{"rope_theta", 100000}};
  if (p.is_null()) p = json::object();
  if (!p.is_object()) c.sub("rope_parameters");  // throws
  if (!p.empty()) {
    filled["rope_theta"] = p.value("rope_theta", json(100000));
    filled["partial_rotary_factor"] = p.value("partial_rotary_factor", json(0.25));
    filled.erase("rope_scaling");
    c.sub("rope_parameters").ignore({"partial_rotary_factor", "mrope_section", "mrope_interleaved"});
  }
  return with_defaults(c.with_object(std::move(filled)), {{"rope_theta", 100000}, {"partial_rotary_factor", 0.25}});
}

Model text_model(const Config& written) {
  static const json defaults = {
      {"hidden_size", 4096},          {"intermediate_size", 14336}, {"num_hidden_layers", 32},    {"num_attention_heads", 32},
      {"rms_norm_eps", 1e-6},         {"vocab_size", 151936},       {"num_key_value_heads", 8},   {"max_position_embeddings", 131072},
      {"linear_num_value_heads", 64}, {"linear_num_key_heads", 16}, {"linear_key_head_dim", 192}, {"linear_value_head_dim", 128},
      {"linear_conv_kernel_dim", 4}};
  const Config c = with_rope(with_defaults(written, defaults));
  Model m = decoder(c);
  m.root = "language_model.model";
  m.head = "language_model.lm_head";
  m.rules.insert(m.rules.end(), {{Rule::drop, "vision_tower*"},
                                 {Rule::drop, "model.visual*"},
                                 {Rule::drop, "*mtp.*"},
                                 {Rule::rename, "model.language_model.*", "language_model.model.*"},
                                 {Rule::rename, "model.*", "language_model.model.*"},
                                 {Rule::rename, "lm_head.*", "language_model.lm_head.*"},
                                 {Rule::split_gate_up, "*.mlp.experts.gate_up_proj", "*.mlp.switch_mlp.{part}.weight"},
                                 {Rule::rename, "*.mlp.experts.down_proj", "*.mlp.switch_mlp.down_proj.weight"}});
  silu_only(c);
  tie_head(c, m, false);
  const int layers = layer_count(c), every = c.positive("full_attention_interval", 4);
  const bool sparse = c.integer("num_experts", 0) > 0;
  for (int i = 0; i < layers; ++i) {
    Op f = Glu{.hidden = c.positive("intermediate_size")};
    if (sparse) f = experts(c, true);
    add_layer(c, m, (i + 1) % every == 0, /*split=*/true, std::move(f));
  }
  shift_norms(m, "*conv1d.weight");
  m.rules.push_back({Rule::conv_ncl_to_nlc, "*.conv1d.weight"});
  if (sparse) quantize_routers(m);
  m.keep_f32 = {"A_log"};
  c.ignore({"rope_scaling", "rope_theta", "partial_rotary_factor"});
  ignore_usual(c);
  return m;
}

}  // namespace

Model qwen3_next(const Config& c) {
  const auto dense = c.integers("mlp_only_layers");
  const int sparse_step = c.positive("decoder_sparse_step", 1), count = c.integer("num_experts");
  Model m = decoder(c);
  silu_only(c);
  tie_head(c, m, false);
  c.positive("head_dim");  // required: transformers' default is not width / heads
  const int layers = layer_count(c), every = c.positive("full_attention_interval", 4);
  for (int i = 0; i < layers; ++i) {
    const bool sparse = std::ranges::find(dense, i) == dense.end() && count > 0 && (i + 1) % sparse_step == 0;
    Op f = Glu{.hidden = c.positive("intermediate_size")};
    if (sparse) f = experts(c, false);
    add_layer(c, m, (i + 1) % every == 0, /*split=*/false, std::move(f));
  }
  m.rules.push_back({Rule::drop, "*mtp.*"});
  shift_norms(m, "*.mlp.experts.{e}.up_proj.weight");
  m.rules.insert(m.rules.end(), {{Rule::stack, "*.mlp.experts.{e}.*", "*.mlp.switch_mlp.*"}, {Rule::conv_ncl_to_nlc, "*.conv1d.weight"}});
  quantize_routers(m);
  ignore_usual(c);
  return m;
}

Model qwen3_5(const Config& c) {
  if (!c.has("text_config")) return text_model(c);
  c.ignore({"vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings",
            "language_model_only"});
  return text_model(c.sub("text_config"));
}

}  // namespace mlxlm::arch
