// The gated delta net. Reference: mlx_lm/models/qwen3_next.py Qwen3NextGatedDeltaNet, qwen3_5.py GatedDeltaNet
#include <cmath>

#include <mlx/ops.h>

#include "base/error.h"
#include "model/blocks.h"

namespace mlxlm::model {
namespace {

class GatedDeltaBlock final : public Mixer {
 public:
  GatedDeltaBlock(const arch::GatedDelta& op, Store& store, const std::string& layer_at)
      : op_(op),
        at_(layer_at + op.at + "."),
        in_(op.split ? store.map({at_ + "in_proj_qkv", at_ + "in_proj_z", at_ + "in_proj_b", at_ + "in_proj_a"})
                     : store.map({at_ + "in_proj_qkvz", at_ + "in_proj_ba"})),
        out_(store.map({at_ + "out_proj"})),
        conv_(store.vector(at_ + "conv1d.weight")),
        dt_bias_(store.vector(at_ + "dt_bias")),
        a_log_(store.vector(at_ + "A_log")),
        norm_(arch::Norm{.eps = op.norm_eps}, store, at_ + "norm") {}

 protected:
  mx::array before(const mx::array& x) override { return (*in_)(x); }
  mx::array after(const mx::array& mixed) override { return (*out_)(mixed); }
  mx::array mix(const mx::array& projected, cache::Cache* cache) override {
    const int length = projected.shape(1), keys = op_.keys(), channels = op_.channels();
    auto* held = dynamic_cast<cache::RecurrentCache*>(cache);
    if (cache != nullptr && held == nullptr) throw Error(Code::internal, "gated delta net", "got the cache of another kind of layer");
    const auto parts = op_.split ? in_whole(projected) : by_key_head(projected);
    const auto convolved = nn::short_conv(parts.qkv, held ? held->slot(0) : std::nullopt, conv_, std::nullopt);
    const auto qkv = nn::activate(convolved[0], arch::Act::silu);
    const auto heads = [&](int from, int to, int count) {
      return mx::reshape(columns(qkv, from, to), {1, length, count, (to - from) / count});
    };
    const auto v = heads(2 * keys, channels, op_.value_heads);
    const float scale = 1.f / std::sqrt(float(op_.key_dim));
    const auto made =
        nn::gated_delta(unit(heads(0, keys, op_.key_heads), scale * scale), unit(heads(keys, 2 * keys, op_.key_heads), scale), v,
                        nn::delta_decay(parts.a, a_log_, dt_bias_), mx::sigmoid(parts.b), held ? held->slot(1) : std::nullopt);
    if (held != nullptr) {
      held->set_slot(0, mx::contiguous(convolved[1]));
      held->set_slot(1, made[1]);
      held->advance(length);
    }
    const auto gate = nn::activate(mx::astype(parts.z, mx::float32), arch::Act::silu);
    const auto gated = mx::multiply(gate, mx::reshape(mx::astype(norm_(made[0]), mx::float32), gate.shape()));
    return mx::astype(gated, projected.dtype());
  }

 private:
  struct Parts {
    mx::array qkv, z, b, a;  // [1,L,*]
  };
  Parts in_whole(const mx::array& x) const {
    const int channels = op_.channels(), z = channels + op_.values(), b = z + op_.value_heads;
    return {columns(x, 0, channels), columns(x, channels, z), columns(x, z, b), columns(x, b, b + op_.value_heads)};
  }
  /** The projections hold q, k, v and z, and b and a, of one key head after the other. */
  Parts by_key_head(const mx::array& x) const {
    const int length = x.shape(1), groups = op_.key_heads, e = op_.key_dim, values = op_.values() / groups;
    const int wide = groups * (2 * e + 2 * values), steps = op_.value_heads / groups;
    const auto qkvz = mx::reshape(columns(x, 0, wide), {1, length, groups, 2 * e + 2 * values});
    const auto ba = mx::reshape(columns(x, wide, wide + 2 * op_.value_heads), {1, length, groups, 2 * steps});
    const auto cut = [&](const mx::array& from, int begin, int end) {
      return mx::reshape(columns(from, begin, end), {1, length, groups * (end - begin)});
    };
    return {mx::concatenate({cut(qkvz, 0, e), cut(qkvz, e, 2 * e), cut(qkvz, 2 * e, 2 * e + values)}, -1),
            cut(qkvz, 2 * e + values, 2 * e + 2 * values), cut(ba, 0, steps), cut(ba, steps, 2 * steps)};
  }
  /** Of length 1, times `scale` * sqrt(key_dim). */
  mx::array unit(const mx::array& x, float scale) const {
    const auto normed = nn::norm(x, arch::Norm{.eps = op_.unit_eps / float(op_.key_dim), .weightless = true}, std::nullopt, std::nullopt);
    return mx::multiply(normed, mx::array(scale, x.dtype()));
  }

  arch::GatedDelta op_;
  std::string at_;
  std::shared_ptr<nn::Linear> in_, out_;
  mx::array conv_, dt_bias_, a_log_;
  NormBlock norm_;
};

}  // namespace

std::unique_ptr<Block> make_gated_delta(const arch::GatedDelta& op, Store& store, const std::string& at) {
  return std::make_unique<GatedDeltaBlock>(op, store, at);
}

}  // namespace mlxlm::model
