// Gemma 3: sandwich norms, local layers with a window. Reference: mlx_lm/models/gemma3_text.py, gemma3.py
#include <cmath>

#include "arch/families.h"
#include "base/error.h"

namespace mlxlm::arch {
namespace {

Norm gemma_norm(const Config& c, std::string at) {
  Norm n = rms(c, std::move(at));
  n.plus_one = true;
  return n;
}

/** transformers leaves out of text_config what equals its defaults. */
const json& defaults() {
  static const json values = {{"hidden_size", 1152},
                              {"num_hidden_layers", 26},
                              {"intermediate_size", 6912},
                              {"num_attention_heads", 4},
                              {"head_dim", 256},
                              {"num_key_value_heads", 1},
                              {"vocab_size", 262144},
                              {"rms_norm_eps", 1e-6},
                              {"rope_theta", 1e6},
                              {"sliding_window", 512},
                              {"sliding_window_pattern", 6},
                              {"query_pre_attn_scalar", 256},
                              {"rope_local_base_freq", 1e4},
                              {"max_position_embeddings", 32768}};
  return values;
}

/** transformers 5 nests the rotation of each kind of layer: rope_parameters.full_attention and .sliding_attention. */
Config flat_rope(const Config& c) {
  const Config nested = c.sub("rope_parameters");
  if (!nested.has("full_attention")) return c;
  json flat = c.object();
  const auto give = [&](const char* key, const json& value) {
    if (!flat.contains(key) || flat[key].is_null()) flat[key] = value;
  };
  const Config full = nested.sub("full_attention"), local = nested.sub("sliding_attention");
  if (full.has("rope_theta")) give("rope_theta", full.object().at("rope_theta"));
  if (local.has("rope_theta")) give("rope_local_base_freq", local.object().at("rope_theta"));
  give("rope_scaling", full.object());
  full.ignore({"rope_type", "type", "factor"});  // read under the name rope_scaling
  if (const auto type = local.text("rope_type", "default"); type != "default") {
    throw Error(Code::unsupported, c.where() + ": rope_parameters.sliding_attention.rope_type: got '" + type + "', wanted default");
  }
  flat.erase("rope_parameters");
  return c.with_object(std::move(flat));
}

Model build(const Config& written) {
  const Config c = with_defaults(flat_rope(written), defaults());
  const int layers = layer_count(c);
  const int every = c.positive("sliding_window_pattern");
  const auto sliding = sliding_layers(c, layers);
  const float scalar = c.real("query_pre_attn_scalar");
  if (!(scalar > 0.f)) c.fail("query_pre_attn_scalar", "wanted a positive number");
  Model m = decoder(c);
  // The reference rounds the factor to bfloat16 whatever the dtype of the weights is.
  m.embed_scale = std::sqrt(float(m.width));
  m.embed_scale_bf16 = true;
  m.tied_unless_stored = true;
  m.final_norm = gemma_norm(c, "norm");
  for (int i = 0; i < layers; ++i) {
    Attention a = gqa(c);
    a.scale = 1.f / std::sqrt(scalar);
    a.q_norm = gemma_norm(c, "q_norm");
    a.k_norm = gemma_norm(c, "k_norm");
    if (sliding.empty() ? (i + 1) % every != 0 : sliding[i]) {
      a.window = c.positive("sliding_window");
      a.rope = Rope{.dims = a.head_dim, .base = c.real("rope_local_base_freq")};
    }
    const Glu f{.hidden = c.positive("intermediate_size"), .act = Act::gelu_tanh};
    Step attention = sandwich(gemma_norm(c, "input_layernorm"), a, gemma_norm(c, "post_attention_layernorm"));
    Step feed_forward = sandwich(gemma_norm(c, "pre_feedforward_layernorm"), f, gemma_norm(c, "post_feedforward_layernorm"));
    attention.clip_f16 = feed_forward.clip_f16 = true;
    m.layers.push_back({std::move(attention), std::move(feed_forward)});
  }
  c.ignore({"hidden_activation", "hidden_act", "cache_implementation", "_sliding_window_pattern", "tie_word_embeddings",
            "use_bidirectional_attention"});
  return m;
}

}  // namespace

Model gemma3_text(const Config& c) {
  return build(c);
}

Model gemma3(const Config& c) {
  const Config text = c.sub("text_config");
  json inner = text.object();
  inner["vocab_size"] = c.positive("vocab_size", 262208);
  Model m = build(with_defaults(text.with_object(std::move(inner)), {{"num_attention_heads", 8}, {"num_key_value_heads", 4}}));
  m.rules.insert(m.rules.begin(), {{Rule::drop, "vision_tower.*"},
                                   {Rule::drop, "multi_modal_projector.*"},
                                   {Rule::rename, "model.language_model.*", "language_model.model.*"},
                                   {Rule::rename, "lm_head.*", "language_model.lm_head.*"},
                                   {Rule::drop, "model.vision_tower.*"},
                                   {Rule::drop, "model.multi_modal_projector.*"}});
  m.root = "language_model.model";
  m.head = "language_model.lm_head";
  c.ignore({"tie_word_embeddings", "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"});
  return m;
}

}  // namespace mlxlm::arch
