// Qwen 2, 2.5, 3 and 3 MoE. Reference: mlx_lm/models/qwen2.py, qwen3.py, qwen3_moe.py
#include <algorithm>

#include "arch/families.h"

namespace mlxlm::arch {
namespace {

Attention qwen3_attention(const Config& c) {
  if (!c.has("rope_theta") && !c.sub("rope_parameters").has("rope_theta")) c.fail("rope_theta", "missing, wanted a number");
  c.positive("head_dim");  // required: transformers' default is not width / heads
  Attention a = gqa(c);
  a.qkv_bias = a.out_bias = c.flag("attention_bias", false);
  a.q_norm = rms(c, "q_norm");
  a.k_norm = rms(c, "k_norm");
  return a;
}

}  // namespace

Model qwen2(const Config& c) {
  Model m = decoder(c);
  silu_only(c);
  tie_head(c, m, true);
  const int layers = layer_count(c);
  for (int i = 0; i < layers; ++i) {
    Attention a = gqa(c, 1e6f);
    a.qkv_bias = true;
    const Glu f{.hidden = c.positive("intermediate_size")};
    m.layers.push_back({pre_norm(rms(c, "input_layernorm"), a), pre_norm(rms(c, "post_attention_layernorm"), f)});
  }
  c.ignore({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"});
  return m;
}

Model qwen3(const Config& c) {
  Model m = decoder(c);
  silu_only(c);
  tie_head(c, m, false);
  const int layers = layer_count(c);
  for (int i = 0; i < layers; ++i) {
    const Glu f{.hidden = c.positive("intermediate_size")};
    m.layers.push_back({pre_norm(rms(c, "input_layernorm"), qwen3_attention(c)), pre_norm(rms(c, "post_attention_layernorm"), f)});
  }
  c.ignore({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"});
  return m;
}

Model qwen3_moe(const Config& c) {
  const auto dense = c.integers("mlp_only_layers");
  const int every = c.positive("decoder_sparse_step", 1);
  const int experts = c.integer("num_experts");
  Model m = decoder(c);
  silu_only(c);
  tie_head(c, m, false);
  const int layers = layer_count(c);
  for (int i = 0; i < layers; ++i) {
    const bool sparse = std::ranges::find(dense, i) == dense.end() && experts > 0 && (i + 1) % every == 0;
    Op f = Glu{.hidden = c.positive("intermediate_size")};
    if (sparse) {
      f = Moe{.experts = experts,
              .top_k = c.positive("num_experts_per_tok"),
              .hidden = c.positive("moe_intermediate_size"),
              .renormalize = c.flag("norm_topk_prob", false)};
    }
    m.layers.push_back(
        {pre_norm(rms(c, "input_layernorm"), qwen3_attention(c)), pre_norm(rms(c, "post_attention_layernorm"), std::move(f))});
  }
  m.rules.push_back({Rule::stack, "*.mlp.experts.{e}.*", "*.mlp.switch_mlp.*"});
  m.quant.push_back({.path_suffix = "mlp.gate", .bits = 8, .group_size = 64});
  c.ignore({"use_sliding_window", "sliding_window", "max_window_layers", "output_router_logits", "router_aux_loss_coef"});
  return m;
}

}  // namespace mlxlm::arch
