// LFM2: gated short convolutions, and attention with normed queries and keys in some layers. Reference: mlx_lm/models/lfm2.py
#include <algorithm>
#include <cmath>

#include "arch/families.h"

namespace mlxlm::arch {
namespace {

constexpr const char* eps_key = "norm_eps";

/** Which layers have attention: full_attn_idxs, or else layer_types. */
std::vector<bool> attention_layers(const Config& c, int layers) {
  std::vector<bool> found(layers, false);
  const auto kinds = c.strings("layer_types");
  if (c.has("full_attn_idxs")) {
    for (const int i : c.integers("full_attn_idxs")) {
      if (i < 0 || i >= layers) c.fail("full_attn_idxs", "got " + std::to_string(i) + " of " + std::to_string(layers) + " layers");
      found[i] = true;
    }
    return found;
  }
  if (static_cast<int>(kinds.size()) != layers) {
    c.fail("layer_types", "got " + std::to_string(kinds.size()) + " entries, wanted one for each of " + std::to_string(layers) + " layers");
  }
  for (int i = 0; i < layers; ++i) {
    if (kinds[i] != "full_attention" && kinds[i] != "conv") c.fail("layer_types", "got '" + kinds[i] + "', wanted full_attention or conv");
    found[i] = kinds[i] == "full_attention";
  }
  return found;
}

/** As the reference computes it, in Python's numbers. */
int feed_forward_width(const Config& c) {
  int width = c.has("block_ff_dim") ? c.positive("block_ff_dim") : c.positive("intermediate_size");
  const int multiple = c.positive("block_multiple_of");
  const bool scaled = c.has("block_ffn_dim_multiplier");
  const double factor = scaled ? double(c.real("block_ffn_dim_multiplier")) : 1.0;
  if (!c.flag("block_auto_adjust_ff_dim", false)) return width;
  if (width > 16 * max_hidden) c.fail("block_ff_dim", "got " + std::to_string(width) + ", out of range");
  if (!(factor > 0 && factor <= 1024)) c.fail("block_ffn_dim_multiplier", "got " + std::to_string(factor) + ", out of range");
  if (multiple > max_hidden) c.fail("block_multiple_of", "got " + std::to_string(multiple) + ", out of range");
  width = static_cast<int>(2.0 * width / 3);
  if (scaled) width = static_cast<int>(std::min(c.object().at("block_ffn_dim_multiplier").get<double>() * width, 1e9));
  return static_cast<int>(std::min((int64_t(width) + multiple - 1) / multiple * multiple, int64_t{1} << 30));
}

Attention attention(const Config& c) {
  const int width = c.positive("hidden_size");
  Attention a{.o = "out_proj", .heads = c.positive("num_attention_heads")};
  a.kv_heads = c.positive("num_key_value_heads", a.heads);
  if (width % a.heads != 0) c.fail("num_attention_heads", "got " + std::to_string(a.heads) + ", wanted a divisor of hidden_size");
  a.head_dim = width / a.heads;
  const float base = c.real("rope_theta", 1e6f);
  a.rope = Rope{.dims = a.head_dim, .base = c.sub("rope_parameters").real("rope_theta", base)};
  if (!(a.rope->base > 1.f)) c.fail("rope_theta", "got " + std::to_string(a.rope->base) + ", wanted a number above 1");
  a.q_norm = rms(c, "q_layernorm", eps_key);
  a.k_norm = rms(c, "k_layernorm", eps_key);
  return a;
}

}  // namespace

Model lfm2(const Config& c) {
  Model m = decoder(c, eps_key);
  m.final_norm.at = "embedding_norm";
  m.tied_head = true;
  if (const int dim = c.positive("block_dim", m.width); dim != m.width) {
    c.fail("block_dim", "got " + std::to_string(dim) + ", wanted hidden_size, " + std::to_string(m.width));
  }
  const int layers = layer_count(c);
  const Glu f{.at = "feed_forward", .gate = "w1", .up = "w3", .down = "w2", .hidden = feed_forward_width(c)};
  const ShortConv conv{.width = m.width, .conv = c.positive("conv_L_cache"), .bias = c.flag("conv_bias", false)};
  const Attention attends = attention(c);
  for (const bool has_attention : attention_layers(c, layers)) {
    Op mixer = has_attention ? Op{attends} : Op{conv};
    m.layers.push_back({pre_norm(rms(c, "operator_norm", eps_key), std::move(mixer)), pre_norm(rms(c, "ffn_norm", eps_key), f)});
  }
  m.rules.push_back({Rule::conv_ncl_to_nlc, "*.conv.conv.weight"});
  m.rules.push_back({Rule::drop, m.head + ".*"});
  c.ignore({"tie_embedding", "tie_word_embeddings", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "block_mlp_init_scale",
            "block_norm_eps", "block_out_init_scale", "block_use_swiglu", "block_use_xavier_init", "num_heads", "theta", "use_pos_enc"});
  c.sub("rope_parameters").ignore({"rope_type"});
  return m;
}

}  // namespace mlxlm::arch
