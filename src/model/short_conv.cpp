// The gated short convolution. Reference: mlx_lm/models/lfm2.py ShortConv
#include <mlx/ops.h>

#include "base/error.h"
#include "model/blocks.h"

namespace mlxlm::model {
namespace {

class ShortConvBlock final : public Mixer {
 public:
  ShortConvBlock(const arch::ShortConv& op, Store& store, const std::string& at)
      : width_(op.width),
        in_(store.map({at + op.at + ".in_proj"})),
        out_(store.map({at + op.at + ".out_proj"})),
        conv_(store.vector(at + op.at + ".conv.weight")) {
    if (op.bias) bias_ = store.vector(at + op.at + ".conv.bias");
  }

 protected:
  mx::array before(const mx::array& x) override { return (*in_)(x); }
  mx::array after(const mx::array& mixed) override { return (*out_)(mixed); }
  mx::array mix(const mx::array& projected, cache::Cache* cache) override {
    auto* held = dynamic_cast<cache::RecurrentCache*>(cache);
    if (cache != nullptr && held == nullptr) throw Error(Code::internal, "convolution", "got the cache of another kind of layer");
    const auto x = mx::multiply(columns(projected, 0, width_), columns(projected, 2 * width_, 3 * width_));
    const auto convolved = nn::short_conv(x, held ? held->slot(0) : std::nullopt, conv_, bias_);
    if (held != nullptr) {
      held->set_slot(0, mx::contiguous(convolved[1]));
      held->advance(projected.shape(1));
    }
    return mx::multiply(columns(projected, width_, 2 * width_), convolved[0]);
  }

 private:
  int width_;
  std::shared_ptr<nn::Linear> in_, out_;
  mx::array conv_;
  std::optional<mx::array> bias_;
};

}  // namespace

std::unique_ptr<Block> make_short_conv(const arch::ShortConv& op, Store& store, const std::string& at) {
  return std::make_unique<ShortConvBlock>(op, store, at);
}

}  // namespace mlxlm::model
