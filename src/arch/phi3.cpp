// Phi-3, 3.5 and 4: fused projections. Reference: mlx_lm/models/phi3.py
#include "arch/families.h"

namespace mlxlm::arch {
namespace {

/** The reference knows longrope, su and linear here, and goes on without scaling for other types. */
Rope phi3_rope(const Config& c, int dims) {
  const Config scaling = rope_scaling(c);
  const std::string type = scaling.text("type", scaling.text("rope_type", ""));
  const bool traditional = c.flag("rope_traditional", false);
  scaling.ignore({"short_factor", "long_factor"});
  if (type == "longrope" || type == "su" || type == "linear") {
    Rope r = rope(c, dims, traditional);
    if (r.kind == RopeKind::longrope) r.traditional = false;
    return r;
  }
  return Rope{.dims = dims, .base = c.real("rope_theta", scaling.real("rope_theta", usual_rope_base)), .traditional = traditional};
}

}  // namespace

Model phi3(const Config& c) {
  Model m = decoder(c);
  silu_only(c);
  tie_head(c, m, false);
  const int layers = layer_count(c);
  for (int i = 0; i < layers; ++i) {
    Attention a;
    a.heads = c.positive("num_attention_heads");
    a.kv_heads = c.positive("num_key_value_heads", a.heads);
    a.head_dim = m.width / a.heads;
    a.fused_qkv = "qkv_proj";
    const Config parameters = c.sub("rope_parameters");
    const bool nested = parameters.has("partial_rotary_factor") && !c.has("partial_rotary_factor");
    a.rope = phi3_rope(c, part_of(nested ? parameters : c, "partial_rotary_factor", a.head_dim));
    const Glu f{.fused_gate_up = "gate_up_proj", .hidden = c.positive("intermediate_size")};
    m.layers.push_back({pre_norm(rms(c, "input_layernorm"), a), pre_norm(rms(c, "post_attention_layernorm"), f)});
  }
  c.ignore({"embd_pdrop", "resid_pdrop", "sliding_window", "original_max_position_embeddings"});
  return m;
}

}  // namespace mlxlm::arch
