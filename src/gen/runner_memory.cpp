// What a sequence's caches take, now and at most, and what becomes of them when they are lost.
#include <algorithm>
#include <map>

#include "cache/quantized.h"
#include "gen/memory.h"
#include "gen/runner.h"
#include "plan/plan.h"

namespace mlxlm::gen {
namespace {

constexpr int kBlockTokens = 256;  // as caches grow

/** Nothing where they are not quantized. */
const cache::QuantizedCache* quantized_rows(const cache::AttentionCache& c) {
  return dynamic_cast<const cache::QuantizedCache*>(&c.inner());
}

/** What is quantized already stays as it is; it has no floats left to convert. */
engine::CacheOptions options_of(const cache::AttentionCache* c, engine::CacheOptions wanted) {
  const auto* rows = c != nullptr ? quantized_rows(*c) : nullptr;
  if (rows == nullptr) return wanted;
  wanted.kv_bits = rows->bits();
  wanted.kv_group_size = rows->group_size();
  wanted.quantized_from_tokens = 0;
  return wanted;
}

}  // namespace

/** A cache grows by half of itself, in whole blocks; one with a limit holds a step more than that. Floats turn into quantized rows while
 * both are there, unless they are quantized from the first token on. What cannot forget is copied before it sees a draft. limit_tokens 0 =
 * none. */
int64_t ModelRunner::layer_bytes(std::size_t layer, int64_t tokens, int64_t limit_tokens, const engine::CacheOptions& o) const {
  const auto& kind = layout_[layer];
  const auto grown_rows = [](int64_t held) {
    return held <= kBlockTokens ? kBlockTokens : (held * 3 / 2 + kBlockTokens) / kBlockTokens * kBlockTokens;
  };
  const bool chunked = kind.kind == plan::CacheKind::chunked;
  const auto bytes_of = [&](int64_t held, bool quantized) {
    const auto step =
        std::max(o.max_kv_size_tokens > 0 || o.kv_bits > 0 ? limited_chunk_tokens_ : chunk_tokens_, o.with_drafts ? kBlockTokens : 0);
    const auto rows = chunked            ? grown_rows(std::min<int64_t>(held, kind.window_tokens))
                      : limit_tokens > 0 ? std::min(held + kBlockTokens, limit_tokens + step)
                                         : grown_rows(held);
    const auto values = rows * kind.values_per_token;
    // A group has its codes, a scale and a bias.
    const auto kept =
        quantized ? values * o.kv_bits / 8 + values / o.kv_group_size * 2 * layer_value_bytes_[layer] : values * layer_value_bytes_[layer];
    const bool copied = o.with_drafts && (limit_tokens > 0 || chunked || layer_fixed_bytes_[layer] > 0);
    return (kept + layer_fixed_bytes_[layer]) * (copied ? 2 : 1);
  };
  const bool converted = o.kv_bits > 0 && tokens >= o.quantized_from_tokens;
  if (!converted || o.quantized_from_tokens == 0) return bytes_of(tokens, converted);
  return std::max(bytes_of(tokens, true), bytes_of(o.quantized_from_tokens, true) + bytes_of(o.quantized_from_tokens, false));
}

/** A draft model has caches of its own. */
int64_t ModelRunner::draft_bytes(int64_t tokens, const engine::CacheOptions& o) const {
  if (!o.with_draft_model || draft_model_ == nullptr) return 0;
  return cache_bytes(draft_model_->description(), tokens * 3 / 2 + kBlockTokens,
                     {.max_kv_size_tokens = o.max_kv_size_tokens, .value_bytes = draft_value_bytes_});
}

int64_t ModelRunner::cost_bytes(int64_t tokens, const engine::CacheOptions& o) const {
  int64_t bytes = draft_bytes(tokens, o);
  for (std::size_t i = 0; i < layout_.size(); ++i) {
    const int64_t window = layout_[i].kind == plan::CacheKind::rotating ? layout_[i].window_tokens : 0;
    const int64_t most = o.max_kv_size_tokens;
    bytes += layer_bytes(i, tokens, window == 0 || most == 0 ? window + most : std::min(window, most), o);
  }
  return bytes;
}

int64_t ModelRunner::growth_bytes(engine::CacheId cache, std::optional<int> copied, int64_t tokens, const engine::CacheOptions& o) const {
  const auto& h = held(cache);
  const int cut = h.tokens - copied.value_or(h.tokens);
  int64_t bytes = draft_bytes(tokens, o);
  for (std::size_t i = 0; i < h.caches.size(); ++i) {
    const auto* attention = dynamic_cast<const cache::AttentionCache*>(h.caches[i].get());
    const int64_t limit = attention != nullptr ? attention->max_size() : 0;
    const auto mine = options_of(attention, o);
    const auto alone = layer_bytes(i, tokens, limit, mine);
    const auto* kv = attention != nullptr ? dynamic_cast<const cache::KvCache*>(&attention->inner()) : nullptr;
    const int shared = kv == nullptr ? 0
                       : copied      ? std::max(0, kv->offset() - cut) / cache::shared_block_rows * cache::shared_block_rows
                                     : kv->shared_rows();
    const int64_t now = h.caches[i] ? h.caches[i]->bytes() : 0;
    if (shared == 0) {
      bytes += std::max(alone, now);
      continue;
    }
    // What is shared stays whole; rows of its own come after it, unless all become its own.
    const int64_t kept = copied ? now : kv->shared_bytes();
    bytes += std::max(alone, kept + std::max(now - kept, layer_bytes(i, tokens - shared, limit, mine)));
  }
  return bytes;
}

/** Neither a window of the model's own nor recurrent states show the chunks; a limit does by what is forgotten. */
bool ModelRunner::is_replaceable(engine::CacheId cache) const {
  const auto& h = held(cache);
  for (std::size_t i = 0; i < h.caches.size(); ++i) {
    const auto* attention = dynamic_cast<const cache::AttentionCache*>(h.caches[i].get());
    if (attention == nullptr) continue;
    const int window = layout_[i].kind == plan::CacheKind::rotating ? layout_[i].window_tokens : 0;
    if (attention->max_size() != window || quantized_rows(*attention) != nullptr) return false;
  }
  return true;
}

/** Attention sums a quantized window from its oldest row on, which is another one after another chunk. */
bool ModelRunner::chunks_show(const engine::CacheOptions& options) const {
  if (options.kv_bits == 0) return false;
  return options.max_kv_size_tokens > 0 ||
         std::ranges::any_of(layout_, [](const auto& layer) { return layer.kind == plan::CacheKind::rotating; });
}

int64_t ModelRunner::held_bytes() const {
  std::map<const void*, int64_t> buffers;
  for (const auto& [id, h] : held_) {
    for (const auto& c : h.caches) {
      if (c) c->add_buffers(buffers);
    }
  }
  int64_t total = 0;
  for (const auto& [where, bytes] : buffers) total += bytes;
  return total;
}

}  // namespace mlxlm::gen
