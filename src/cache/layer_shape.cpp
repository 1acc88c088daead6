// Shapes of what layers remember.
#include "cache/layer_shape.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/error.h"

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

[[noreturn]] void does_not_fit(std::size_t i, const std::string& problem) {
  throw Error(Code::bad_request, fmt::format("cache {}", i), problem + "; is it of another model?");
}

void check_attention(std::size_t i, const AttentionCache& c, const LayerShape& wanted) {
  using plan::CacheKind;
  const auto& layer = wanted.layer;
  if (layer.kind == CacheKind::recurrent) does_not_fit(i, "got one of attention, wanted one of a recurrent layer");
  const auto* chunked = dynamic_cast<const ChunkedKvCache*>(&c);
  const int chunk = chunked != nullptr ? chunked->chunk_tokens() : 0,
            wanted_chunk = layer.kind == CacheKind::chunked ? layer.window_tokens : 0;
  if (chunk != wanted_chunk) does_not_fit(i, fmt::format("got chunks of {} tokens, wanted {} (0 = none)", chunk, wanted_chunk));
  // One token sees all that the cache holds.
  if (layer.kind == CacheKind::rotating && c.max_size() > layer.window_tokens) {
    does_not_fit(i, fmt::format("got a window of {} tokens, wanted at most {}", c.max_size(), layer.window_tokens));
  }
  const auto held = c.shape();
  if (!held) return;
  if (wanted.kv) {
    const auto& kv = *wanted.kv;
    if (held->kv_heads == kv.kv_heads && held->key_dims == kv.key_dims && held->value_dims == kv.value_dims) return;
    does_not_fit(i, fmt::format("got {} heads of {} and {} numbers, wanted {} of {} and {}", held->kv_heads, held->key_dims,
                                held->value_dims, kv.kv_heads, kv.key_dims, kv.value_dims));
  }
  const auto values = static_cast<int64_t>(held->kv_heads) * (held->key_dims + held->value_dims);
  if (values != layer.values_per_token) {
    does_not_fit(i, fmt::format("got {} numbers a token, wanted {}", values, layer.values_per_token));
  }
}

void check_recurrent(std::size_t i, const RecurrentCache& c, const LayerShape& wanted) {
  if (wanted.layer.kind != plan::CacheKind::recurrent) does_not_fit(i, "got one of a recurrent layer, wanted one of attention");
  if (c.slots() != wanted.layer.states) does_not_fit(i, fmt::format("got {} states, wanted {}", c.slots(), wanted.layer.states));
  for (int k = 0; k < c.slots(); ++k) {
    const auto& slot = c.slot(k);
    if (!slot || wanted.slots.empty() || std::ranges::equal(slot->shape(), wanted.slots[k])) continue;
    does_not_fit(
        i, fmt::format("got state {} of shape [{}], wanted [{}]", k, fmt::join(slot->shape(), ", "), fmt::join(wanted.slots[k], ", ")));
  }
}

}  // namespace

void check_fits(const Caches& caches, const arch::Model& model) {
  const auto shapes = layer_shapes(model);
  if (caches.size() != shapes.size()) {
    throw Error(Code::bad_request, "cache",
                fmt::format("got caches of {} layers, wanted {}; is it of another model?", caches.size(), shapes.size()));
  }
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const bool remembers = shapes[i].layer.kind != plan::CacheKind::none;
    if (remembers != (caches[i] != nullptr)) {
      does_not_fit(i, remembers ? "got none, wanted one" : "got one, wanted none: its layer remembers nothing");
    }
    if (const auto* attention = dynamic_cast<const AttentionCache*>(caches[i].get()))
      check_attention(i, *attention, shapes[i]);
    else if (const auto* recurrent = dynamic_cast<const RecurrentCache*>(caches[i].get()))
      check_recurrent(i, *recurrent, shapes[i]);
  }
}

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
