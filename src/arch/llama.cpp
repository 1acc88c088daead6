// Llama, Mistral, Yi, SmolLM3. Reference: mlx_lm/models/llama.py, smollm3.py
#include "arch/families.h"

namespace mlxlm::arch {
namespace {

/** rope_layer(i): whether layer i rotates. */
template <class RopeLayer>
Model llama_like(const Config& c, RopeLayer rope_layer) {
  const int layers = layer_count(c);
  const auto sliding = sliding_layers(c, layers);
  silu_only(c);
  Model m = decoder(c);
  tie_head(c, m, true);
  for (int i = 0; i < layers; ++i) {
    Attention a = gqa(c);
    a.qkv_bias = a.out_bias = c.flag("attention_bias", false);
    if (!sliding.empty() && sliding[i]) a.window = c.positive("sliding_window");
    if (!rope_layer(i)) a.rope.reset();
    const Glu f{.hidden = c.positive("intermediate_size"), .bias = c.flag("mlp_bias", false)};
    m.layers.push_back({pre_norm(rms(c, "input_layernorm"), a), pre_norm(rms(c, "post_attention_layernorm"), f)});
  }
  c.ignore({"sliding_window"});  // without layer_types it means nothing to the reference
  return m;
}

}  // namespace

Model llama(const Config& c) {
  return llama_like(c, [](int) { return true; });
}

Model smollm3(const Config& c) {
  const int every = c.positive("no_rope_layer_interval", 4);
  const auto listed = c.integers("no_rope_layers");  // 1 = rotates
  const int layers = layer_count(c);
  if (!listed.empty() && static_cast<int>(listed.size()) != layers) {
    c.fail("no_rope_layers", "got " + std::to_string(listed.size()) + " layers, wanted " + std::to_string(layers));
  }
  return llama_like(c, [&](int i) { return listed.empty() ? (i + 1) % every != 0 : listed[i] != 0; });
}

}  // namespace mlxlm::arch
