// What most configs spell the same way. RoPE reference: mlx_lm/models/rope_utils.py
#include "arch/pieces.h"

#include <cmath>

#include "base/error.h"

namespace mlxlm::arch {
namespace {

float yarn_mscale(float factor, float mscale) {
  return factor <= 1.f ? 1.f : 0.1f * mscale * std::log(factor) + 1.f;
}

std::vector<float> factor_list(const Config& c, std::string_view key, int dims) {
  auto list = c.reals(key);
  if (static_cast<int>(list.size()) != dims / 2) {
    c.fail(key, "got " + std::to_string(list.size()) + " factors, wanted " + std::to_string(dims / 2));
  }
  return list;
}

void read_longrope(const Config& c, const Config& scaling, Rope& r) {
  r.kind = RopeKind::longrope;
  r.max_positions = c.positive("max_position_embeddings", 131072);
  const int original = scaling.positive("original_max_position_embeddings", 4096);
  r.original_max_positions = c.positive("original_max_position_embeddings", original);
  if (r.original_max_positions < 2) c.fail("original_max_position_embeddings", "got 1, wanted at least 2");
  scaling.ignore({"short_factor", "factor"});  // the reference always uses the long factors
  r.long_factor = factor_list(scaling, "long_factor", r.dims);
  const double factor = double(r.max_positions) / r.original_max_positions;
  if (factor > 1.0) r.input_scale = float(std::sqrt(1.0 + std::log(factor) / std::log(double(r.original_max_positions))));
}

void read_yarn(const Config& scaling, Rope& r) {
  r.kind = RopeKind::yarn;
  r.factor = scaling.real("factor");
  r.original_max_positions = scaling.positive("original_max_position_embeddings", 4096);
  r.beta_fast = scaling.real("beta_fast", 32.f);
  r.beta_slow = scaling.real("beta_slow", 1.f);
  r.mscale = scaling.real("mscale", 1.f);
  r.mscale_all_dim = scaling.real("mscale_all_dim", 0.f);
  r.input_scale = yarn_mscale(r.factor, r.mscale) / yarn_mscale(r.factor, r.mscale_all_dim);
}

}  // namespace

Config rope_scaling(const Config& c) {
  const Config parameters = c.sub("rope_parameters");
  return c.has("rope_scaling") ? c.sub("rope_scaling") : parameters;
}

int part_of(const Config& c, std::string_view factor_key, int dims) {
  const float factor = c.real(factor_key, 1.f);
  if (!(factor > 0.f && factor <= 1.f))
    c.fail(factor_key, "got " + std::to_string(factor) + ", wanted a part of the whole: above 0, at most 1");
  if (!c.has(factor_key)) return dims;
  return static_cast<int>(dims * c.object().at(std::string(factor_key)).get<double>());
}

Rope rope(const Config& c, int dims, bool traditional, float base) {
  const Config scaling = rope_scaling(c);
  Rope r{.dims = dims, .base = c.real("rope_theta", c.sub("rope_parameters").real("rope_theta", base)), .traditional = traditional};
  std::string type = scaling.text("type", "");
  const std::string other = scaling.text("rope_type", "default");
  if (type.empty()) type = other;
  if (type == "linear") {
    r.kind = RopeKind::linear;
    r.factor = scaling.real("factor");
  } else if (type == "dynamic") {
    r.kind = RopeKind::dynamic_ntk;
    r.factor = scaling.real("factor");
    r.max_positions = c.positive("max_position_embeddings");
    if (dims <= 2) c.fail("rope_scaling", "got type dynamic for two rotated values, wanted at least four");
  } else if (type == "llama3") {
    r.kind = RopeKind::llama3;
    r.factor = scaling.real("factor");
    r.low_freq_factor = scaling.real("low_freq_factor", 1.f);
    r.high_freq_factor = scaling.real("high_freq_factor", 4.f);
    r.original_max_positions = scaling.positive("original_max_position_embeddings", 8192);
  } else if (type == "yarn" || type == "deepseek_yarn" || type == "telechat3-yarn") {
    read_yarn(scaling, r);
  } else if (type == "longrope" || type == "su") {
    read_longrope(c, scaling, r);
  } else if (type == "proportional") {
    r.kind = RopeKind::proportional;
    r.rotated_dims = part_of(scaling, "partial_rotary_factor", dims);
    r.factor = scaling.real("factor", 1.f);
  } else if (type == "mrope") {
    if (scaling.integers("mrope_section").size() != 3) scaling.fail("mrope_section", "wanted three sections");
  } else if (type != "default") {
    throw Error(Code::unsupported, c.where() + ": rope_scaling: got type '" + type +
                                       "', wanted default, linear, dynamic, llama3, yarn, longrope, proportional or mrope");
  }
  if (!(r.factor > 0.f) || !std::isfinite(r.factor)) scaling.fail("factor", "wanted a positive number");
  if (!(r.base > 1.f)) c.fail("rope_theta", "got " + std::to_string(r.base) + ", wanted a number above 1");
  if (!std::isfinite(r.input_scale)) scaling.fail("mscale", "gives no finite scale");
  return r;
}

Attention gqa(const Config& c, float rope_base) {
  Attention a;
  a.heads = c.positive("num_attention_heads");
  a.kv_heads = c.positive("num_key_value_heads", a.heads);
  a.head_dim = c.positive("head_dim", c.positive("hidden_size") / a.heads);
  a.rope = rope(c, a.head_dim, c.flag("rope_traditional", false), rope_base);
  return a;
}

Norm rms(const Config& c, std::string at, std::string_view eps_key) {
  const float eps = c.real(eps_key);
  if (!(eps >= 0.f && eps < 1.f)) c.fail(eps_key, "got " + std::to_string(eps) + ", wanted a small number from 0 up");
  return Norm{.at = std::move(at), .eps = eps};
}

Step pre_norm(Norm pre, Op op) {
  Step step;
  step.pre = std::move(pre);
  step.ops.push_back(std::move(op));
  return step;
}

Step sandwich(Norm pre, Op op, Norm post) {
  Step step = pre_norm(std::move(pre), std::move(op));
  step.post = std::move(post);
  return step;
}

Model decoder(const Config& c, std::string_view eps_key) {
  Model m;
  m.vocab = c.positive("vocab_size");
  m.width = c.positive("hidden_size");
  m.final_norm = rms(c, "norm", eps_key);
  m.context_tokens = c.has("max_position_embeddings") ? c.positive("max_position_embeddings") : 0;
  m.rules.push_back({Rule::drop, "*rotary_emb.inv_freq"});
  return m;
}

void tie_head(const Config& c, Model& m, bool fallback) {
  m.tied_head = c.flag("tie_word_embeddings", fallback);
  if (m.tied_head) m.rules.push_back({Rule::drop, m.head + ".*"});
}

int layer_count(const Config& c) {
  const int layers = c.positive("num_hidden_layers");
  if (layers > max_layers) c.fail("num_hidden_layers", "got " + std::to_string(layers) + ", wanted at most " + std::to_string(max_layers));
  return layers;
}

std::vector<bool> sliding_layers(const Config& c, int layers) {
  const auto kinds = c.strings("layer_types");
  std::vector<bool> sliding;
  if (!kinds.empty() && static_cast<int>(kinds.size()) != layers) {
    c.fail("layer_types", "got " + std::to_string(kinds.size()) + " entries, wanted one for each of " + std::to_string(layers) + " layers");
  }
  for (const auto& kind : kinds) {
    if (kind != "sliding_attention" && kind != "full_attention") {
      c.fail("layer_types", "got '" + kind + "', wanted full_attention or sliding_attention");
    }
    sliding.push_back(kind == "sliding_attention");
  }
  return sliding;
}

Config with_defaults(const Config& c, const json& defaults, bool keep_null) {
  json filled = c.object();
  for (const auto& [key, value] : defaults.items()) {
    if (!filled.contains(key) || (filled[key].is_null() && !keep_null)) filled[key] = value;
  }
  return c.with_object(std::move(filled));
}

void silu_only(const Config& c) {
  const auto act = c.text("hidden_act", "silu");
  if (act != "silu" && act != "swish") throw Error(Code::unsupported, c.where() + ": hidden_act: got '" + act + "', wanted silu");
}

}  // namespace mlxlm::arch
