// Llama 4: chunked attention with rotation in three layers of four, experts that see weighed inputs; and the small text models of the same
// family. Reference: mlx_lm/models/llama4.py, llama4_text.py
#include "arch/families.h"

namespace mlxlm::arch {
namespace {

/** Of length 1 after the rotation in the reference, which does not change it. */
Norm unit(float eps) {
  return Norm{.eps = eps, .weightless = true};
}

Attention attention(const Config& c, int layer) {
  Attention a = gqa(c);
  a.qkv_bias = a.out_bias = c.flag("attention_bias", false);
  const bool normed = c.flag("use_qk_norm", false);
  const int chunk = c.positive("attention_chunk_size");
  const bool tempered = c.integer("attn_temperature_tuning", 4) != 0;
  const float temperature = c.real("attn_scale", 0.1f);
  const int temperature_tokens = c.positive("floor_scale", 8192);
  if ((layer + 1) % 4 != 0) {
    a.rope = rope(c, a.head_dim, /*traditional=*/true);
    a.chunk = chunk;
    if (normed) a.q_norm = a.k_norm = unit(1e-6f);
    return a;
  }
  a.rope.reset();
  a.temperature = tempered ? temperature : 0.f;
  a.temperature_tokens = temperature_tokens;
  return a;
}

Moe experts(const Config& c) {
  if (const int k = c.positive("num_experts_per_tok", 1); k != 1) {
    c.fail("num_experts_per_tok", "got " + std::to_string(k) + ", wanted 1: inputs are weighed by their only expert");
  }
  return Moe{.at = "feed_forward",
             .router = "router",
             .experts_at = "experts",
             .experts = c.positive("num_local_experts"),
             .top_k = 1,
             .hidden = c.positive("intermediate_size"),
             .route = Route::sigmoid,
             .renormalize = false,
             .weigh_input = true,
             .shared_at = "shared_expert",
             .shared_hidden = c.positive("intermediate_size")};
}

Model text_model(const Config& c) {
  silu_only(c);
  Model m = decoder(c);
  const int layers = layer_count(c), every = c.positive("interleave_moe_layer_step", 1);
  const Glu dense{.at = "feed_forward", .hidden = c.positive("intermediate_size_mlp")};
  for (int i = 0; i < layers; ++i) {
    Op feed_forward = i % every == every - 1 ? Op{experts(c)} : Op{dense};
    m.layers.push_back(
        {pre_norm(rms(c, "input_layernorm"), attention(c, i)), pre_norm(rms(c, "post_attention_layernorm"), std::move(feed_forward))});
  }
  c.ignore({"moe_layers", "no_rope_layers", "no_rope_layer_interval", "layer_types", "rope_traditional", "attention_dropout",
            "tie_word_embeddings", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "for_llm_compression"});
  return m;
}

}  // namespace

Model llama4(const Config& c) {
  Model m = text_model(c.sub("text_config"));
  m.root = "language_model.model";
  m.head = "language_model.lm_head";
  m.rules.insert(m.rules.begin(),
                 {{Rule::drop, "*vision_model*"},
                  {Rule::drop, "*multi_modal_projector*"},
                  {Rule::swap_axes, "*.feed_forward.experts.gate_up_proj", "*.feed_forward.experts.gate_up_proj.rows"},
                  {Rule::split_gate_up, "*.feed_forward.experts.gate_up_proj.rows", "*.feed_forward.experts.{part}.weight"},
                  {Rule::swap_axes, "*.feed_forward.experts.down_proj", "*.feed_forward.experts.down_proj.weight"}});
  c.ignore({"tie_word_embeddings", "vision_config", "boi_token_index", "eoi_token_index", "image_token_index"});
  return m;
}

Model llama4_text(const Config& c) {
  silu_only(c);
  Model m = decoder(c);
  m.head = "output";
  tie_head(c, m, false);
  const int layers = layer_count(c);
  const auto rotates = c.integers("no_rope_layers");  // 1 = rotates
  if (static_cast<int>(rotates.size()) != layers) {
    c.fail("no_rope_layers", "got " + std::to_string(rotates.size()) + " layers, wanted " + std::to_string(layers));
  }
  const Glu f{.at = "feed_forward", .hidden = c.positive("intermediate_size_mlp")};
  for (int i = 0; i < layers; ++i) {
    Attention a = gqa(c);
    if (c.flag("use_qk_norm", false)) a.q_norm = a.k_norm = unit(rms(c, "").eps);
    a.rope = Rope{.dims = a.head_dim, .base = c.real("rope_theta"), .traditional = true};
    if (rotates[i] == 0) a.rope.reset();
    m.layers.push_back({pre_norm(rms(c, "input_layernorm"), a), pre_norm(rms(c, "post_attention_layernorm"), f)});
  }
  c.ignore({"intermediate_size", "attention_chunk_size", "attention_bias", "rope_scaling", "rope_traditional", "layer_types",
            "attn_temperature_tuning", "attn_scale", "floor_scale", "interleave_moe_layer_step", "num_local_experts", "num_experts_per_tok",
            "moe_layers", "no_rope_layer_interval", "attention_dropout", "output_router_logits", "router_aux_loss_coef",
            "router_jitter_noise", "for_llm_compression"});
  return m;
}

}  // namespace mlxlm::arch
