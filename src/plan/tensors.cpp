// The parameters of a description, under mlx_lm's names.
#include <functional>

#include "plan/plan.h"

namespace mlxlm::plan {
namespace {

using namespace arch;

class Lister {
 public:
  explicit Lister(const Model& model) : model_(model) {}

  std::vector<Tensor> list() {
    add(model_.root + "." + model_.embed, "weight", {model_.vocab, model_.width}, Role::embedding);
    for (std::size_t i = 0; i < model_.layers.size(); ++i) {
      at_ = model_.root + "." + model_.layers_at + "." + std::to_string(i) + ".";
      for (const auto& step : model_.layers[i]) {
        if (step.pre) norm(at_ + step.pre->at, *step.pre, model_.width);
        for (const auto& op : step.ops) std::visit([this](const auto& o) { this->op(o); }, op);
        if (step.post) norm(at_ + step.post->at, *step.post, model_.width);
      }
    }
    norm(model_.root + "." + model_.final_norm.at, model_.final_norm, model_.width);
    if (!model_.tied_head) add(model_.head, "weight", {model_.vocab, model_.width}, Role::matrix);
    return std::move(tensors_);
  }

 private:
  void add(std::string path, std::string leaf, std::vector<int> shape, Role role) {
    tensors_.push_back({std::move(path), std::move(leaf), std::move(shape), role});
  }
  void linear(const std::string& path, int in, int out, bool bias) {
    add(path, "weight", {out, in}, Role::matrix);
    if (bias) add(path, "bias", {out}, Role::vector);
  }
  void stacked(const std::string& path, int count, int in, int out) { add(path, "weight", {count, out, in}, Role::stacked); }
  void norm(const std::string& path, const Norm& n, int dims) {
    if (n.weightless) return;
    add(path, "weight", {dims}, Role::vector);
    if (n.bias) add(path, "bias", {dims}, Role::vector);
  }

  void op(const Attention& a) {
    const std::string at = at_ + a.at + ".";
    const int q = a.heads * a.head_dim, kv = a.kv_heads * a.head_dim;
    if (!a.fused_qkv.empty()) {
      linear(at + a.fused_qkv, model_.width, q + 2 * kv, a.qkv_bias);
    } else {
      linear(at + a.q, model_.width, a.gated ? 2 * q : q, a.qkv_bias);
      linear(at + a.k, model_.width, kv, a.qkv_bias);
      linear(at + a.v, model_.width, kv, a.qkv_bias);
    }
    if (a.q_norm) norm(at + a.q_norm->at, *a.q_norm, a.norm_full_width ? q : a.head_dim);
    if (a.k_norm) norm(at + a.k_norm->at, *a.k_norm, a.norm_full_width ? kv : a.head_dim);
    linear(at + a.o, q, model_.width, a.out_bias);
  }
  void op(const Mla& a) {
    const std::string at = at_ + a.at + ".";
    const int q = a.heads * (a.nope_dim + a.rope_dim);
    if (a.q_lora == 0) {
      linear(at + "q_proj", model_.width, q, false);
    } else {
      linear(at + "q_a_proj", model_.width, a.q_lora, a.bias);
      norm(at + "q_a_layernorm", Norm{}, a.q_lora);
      linear(at + "q_b_proj", a.q_lora, q, false);
    }
    linear(at + "kv_a_proj_with_mqa", model_.width, a.kv_lora + a.rope_dim, a.bias);
    norm(at + "kv_a_layernorm", Norm{}, a.kv_lora);
    stacked(at + "embed_q", a.heads, a.nope_dim, a.kv_lora);
    stacked(at + "unembed_out", a.heads, a.kv_lora, a.v_dim);
    linear(at + "o_proj", a.heads * a.v_dim, model_.width, a.bias);
  }
  void op(const Glu& f) {
    const std::string at = at_ + f.at + ".";
    if (!f.fused_gate_up.empty()) {
      linear(at + f.fused_gate_up, model_.width, 2 * f.hidden, f.bias);
    } else {
      linear(at + f.gate, model_.width, f.hidden, f.bias);
      linear(at + f.up, model_.width, f.hidden, f.bias);
    }
    linear(at + f.down, f.hidden, model_.width, f.bias);
  }
  void op(const Mlp& f) {
    const std::string at = at_ + f.at + ".";
    linear(at + f.up, model_.width, f.hidden, f.bias);
    linear(at + f.down, f.hidden, model_.width, f.bias);
  }
  void op(const Moe& f) {
    const std::string at = at_ + f.at + ".";
    const int in = f.latent > 0 ? f.latent : model_.width;
    add(at + f.router, "weight", {f.experts, model_.width}, f.router_is_parameter ? Role::other : Role::matrix);
    if (f.correction_bias) add(at + f.router, "e_score_correction_bias", {f.experts}, Role::other);
    if (f.gated) stacked(at + f.experts_at + "." + f.gate, f.experts, in, f.hidden);
    stacked(at + f.experts_at + "." + f.up, f.experts, in, f.hidden);
    stacked(at + f.experts_at + "." + f.down, f.experts, f.hidden, in);
    if (f.latent > 0) {
      linear(at + "fc1_latent_proj", model_.width, f.latent, f.bias);
      linear(at + "fc2_latent_proj", f.latent, model_.width, f.bias);
    }
    if (f.shared_hidden > 0) {
      if (f.shared_gated) linear(at + f.shared_at + ".gate_proj", model_.width, f.shared_hidden, f.bias);
      linear(at + f.shared_at + ".up_proj", model_.width, f.shared_hidden, f.bias);
      linear(at + f.shared_at + ".down_proj", f.shared_hidden, model_.width, f.bias);
      if (!f.shared_gate.empty()) linear(at + f.shared_gate, model_.width, 1, false);
    }
  }
  void op(const Mamba2& f) {
    const std::string at = at_ + f.at + ".";
    const int inner = f.heads * f.head_dim, conv = inner + 2 * f.groups * f.state;
    linear(at + "in_proj", model_.width, inner + conv + f.heads, f.in_bias);
    add(at + "conv1d", "weight", {conv, f.conv, 1}, Role::other);
    if (f.conv_bias) add(at + "conv1d", "bias", {conv}, Role::vector);
    for (const char* name : {"dt_bias", "A_log", "D"}) add(at + name, "", {f.heads}, Role::other);
    if (f.norm_group > 0) norm(at + "norm", Norm{}, inner);
    linear(at + "out_proj", inner, model_.width, f.out_bias);
  }
  void op(const ShortConv& f) {
    const std::string at = at_ + f.at + ".";
    linear(at + "in_proj", f.width, 3 * f.width, f.bias);
    add(at + "conv", "weight", {f.width, f.conv, 1}, Role::other);
    if (f.bias) add(at + "conv", "bias", {f.width}, Role::vector);
    linear(at + "out_proj", f.width, f.width, f.bias);
  }
  void op(const GatedDelta& f) {
    const std::string at = at_ + f.at + ".";
    if (f.split) {
      linear(at + "in_proj_qkv", model_.width, f.channels(), false);
      linear(at + "in_proj_z", model_.width, f.values(), false);
      linear(at + "in_proj_b", model_.width, f.value_heads, false);
      linear(at + "in_proj_a", model_.width, f.value_heads, false);
    } else {
      linear(at + "in_proj_qkvz", model_.width, f.channels() + f.values(), false);
      linear(at + "in_proj_ba", model_.width, 2 * f.value_heads, false);
    }
    add(at + "conv1d", "weight", {f.channels(), f.conv, 1}, Role::other);
    for (const char* name : {"dt_bias", "A_log"}) add(at + name, "", {f.value_heads}, Role::other);
    norm(at + "norm", Norm{}, f.value_dim);
    linear(at + "out_proj", f.values(), model_.width, false);
  }

  const Model& model_;
  std::string at_;
  std::vector<Tensor> tensors_;
};

struct CacheOf {
  LayerCache operator()(const Attention& a) const {
    const int64_t values = 2LL * a.kv_heads * a.head_dim;
    if (a.chunk) return {CacheKind::chunked, *a.chunk, values};
    return a.window ? LayerCache{CacheKind::rotating, *a.window, values} : LayerCache{CacheKind::full, 0, values};
  }
  LayerCache operator()(const Mla& a) const { return {CacheKind::full, 0, int64_t(a.kv_lora) + a.rope_dim}; }
  LayerCache operator()(const Mamba2& f) const {
    const int64_t inner = int64_t(f.heads) * f.head_dim, conv = inner + 2LL * f.groups * f.state;
    return {CacheKind::recurrent, 0, 0, (f.conv - 1) * conv + inner * f.state, 2};
  }
  LayerCache operator()(const GatedDelta& f) const {
    return {CacheKind::recurrent, 0, 0, (f.conv - 1LL) * f.channels() + int64_t(f.values()) * f.key_dim, 2};
  }
  LayerCache operator()(const ShortConv& f) const { return {CacheKind::recurrent, 0, 0, (f.conv - 1LL) * f.width, 1}; }
  LayerCache operator()(const Glu&) const { return {}; }
  LayerCache operator()(const Mlp&) const { return {}; }
  LayerCache operator()(const Moe&) const { return {}; }
};

/** Parameters of stacked experts that one token does not use. */
int64_t idle_parameters(const Model& model) {
  int64_t idle = 0;
  for (const auto& layer : model.layers) {
    for (const auto& step : layer) {
      for (const auto& op : step.ops) {
        const auto* f = std::get_if<Moe>(&op);
        if (f == nullptr) continue;
        const int64_t in = f->latent > 0 ? f->latent : model.width;
        idle += int64_t(f->experts - f->top_k) * (f->gated ? 3 : 2) * in * f->hidden;
      }
    }
  }
  return idle;
}

}  // namespace

std::vector<Tensor> tensors(const Model& model) {
  return Lister(model).list();
}

bool remembers(const Op& op) {
  return std::visit(CacheOf{}, op).kind != CacheKind::none;
}

std::vector<LayerCache> cache_layout(const Model& model) {
  std::vector<LayerCache> layout;
  for (int i = 0; i < static_cast<int>(model.layers.size()); ++i) {
    const auto before = layout.size();
    for (const auto& step : model.layers[i]) {
      for (const auto& op : step.ops) {
        if (remembers(op)) layout.push_back(std::visit(CacheOf{}, op));
      }
    }
    if (layout.size() == before) layout.emplace_back();
    for (auto at = before; at < layout.size(); ++at) layout[at].layer = i;
  }
  return layout;
}

Summary summarize(const Model& model) {
  Summary s;
  for (const auto& tensor : tensors(model)) {
    int64_t count = 1;
    for (const int dim : tensor.shape) count *= dim;
    if (tensor.path == model.head && model.tied_unless_stored) continue;  // such checkpoints come without a head
    s.parameters += count;
  }
  s.active_parameters = s.parameters - idle_parameters(model);
  for (const auto& cache : cache_layout(model)) {
    s.cache_values_per_token += cache.window_tokens > 0 ? 0 : cache.values_per_token;
    s.cache_values_fixed += cache.values_fixed + cache.values_per_token * cache.window_tokens;
  }
  return s;
}

}  // namespace mlxlm::plan
