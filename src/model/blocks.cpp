// Shared parts of the blocks, and the feed-forward ones.
#include "model/blocks.h"

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"

namespace mlxlm::model {
namespace {

class GluBlock final : public Block {
 public:
  GluBlock(const arch::Glu& op, Store& store, const std::string& at) : act_(op.act) {
    const std::string path = at + op.at + ".";
    gate_up_ = op.fused_gate_up.empty() ? store.map({path + op.gate, path + op.up}) : store.map({path + op.fused_gate_up});
    down_ = store.map({path + op.down});
  }
  mx::array operator()(const mx::array& x, const Parts&) override { return (*down_)(nn::glu((*gate_up_)(x), act_)); }

 private:
  arch::Act act_;
  std::shared_ptr<nn::Linear> gate_up_, down_;
};

class MlpBlock final : public Block {
 public:
  MlpBlock(const arch::Mlp& op, Store& store, const std::string& at) : act_(op.act) {
    up_ = store.map({at + op.at + "." + op.up});
    down_ = store.map({at + op.at + "." + op.down});
  }
  mx::array operator()(const mx::array& x, const Parts&) override { return (*down_)(nn::activate((*up_)(x), act_)); }

 private:
  arch::Act act_;
  std::shared_ptr<nn::Linear> up_, down_;
};

}  // namespace

mx::array Mixer::operator()(const mx::array& x, const Parts& parts) {
  const auto projected = before(x);
  if (parts.size() == 1) return after(mix(projected, parts[0].cache));
  std::vector<mx::array> mixed;
  int at = 0;
  for (const auto& part : parts) {
    mixed.push_back(mix(mx::slice(projected, {0, at, 0}, {1, at + part.tokens, projected.shape(2)}), part.cache));
    at += part.tokens;
  }
  return after(mx::concatenate(mixed, 1));
}

mx::array Store::take(const std::string& name) {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) throw Error(Code::bad_weights, name, "missing");
  mx::array value = it->second;
  tensors_.erase(it);
  return value;
}

mx::array Store::vector(const std::string& name) {
  const auto value = take(name);
  made.vectors.insert_or_assign(name, value);
  return value;
}

nn::Linear::Weights Store::linear(const std::string& path) {
  nn::Linear::Weights w{.weight = take(path + ".weight")};
  if (has(path + ".scales")) w.scales = take(path + ".scales");
  if (has(path + ".biases")) w.biases = take(path + ".biases");
  if (has(path + ".bias")) w.bias = take(path + ".bias");
  if (const auto it = quant_.find(path); it != quant_.end()) w.quant = it->second;
  w.quantize_input = quantized_inputs.contains(path);
  if (const auto it = adapters_.find(path); it != adapters_.end()) w.adapter = {it->second.a, it->second.b, it->second.m, it->second.scale};
  return w;
}

std::shared_ptr<nn::Linear> Store::map(const std::vector<std::string>& paths) {
  std::vector<nn::Linear::Weights> parts;
  for (const auto& path : paths) parts.push_back(linear(path));
  auto map = std::make_shared<nn::Linear>(std::move(parts));
  bytes += map->bytes();
  made.maps[paths.at(0)] = map;
  return map;
}

nn::HeadMaps Store::heads(const std::string& path) {
  auto weights = linear(path);
  auto map = std::make_shared<nn::Linear>(std::vector<nn::Linear::Weights>{weights});
  bytes += map->bytes();
  made.maps[path] = std::move(map);
  return nn::HeadMaps(std::move(weights), dtype);
}

NormBlock::NormBlock(arch::Norm spec, Store& store, const std::string& path) : spec_(std::move(spec)) {
  if (!spec_.weightless) {
    weight_ = mx::contiguous(store.take(path + ".weight"));
    mx::eval(*weight_);
    store.made.norms.insert_or_assign(path, *weight_);
  }
  if (spec_.bias) bias_ = store.take(path + ".bias");
}

mx::array columns(const mx::array& x, int from, int to) {
  mx::Shape start(x.ndim(), 0), stop = x.shape();
  start.back() = from;
  stop.back() = to;
  return mx::slice(x, start, stop);
}

Rotation::Rotation(std::optional<arch::Rope> rope) : rope_(std::move(rope)) {
  if (rope_) frequencies_ = std::make_shared<const std::vector<float>>(plan::rope_frequencies(*rope_));
}

mx::array Rotation::operator()(const mx::array& x, int offset) const {
  if (rope_ && rope_->kind == arch::RopeKind::dynamic_ntk) {
    const auto now = std::make_shared<const std::vector<float>>(plan::rope_frequencies(*rope_, offset + x.shape(1)));
    return nn::rope_heads(x, &*rope_, now, offset);
  }
  return nn::rope_heads(x, rope_ ? &*rope_ : nullptr, frequencies_, offset);
}

std::unique_ptr<Block> make_block(const arch::Op& op, Store& store, const std::string& at) {
  struct Make {
    Store& store;
    const std::string& at;
    std::unique_ptr<Block> operator()(const arch::Attention& o) const { return make_attention(o, store, at); }
    std::unique_ptr<Block> operator()(const arch::Mla& o) const { return make_mla(o, store, at); }
    std::unique_ptr<Block> operator()(const arch::Glu& o) const { return std::make_unique<GluBlock>(o, store, at); }
    std::unique_ptr<Block> operator()(const arch::Mlp& o) const { return std::make_unique<MlpBlock>(o, store, at); }
    std::unique_ptr<Block> operator()(const arch::Moe& o) const { return make_moe(o, store, at); }
    std::unique_ptr<Block> operator()(const arch::ShortConv& o) const { return make_short_conv(o, store, at); }
    std::unique_ptr<Block> operator()(const arch::GatedDelta& o) const { return make_gated_delta(o, store, at); }
    std::unique_ptr<Block> operator()(const arch::Mamba2& o) const { return make_mamba2(o, store, at); }
  };
  return std::visit(Make{store, at}, op);
}

}  // namespace mlxlm::model
