// From a description and a graph model's weights to what the fused executor runs.
#include "model/fused_program.h"

#include <cmath>

#include <mlx/ops.h>
#include <mlx/transforms.h>

namespace mlxlm::model::fused {
namespace {

/** Collects what a description needs; `supported` turns false at the first op without kernels. */
class Fuser {
 public:
  Fuser(const arch::Model& model, const FusedParts& parts) : model_(model), parts_(parts) {}

  std::shared_ptr<Program> build() {
    auto program = std::make_shared<Program>();
    program_ = program.get();
    program->width = model_.width;
    program->vocab = parts_.head->out_dims();
    program->dtype = parts_.dtype;
    program->logit_scale = model_.logit_scale;
    program->logit_softcap = model_.logit_softcap;
    program->embed_scale = model_.embed_scale;
    if (model_.embed_scale != 1.f)
      program->embed_scale = rounded(model_.embed_scale, model_.embed_scale_bf16 ? mx::bfloat16 : parts_.dtype);
    const auto table = parts_.embed->eager();
    if (table.parts.size() != 1) return nullptr;
    program->embedding = table.parts[0].matrix;
    program->head = parts_.head->eager();
    if (program->head.parts.empty()) return nullptr;
    for (std::size_t i = 0; i < model_.layers.size(); ++i) {
      const int first = program->caches;
      for (const auto& step : model_.layers[i]) program->steps.push_back(fuse_step(step, static_cast<int>(i)));
      program->caches = std::max(program->caches, first + 1);
    }
    program->final_norm = norm(model_.final_norm, model_.root + ".");
    return supported_ ? program : nullptr;
  }

 private:
  static float rounded(float value, mx::Dtype dtype) { return mx::astype(mx::astype(mx::array(value), dtype), mx::float32).item<float>(); }

  FusedNorm norm(const arch::Norm& spec, const std::string& at) {
    FusedNorm made{.weight = {}, .eps = spec.eps};
    if (spec.kind != arch::NormKind::rms) supported_ = false;
    if (!supported_ || spec.weightless) return made;
    auto weight = mx::contiguous(mx::astype(parts_.made.norms.at(at + spec.at), mx::float32));
    mx::eval(weight);
    made.weight.assign(weight.data<float>(), weight.data<float>() + weight.size());
    if (spec.plus_one) {
      for (auto& w : made.weight) w += 1.f;
    }
    return made;
  }

  /** A map with an adapter has no parts. */
  cpu::EagerMap map(const std::string& path) {
    auto map = parts_.made.maps.at(path)->eager();
    if (map.parts.empty()) supported_ = false;
    return map;
  }

  int rotation(const std::optional<arch::Rope>& rope) {
    if (!rope) return -1;
    if (rope->kind == arch::RopeKind::dynamic_ntk) supported_ = false;  // its frequencies depend on the length of the call
    if (!supported_) return -1;
    auto frequencies = plan::rope_frequencies(*rope);
    for (std::size_t i = 0; i < program_->rotations.size(); ++i) {
      const auto& known = program_->rotations[i];
      if (known.frequencies == frequencies && known.rope.traditional == rope->traditional && known.rope.input_scale == rope->input_scale) {
        return static_cast<int>(i);
      }
    }
    program_->rotations.push_back({*rope, std::move(frequencies)});
    return static_cast<int>(program_->rotations.size()) - 1;
  }

  FusedStep fuse_step(const arch::Step& step, int layer) {
    FusedStep made;
    const std::string at = model_.root + "." + model_.layers_at + "." + std::to_string(layer) + ".";
    if (step.pre) made.pre = norm(*step.pre, at);
    if (step.post) made.post = norm(*step.post, at);
    made.scale = step.scale;
    for (const auto& op : step.ops) {
      if (!supported_) break;
      const int cache = plan::remembers(op) ? program_->caches++ : -1;
      if (const auto* a = std::get_if<arch::Attention>(&op))
        made.ops.push_back(attention(*a, at, cache));
      else if (const auto* g = std::get_if<arch::Glu>(&op))
        made.ops.push_back(glu(*g, at));
      else if (const auto* m = std::get_if<arch::Mlp>(&op))
        made.ops.push_back(mlp(*m, at));
      else if (const auto* e = std::get_if<arch::Moe>(&op))
        made.ops.push_back(experts(*e, at));
      else if (const auto* l = std::get_if<arch::Mla>(&op))
        made.ops.push_back(latent(*l, at, cache));
      else if (const auto* s = std::get_if<arch::Mamba2>(&op))
        made.ops.push_back(mamba(*s, at, cache));
      else if (const auto* c = std::get_if<arch::ShortConv>(&op))
        made.ops.push_back(short_conv(*c, at, cache));
      else if (const auto* d = std::get_if<arch::GatedDelta>(&op))
        made.ops.push_back(gated_delta(*d, at, cache));
      else
        supported_ = false;
    }
    return made;
  }

  FusedLatent latent(const arch::Mla& op, const std::string& layer_at, int cache) {
    const std::string at = layer_at + op.at + ".";
    const arch::Norm inner{.eps = op.norm_eps};
    FusedLatent made{
        .heads = op.heads, .latent = op.kv_lora, .nope = op.nope_dim, .rope = op.rope_dim, .value = op.v_dim, .scale = op.scale};
    made.memory.cache = cache;
    made.memory.kv_heads = 1;
    made.memory.latent = true;
    made.memory.head_dim = op.kv_lora;
    made.memory.value_dim = op.rope_dim;
    made.memory.rotation = rotation(op.rope);
    const auto named = [&](const char* name) {
      auto norm = inner;
      norm.at = name;
      return this->norm(norm, at);
    };
    if (op.q_lora > 0) {
      made.q_a = map(at + "q_a_proj");
      made.q_norm = named("q_a_layernorm");
    }
    made.q = map(at + (op.q_lora > 0 ? "q_b_proj" : "q_proj"));
    made.kv_a = map(at + "kv_a_proj_with_mqa");
    made.kv_norm = named("kv_a_layernorm");
    made.embed_q = map(at + "embed_q");
    made.unembed_out = map(at + "unembed_out");
    made.o = map(at + "o_proj");
    return made;
  }

  FusedMamba mamba(const arch::Mamba2& op, const std::string& layer_at, int cache) {
    const std::string at = layer_at + op.at + ".";
    FusedMamba made{.spec = op};
    made.in = map(at + "in_proj");
    made.out = map(at + "out_proj");
    made.conv = conv(at + "conv1d", op.conv, op.conv_bias);
    made.conv.silu = true;
    made.memory = {cache, {{1, op.conv - 1, made.conv.channels}, {1, op.heads, op.head_dim, op.state}}};
    made.dt_bias = vector(at + "dt_bias");
    made.decay = vector(at + "A_log");
    for (auto& a : made.decay) a = -std::exp(a);
    made.skip = vector(at + "D");
    if (op.norm_group > 0) made.norm = vector(at + "norm.weight");
    return made;
  }

  FusedShortConv short_conv(const arch::ShortConv& op, const std::string& layer_at, int cache) {
    const std::string at = layer_at + op.at + ".";
    FusedShortConv made;
    made.in = map(at + "in_proj");
    made.out = map(at + "out_proj");
    made.conv = conv(at + "conv", op.conv, op.bias);
    made.memory = {cache, {{1, op.conv - 1, op.width}}};
    return made;
  }

  FusedGatedDelta gated_delta(const arch::GatedDelta& op, const std::string& layer_at, int cache) {
    const std::string at = layer_at + op.at + ".";
    const float scale = 1.f / std::sqrt(float(op.key_dim));
    FusedGatedDelta made{.spec = op};
    made.in = map(at + (op.split ? "in_proj_qkv" : "in_proj_qkvz"));
    made.out = map(at + "out_proj");
    made.conv = conv(at + "conv1d", op.conv, false);
    made.conv.silu = true;
    made.dt_bias = vector(at + "dt_bias");
    made.rate = vector(at + "A_log");
    for (auto& a : made.rate) a = -std::exp(a);
    made.unit_q = {std::vector<float>(op.key_dim, scale * scale), op.unit_eps * scale * scale};
    made.unit_k = {std::vector<float>(op.key_dim, scale), op.unit_eps * scale * scale};
    made.norm = norm({.at = "norm", .eps = op.norm_eps}, at);
    made.memory = {cache, {{1, op.conv - 1, op.channels()}, {1, op.value_heads, op.value_dim, op.key_dim}}};
    return made;
  }

  FusedConv conv(const std::string& at, int taps, bool bias) {
    const auto weight = vector(at + ".weight");  // [channels][taps]
    FusedConv made{.channels = static_cast<int>(weight.size()) / taps, .taps = taps};
    made.weight.resize(weight.size());
    for (int c = 0; c < made.channels; ++c) {
      for (int t = 0; t < taps; ++t) made.weight[int64_t(t) * made.channels + c] = weight[int64_t(c) * taps + t];
    }
    if (bias) made.bias = vector(at + ".bias");
    return made;
  }

  std::vector<float> vector(const std::string& path) {
    auto values = mx::contiguous(mx::astype(parts_.made.vectors.at(path), mx::float32));
    mx::eval(values);
    return {values.data<float>(), values.data<float>() + values.size()};
  }

  FusedExperts experts(const arch::Moe& op, const std::string& layer_at) {
    const std::string at = layer_at + op.at + ".", stacked = at + op.experts_at + ".", shared = at + op.shared_at + ".";
    FusedExperts made{.spec = op};
    made.router = map(at + op.router);
    if (op.correction_bias) made.correction = vector(at + op.router + ".e_score_correction_bias");
    made.up = map(stacked + (op.gated ? op.gate : op.up));
    made.down = map(stacked + op.down);
    for (const auto* map : {&made.up, &made.down}) {
      for (const auto& part : map->parts) supported_ = supported_ && part.bias.empty();
    }
    if (op.latent > 0) {
      made.into_latent = map(at + "fc1_latent_proj");
      made.from_latent = map(at + "fc2_latent_proj");
    }
    if (op.shared_hidden > 0) {
      made.shared_up = map(shared + (op.shared_gated ? "gate_proj" : "up_proj"));
      made.shared_down = map(shared + "down_proj");
      if (!op.shared_gate.empty()) made.shared_gate = map(at + op.shared_gate);
    }
    return made;
  }

  FusedAttention attention(const arch::Attention& op, const std::string& layer_at, int cache) {
    const std::string at = layer_at + op.at + ".";
    FusedAttention made;
    made.cache = cache;
    made.heads = op.heads;
    made.kv_heads = op.kv_heads;
    made.head_dim = made.value_dim = op.head_dim;
    made.window = op.window.value_or(0);
    made.scale = op.scale != 0.f ? op.scale : 1.f / std::sqrt(float(op.head_dim));
    made.softcap = op.softcap;
    made.temperature = op.temperature;
    made.temperature_tokens = op.temperature_tokens;
    made.norm_full_width = op.norm_full_width;
    made.gated = op.gated;
    made.rotation = rotation(op.rope);
    if (op.q_norm) made.q_norm = norm(*op.q_norm, at);
    if (op.k_norm) made.k_norm = norm(*op.k_norm, at);
    made.qkv = map(at + (op.fused_qkv.empty() ? op.q : op.fused_qkv));
    made.o = map(at + op.o);
    return made;
  }

  FusedFeedForward glu(const arch::Glu& op, const std::string& layer_at) {
    const std::string at = layer_at + op.at + ".";
    return {true, op.act, op.hidden, map(at + (op.fused_gate_up.empty() ? op.gate : op.fused_gate_up)), map(at + op.down)};
  }
  FusedFeedForward mlp(const arch::Mlp& op, const std::string& layer_at) {
    return {false, op.act, op.hidden, map(layer_at + op.at + "." + op.up), map(layer_at + op.at + "." + op.down)};
  }

  const arch::Model& model_;
  const FusedParts& parts_;
  Program* program_ = nullptr;
  bool supported_ = true;
};

}  // namespace

std::shared_ptr<Program> make_program(const arch::Model& description, const FusedParts& parts) {
  return Fuser(description, parts).build();
}

}  // namespace mlxlm::model::fused
