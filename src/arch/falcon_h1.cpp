// Falcon-H1: attention and a Mamba-2 mixer side by side in each layer. Its many multipliers are part of the weights of a converted
// checkpoint. Reference: mlx_lm/models/falcon_h1.py
#include "arch/families.h"
#include "base/error.h"

namespace mlxlm::arch {
namespace {

Mamba2 mamba(const Config& c) {
  Mamba2 op{.at = "mamba",
            .heads = c.positive("mamba_n_heads", 24),
            .head_dim = c.positive("mamba_d_head", 64),
            .state = c.positive("mamba_d_state", 128),
            .groups = c.positive("mamba_n_groups", 1),
            .conv = c.positive("mamba_d_conv", 4),
            .conv_bias = c.flag("mamba_conv_bias", true),
            .in_bias = c.flag("mamba_proj_bias", false),
            .out_bias = c.flag("projectors_bias", false),
            .norm_eps = rms(c, "").eps,
            .norm_before_gate = c.flag("mamba_norm_before_gate", false)};
  if (op.heads > max_heads || op.head_dim > max_head_dim) c.fail("mamba_n_heads", "out of range, and mamba_d_head");
  if (op.groups > max_heads || op.state > max_head_dim) c.fail("mamba_n_groups", "out of range, and mamba_d_state");
  const int inner = op.heads * op.head_dim;
  if (const int written = c.positive("mamba_d_ssm", inner); written != inner) {
    c.fail("mamba_d_ssm", "got " + std::to_string(written) + ", wanted mamba_n_heads of mamba_d_head, " + std::to_string(inner));
  }
  if (c.flag("mamba_rms_norm", false)) op.norm_group = inner;
  return op;
}

std::vector<float> multipliers(const Config& c, std::string_view key, std::vector<float> usual) {
  auto list = c.reals(key);
  if (list.empty()) return usual;
  if (list.size() != usual.size()) {
    c.fail(key, "got " + std::to_string(list.size()) + " numbers, wanted " + std::to_string(usual.size()));
  }
  return list;
}

/** A checkpoint as its authors publish it becomes one as mlx_lm converts it. The reference leaves the values' and the keys' own multipliers
 * out, which are 1 in some of the published models only. */
std::vector<Rule> fold(const Config& c, const Mamba2& op, float embedding, float head) {
  const float in = c.real("attention_in_multiplier", 1.f), keys = c.real("key_multiplier", 1.f);
  const float ssm_in = c.real("ssm_in_multiplier", 1.25f);
  const auto mlp = multipliers(c, "mlp_multipliers", {0.8838834764831844f, 0.5859375f});
  const auto ssm = multipliers(c, "ssm_multipliers", {0.3535533905932738f, 0.25f, 0.3535533905932738f, 0.5f, 0.3535533905932738f});
  const int inner = op.heads * op.head_dim, states = op.groups * op.state;
  const int rows[] = {inner, inner, states, states, op.heads};
  std::vector<Rule::Factor> by_part;
  for (int i = 0; i < 5; ++i) by_part.push_back({ssm_in * ssm[i], rows[i]});
  std::vector<Rule> rules;
  const auto add = [&](const char* name, std::vector<Rule::Factor> factors) {
    rules.push_back({Rule::multiply, name, "*.mamba.conv1d.weight", std::move(factors)});
  };
  add("*.embed_tokens.weight", {{embedding}});
  add("lm_head.weight", {{head}});
  add("*.q_proj.weight", {{in}});
  add("*.k_proj.weight", {{in * keys}});
  add("*.v_proj.weight", {{in}});
  add("*.o_proj.weight", {{c.real("attention_out_multiplier", 0.9375f)}});
  add("*.mamba.out_proj.weight", {{c.real("ssm_out_multiplier", 0.23570226039551587f)}});
  add("*.gate_proj.weight", {{mlp[0]}});
  add("*.down_proj.weight", {{mlp[1]}});
  add("*.mamba.in_proj.weight", std::move(by_part));
  rules.push_back({Rule::conv_ncl_to_nlc, "*.mamba.conv1d.weight"});
  return rules;
}

}  // namespace

Model falcon_h1(const Config& c) {
  silu_only(c);
  Model m = decoder(c);
  m.final_norm.at = "final_layernorm";
  tie_head(c, m, true);
  const float embedding = c.real("embedding_multiplier", 5.656854249492381f), head = c.real("lm_head_multiplier", 0.0390625f);
  if (!(embedding > 0.f)) c.fail("embedding_multiplier", "wanted a positive number");
  if (m.tied_head) m.logit_scale = head / embedding;
  Attention a = gqa(c, 1e11f);
  a.qkv_bias = a.out_bias = c.flag("attention_bias", false);
  const Mamba2 scan = mamba(c);
  const Glu f{.at = "feed_forward", .hidden = c.positive("intermediate_size"), .bias = c.flag("mlp_bias", false)};
  const int layers = layer_count(c);
  for (int i = 0; i < layers; ++i) {
    Step mixers = pre_norm(rms(c, "input_layernorm"), scan);
    mixers.ops.emplace_back(a);
    m.layers.push_back({std::move(mixers), pre_norm(rms(c, "pre_ff_layernorm"), f)});
  }
  const auto rules = fold(c, scan, embedding, head);
  m.rules.insert(m.rules.end(), rules.begin(), rules.end());
  c.ignore({"mamba_chunk_size", "mamba_expand", "mamba_use_mlp", "mlp_expansion_factor", "initializer_range", "num_logits_to_keep",
            "attention_dropout"});
  return m;
}

}  // namespace mlxlm::arch
