// Shapes of what layers remember.
#include "cache/layer_shape.h"

#include <algorithm>

namespace mlxlm::cache {
namespace {

void note(LayerShape& shape, const arch::Attention& op) {
  shape.kv = LayerShape::Kv{op.kv_heads, op.head_dim, op.head_dim};
}
void note(LayerShape& shape, const arch::Mla& op) {
  shape.kv = LayerShape::Kv{1, op.kv_lora, op.rope_dim};
}
void note(LayerShape& shape, const arch::Mamba2& op) {
  const int inner = op.heads * op.head_dim;
  shape.slots = {{1, op.conv - 1, inner + 2 * op.groups * op.state}, {1, op.heads, op.head_dim, op.state}};
}
void note(LayerShape& shape, const arch::GatedDelta& op) {
  shape.slots = {{1, op.conv - 1, op.channels()}, {1, op.value_heads, op.value_dim, op.key_dim}};
}
void note(LayerShape& shape, const arch::ShortConv& op) {
  shape.slots = {{1, op.conv - 1, op.width}};
}
template <class Other>
void note(LayerShape&, const Other&) {}

}  // namespace

std::vector<LayerShape> layer_shapes(const arch::Model& model) {
  std::vector<LayerShape> shapes;
  for (const auto& layer : plan::cache_layout(model)) shapes.push_back({.layer = layer});
  std::size_t next = 0;
  for (const auto& layer : model.layers) {
    const auto first = next;
    for (const auto& step : layer) {
      for (const auto& op : step.ops) {
        if (plan::remembers(op)) std::visit([&](const auto& known) { note(shapes[next++], known); }, op);
      }
    }
    next = std::max(next, first + 1);
  }
  return shapes;
}

}  // namespace mlxlm::cache
