// Nemotron-H: one op a layer, by a pattern (M mamba, * attention, - mlp, E experts). Reference: mlx_lm/models/nemotron_h.py
#include <algorithm>
#include <map>

#include "arch/families.h"
#include "base/error.h"

namespace mlxlm::arch {
namespace {

constexpr const char* eps_key = "layer_norm_epsilon";

Mamba2 mamba(const Config& c) {
  Mamba2 op{.heads = c.positive("mamba_num_heads"),
            .head_dim = c.positive("mamba_head_dim"),
            .state = c.positive("ssm_state_size"),
            .groups = c.positive("n_groups"),
            .conv = c.positive("conv_kernel"),
            .conv_bias = c.flag("use_conv_bias", true),
            .in_bias = c.flag("mamba_proj_bias", false),
            .norm_eps = c.real(eps_key)};
  if (op.heads > max_heads || op.head_dim > max_head_dim) c.fail("mamba_num_heads", "out of range, and mamba_head_dim");
  op.out_bias = op.in_bias;
  op.norm_group = op.heads * op.head_dim / op.groups;
  if (const auto limit = c.reals("time_step_limit"); !limit.empty()) {
    if (limit.size() != 2 || limit[0] > limit[1]) c.fail("time_step_limit", "wanted the lowest and the highest step");
    op.dt_min = limit[0];
    op.dt_max = std::min(limit[1], op.dt_max);
  }
  return op;
}

Attention attention(const Config& c) {
  Attention a = gqa(c);
  a.at = "mixer";
  a.rope.reset();  // no positional encoding
  a.qkv_bias = a.out_bias = c.flag("attention_bias", false);
  return a;
}

Moe experts(const Config& c) {
  Moe f{.at = "mixer",
        .gate = "",
        .up = "fc1",
        .down = "fc2",
        .experts = c.positive("n_routed_experts"),
        .top_k = c.positive("num_experts_per_tok"),
        .hidden = c.positive("moe_intermediate_size"),
        .route = Route::sigmoid,
        .correction_bias = true,
        .router_is_parameter = true,
        .renormalize = c.flag("norm_topk_prob", false),
        .renormalize_eps = 1e-20f,
        .gated = false,
        .act = Act::relu2,
        .scale = c.real("routed_scaling_factor", 1.f),
        .groups = c.positive("n_group", 1),
        .groups_kept = c.positive("topk_group", 1),
        .latent = c.has("moe_latent_size") ? c.positive("moe_latent_size") : 0,
        .shared_gated = false,
        .bias = c.flag("mlp_bias", false)};
  if (c.has("n_shared_experts")) {
    const bool own = c.has("moe_shared_expert_intermediate_size");
    f.shared_hidden = c.positive(own ? "moe_shared_expert_intermediate_size" : "intermediate_size");
  }
  return f;
}

/** hybrid_override_pattern as text or a list of letters, or layers_block_type / layer_types as a list of names. */
std::string pattern(const Config& c) {
  const auto& written = c.object();
  if (c.has("hybrid_override_pattern")) {
    if (written["hybrid_override_pattern"].is_string()) return c.text("hybrid_override_pattern", "");
    std::string letters;
    for (const auto& letter : c.strings("hybrid_override_pattern")) letters += letter;
    return letters;
  }
  static const std::map<std::string, char> letters = {
      {"full_attention", '*'}, {"linear_attention", 'M'}, {"moe", 'E'}, {"mlp", '-'}, {"attention", '*'}, {"mamba", 'M'}, {"conv", 'M'}};
  auto names = c.strings("layers_block_type");
  if (names.empty()) names = c.strings("layer_types");
  std::string text;
  for (const auto& name : names) {
    const auto it = letters.find(name);
    if (it == letters.end()) c.fail("layers_block_type", "got '" + name + "', wanted attention, mamba, mlp or moe");
    text += it->second;
  }
  return text;
}

}  // namespace

Model nemotron_h(const Config& c) {
  Model m = decoder(c, eps_key);
  m.root = "backbone";
  m.embed = "embeddings";
  m.final_norm.at = "norm_f";
  const std::string kinds = pattern(c);
  if (kinds.empty() || kinds.size() > max_layers) {
    c.fail("hybrid_override_pattern", "got " + std::to_string(kinds.size()) + " layers, wanted 1 to " + std::to_string(max_layers));
  }
  for (const char kind : kinds) {
    Op op = Mlp{.at = "mixer", .hidden = c.positive("intermediate_size"), .act = Act::relu2, .bias = c.flag("mlp_bias", false)};
    if (kind == 'M')
      op = mamba(c);
    else if (kind == '*')
      op = attention(c);
    else if (kind == 'E')
      op = experts(c);
    else if (kind != '-')
      c.fail("hybrid_override_pattern", std::string("got '") + kind + "', wanted M, *, - or E");
    m.layers.push_back({pre_norm(rms(c, "norm", eps_key), std::move(op))});
  }
  m.rules.insert(m.rules.end(), {{Rule::drop, "mtp.*"},
                                 {Rule::conv_ncl_to_nlc, "*.conv1d.weight"},
                                 {Rule::stack, "*.mixer.experts.{e}.up_proj.*", "*.mixer.switch_mlp.fc1.*"},
                                 {Rule::stack, "*.mixer.experts.{e}.down_proj.*", "*.mixer.switch_mlp.fc2.*"}});
  m.keep_f32 = {"e_score_correction_bias", "A_log"};
  c.ignore({"num_hidden_layers", "layers_block_type", "layer_types", "tie_word_embeddings", "use_bias", "mamba_hidden_act",
            "mlp_hidden_act", "residual_in_fp32", "rope_theta", "time_step_min", "time_step_max", "rms_norm_eps", "chunk_size", "expand",
            "use_mamba_kernels"});
  return m;
}

}  // namespace mlxlm::arch
