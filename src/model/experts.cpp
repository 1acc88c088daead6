// Routed experts. Reference: mlx_lm/models/qwen3_moe.py, deepseek_v3.py, nemotron_h.py
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "model/blocks.h"

namespace mlxlm::model {
namespace {

class MoeBlock final : public Block {
 public:
  MoeBlock(const arch::Moe& op, Store& store, const std::string& at) : op_(op) {
    const std::string path = at + op.at + ".", experts = path + op.experts_at + ".", shared = path + op.shared_at + ".";
    router_ = store.map({path + op.router});
    if (op.correction_bias) correction_ = mx::astype(store.vector(path + op.router + ".e_score_correction_bias"), mx::float32);
    up_ = op.gated ? store.map({experts + op.gate, experts + op.up}) : store.map({experts + op.up});
    down_ = store.map({experts + op.down});
    if (op.latent > 0) {
      into_latent_ = store.map({path + "fc1_latent_proj"});
      from_latent_ = store.map({path + "fc2_latent_proj"});
    }
    if (op.shared_hidden > 0) {
      shared_up_ = op.shared_gated ? store.map({shared + "gate_proj", shared + "up_proj"}) : store.map({shared + "up_proj"});
      shared_down_ = store.map({shared + "down_proj"});
      if (!op.shared_gate.empty()) shared_gate_ = store.map({path + op.shared_gate});
    }
  }

  mx::array operator()(const mx::array& x, const Parts&) override {
    const auto flat = mx::reshape(x, {-1, x.shape(2)});
    const auto chosen = nn::route((*router_)(flat), op_, correction_);
    auto input = into_latent_ ? (*into_latent_)(flat) : flat;
    if (op_.weigh_input) input = mx::multiply(input, mx::astype(chosen[1], input.dtype()));                        // [T,1]
    const auto outputs = down_->gather(hidden(up_->gather(input, chosen[0], false), op_.gated), chosen[0], true);  // [T,k,D]
    const auto weighed = op_.weigh_input ? outputs : mx::multiply(outputs, mx::expand_dims(chosen[1], -1));
    auto y = mx::astype(mx::sum(weighed, 1), x.dtype());
    if (from_latent_) y = (*from_latent_)(y);
    if (shared_up_) {
      const auto shared = (*shared_down_)(hidden((*shared_up_)(flat), op_.shared_gated));
      y = mx::add(y, shared_gate_ ? mx::multiply(mx::sigmoid((*shared_gate_)(flat)), shared) : shared);
    }
    return mx::reshape(y, x.shape());
  }

 private:
  mx::array hidden(const mx::array& up, bool gated) const { return gated ? nn::glu(up, op_.act) : nn::activate(up, op_.act); }

  arch::Moe op_;
  std::shared_ptr<nn::Linear> router_, up_, down_, into_latent_, from_latent_, shared_up_, shared_down_, shared_gate_;
  std::optional<mx::array> correction_;
};

}  // namespace

std::unique_ptr<Block> make_moe(const arch::Moe& op, Store& store, const std::string& at) {
  return std::make_unique<MoeBlock>(op, store, at);
}

}  // namespace mlxlm::model
