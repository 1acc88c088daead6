// The Mamba-2 mixer. Reference: mlx_lm/models/nemotron_h.py NemotronHMamba2Mixer
#include <mlx/fast.h>
#include <mlx/ops.h>

#include "base/error.h"
#include "model/blocks.h"

namespace mlxlm::model {
namespace {

class Mamba2Block final : public Mixer {
 public:
  Mamba2Block(const arch::Mamba2& op, Store& store, const std::string& at)
      : op_(op),
        in_(store.map({at + op.at + ".in_proj"})),
        out_(store.map({at + op.at + ".out_proj"})),
        conv_(store.vector(at + op.at + ".conv1d.weight")),
        dt_bias_(store.vector(at + op.at + ".dt_bias")),
        a_log_(store.vector(at + op.at + ".A_log")),
        d_(store.vector(at + op.at + ".D")) {
    if (op.norm_group > 0) norm_ = store.vector(at + op.at + ".norm.weight");
    if (op.conv_bias) conv_bias_ = store.vector(at + op.at + ".conv1d.bias");
  }

 protected:
  mx::array before(const mx::array& x) override { return (*in_)(x); }
  mx::array after(const mx::array& mixed) override { return (*out_)(mixed); }
  mx::array mix(const mx::array& projected, cache::Cache* cache) override {
    const int batch = projected.shape(0), length = projected.shape(1), inner = op_.heads * op_.head_dim, wide = op_.groups * op_.state;
    auto* held = dynamic_cast<cache::RecurrentCache*>(cache);
    if (cache != nullptr && held == nullptr) throw Error(Code::internal, "mamba", "got the cache of another kind of layer");
    const auto gate = columns(projected, 0, inner);
    const auto dt = columns(projected, 2 * inner + 2 * wide, 2 * inner + 2 * wide + op_.heads);
    const auto convolved =
        nn::short_conv(columns(projected, inner, 2 * inner + 2 * wide), held ? held->slot(0) : std::nullopt, conv_, conv_bias_);
    const auto mixed = nn::activate(convolved[0], arch::Act::silu);
    const auto scanned =
        nn::ssm_scan(mx::reshape(columns(mixed, 0, inner), {batch, length, op_.heads, op_.head_dim}), a_log_,
                     mx::reshape(columns(mixed, inner, inner + wide), {batch, length, op_.groups, op_.state}),
                     mx::reshape(columns(mixed, inner + wide, inner + 2 * wide), {batch, length, op_.groups, op_.state}),
                     mx::astype(d_, projected.dtype()), dt, dt_bias_, held ? held->slot(1) : std::nullopt, op_.dt_min, op_.dt_max);
    if (held != nullptr) {
      held->set_slot(0, mx::contiguous(convolved[1]));
      held->set_slot(1, scanned[1]);
      held->advance(length);
    }
    auto y = mx::reshape(scanned[0], {batch, length, inner});
    if (norm_ && op_.norm_before_gate) y = normed(y);
    y = mx::multiply(nn::activate(gate, arch::Act::silu), y);
    return norm_ && !op_.norm_before_gate ? normed(y) : y;
  }

 private:
  mx::array normed(const mx::array& y) const {
    const auto grouped = mx::reshape(y, {y.shape(0), y.shape(1), y.shape(2) / op_.norm_group, op_.norm_group});
    const auto unit = nn::norm(grouped, arch::Norm{.eps = op_.norm_eps, .weightless = true}, std::nullopt, std::nullopt);
    return mx::multiply(*norm_, mx::reshape(unit, y.shape()));
  }

  arch::Mamba2 op_;
  std::shared_ptr<nn::Linear> in_, out_;
  mx::array conv_, dt_bias_, a_log_, d_;
  std::optional<mx::array> conv_bias_, norm_;
};

}  // namespace

std::unique_ptr<Block> make_mamba2(const arch::Mamba2& op, Store& store, const std::string& at) {
  return std::make_unique<Mamba2Block>(op, store, at);
}

}  // namespace mlxlm::model
