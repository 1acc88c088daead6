// Attention blocks: grouped heads, and latent attention in its absorbed form.
#include <cmath>
#include <limits>

#include <mlx/fast.h>
#include <mlx/ops.h>

#include "base/error.h"
#include "cache/quantized.h"
#include "model/blocks.h"

namespace mlxlm::model {
namespace {

/** The cache of an attention layer, or null. */
cache::AttentionCache* attention_cache(cache::Cache* cache) {
  if (cache == nullptr) return nullptr;
  auto* found = dynamic_cast<cache::AttentionCache*>(cache);
  if (found == nullptr) throw Error(Code::internal, "attention", "got the cache of another kind of layer");
  return found;
}

/** q [B,H,L,E] over what a cache holds with the new k and v -> [B,L,H*F]. */
mx::array attend(const mx::array& q, mx::array k, mx::array v, cache::AttentionCache* held, float scale, int window, float softcap) {
  auto* quantized = dynamic_cast<cache::QuantizedCache*>(held);
  if (quantized != nullptr && kernels::cpu::active()) {
    const auto rows = quantized->update_quantized(k, v);
    const auto out = kernels::cpu::attention(q, rows.keys, rows.values, {.scale = scale, .window = window, .softcap = softcap});
    return mx::reshape(out, {q.shape(0), q.shape(2), q.shape(1) * rows.values.dims()});
  }
  if (held != nullptr) std::tie(k, v) = held->update(k, v);
  return nn::attention(q, k, v, scale, window, softcap);
}

class AttentionBlock final : public Mixer {
 public:
  AttentionBlock(const arch::Attention& op, Store& store, const std::string& at) : op_(op), rotation_(op.rope) {
    const std::string path = at + op.at + ".";
    qkv_ = op.fused_qkv.empty() ? store.map({path + op.q, path + op.k, path + op.v}) : store.map({path + op.fused_qkv});
    o_ = store.map({path + op.o});
    if (op.q_norm) q_norm_.emplace(*op.q_norm, store, path + op.q_norm->at);
    if (op.k_norm) k_norm_.emplace(*op.k_norm, store, path + op.k_norm->at);
    scale_ = op.scale != 0.f ? op.scale : 1.f / std::sqrt(float(op.head_dim));
  }

 protected:
  mx::array before(const mx::array& x) override { return (*qkv_)(x); }
  mx::array after(const mx::array& mixed) override { return (*o_)(mixed); }
  mx::array mix(const mx::array& qkv, cache::Cache* cache) override {
    const int q = op_.heads * op_.head_dim, kv = op_.kv_heads * op_.head_dim, length = qkv.shape(1);
    auto* held = attention_cache(cache);
    const int offset = held != nullptr ? held->offset() : 0;
    const int wide = op_.gated ? 2 * q : q;
    auto own = columns(qkv, 0, wide);
    std::optional<mx::array> gate;
    if (op_.gated) {  // of each head, the query and then the gate
      const auto both = mx::reshape(own, {1, length, op_.heads, 2 * op_.head_dim});
      own = mx::reshape(columns(both, 0, op_.head_dim), {1, length, q});
      gate = mx::reshape(columns(both, op_.head_dim, 2 * op_.head_dim), {1, length, q});
    }
    const auto queries = tempered(rotation_(heads(own, op_.heads, q_norm_), offset), offset);
    const auto keys = rotation_(heads(columns(qkv, wide, wide + kv), op_.kv_heads, k_norm_), offset);
    const auto values = mx::transpose(split(columns(qkv, wide + kv, wide + 2 * kv), op_.kv_heads), {0, 2, 1, 3});
    // One new token sees all that a rotating cache holds.
    int window = op_.window.value_or(0);
    if (const int kept = held != nullptr ? held->max_size() : 0; kept > 0) window = length == 1 ? 0 : window > 0 ? window : kept;
    if (held != nullptr) held->make_room(length);
    const auto mixed = attend(queries, keys, values, held != nullptr ? &held->inner() : nullptr, scale_, window, op_.softcap);
    return gate ? mx::multiply(mixed, mx::sigmoid(*gate)) : mixed;
  }

 private:
  mx::array split(const mx::array& x, int count) const { return mx::reshape(x, {x.shape(0), x.shape(1), count, op_.head_dim}); }
  mx::array heads(const mx::array& x, int count, const std::optional<NormBlock>& norm) const {
    if (!norm) return split(x, count);
    return op_.norm_full_width ? split((*norm)(x), count) : (*norm)(split(x, count));
  }

  /** q [1,H,L,E]. Reference: mlx_lm/models/llama4.py attn_scales */
  mx::array tempered(const mx::array& q, int offset) const {
    if (op_.temperature == 0.f) return q;
    std::vector<float> scales;
    for (int l = 0; l < q.shape(2); ++l) scales.push_back(arch::query_scale(op_.temperature, op_.temperature_tokens, offset + l));
    const auto by_position = mx::array(scales.data(), {q.shape(2), 1}, mx::float32);
    return mx::astype(mx::multiply(q, by_position), q.dtype());
  }

  arch::Attention op_;
  Rotation rotation_;
  std::shared_ptr<nn::Linear> qkv_, o_;
  std::optional<NormBlock> q_norm_, k_norm_;
  float scale_;
};

/** Reference: mlx_lm/models/deepseek_v3.py. The cache holds the latent [B,1,S,R] and the shared rotary key [B,1,S,P]. */
class MlaBlock final : public Mixer {
 public:
  MlaBlock(const arch::Mla& op, Store& store, const std::string& at) : op_(op), rotation_(op.rope) {
    const std::string path = at + op.at + ".";
    if (op.q_lora == 0) {
      q_ = store.map({path + "q_proj"});
    } else {
      q_a_ = store.map({path + "q_a_proj"});
      q_norm_.emplace(arch::Norm{.eps = op.norm_eps}, store, path + "q_a_layernorm");
      q_ = store.map({path + "q_b_proj"});
    }
    kv_a_ = store.map({path + "kv_a_proj_with_mqa"});
    kv_norm_.emplace(arch::Norm{.eps = op.norm_eps}, store, path + "kv_a_layernorm");
    embed_q_.emplace(store.heads(path + "embed_q"));
    unembed_out_.emplace(store.heads(path + "unembed_out"));
    o_ = store.map({path + "o_proj"});
  }

 protected:
  /** Queries and compressed keys side by side. */
  mx::array before(const mx::array& x) override {
    const auto q = (*q_)(q_a_ ? (*q_norm_)((*q_a_)(x)) : x);
    return mx::concatenate({q, (*kv_a_)(x)}, -1);
  }
  mx::array after(const mx::array& mixed) override { return (*o_)(mixed); }
  mx::array mix(const mx::array& projected, cache::Cache* cache) override {
    const int length = projected.shape(1), q_dims = op_.heads * (op_.nope_dim + op_.rope_dim);
    auto* held = attention_cache(cache);
    const int offset = held != nullptr ? held->offset() : 0;
    const auto q = mx::reshape(columns(projected, 0, q_dims), {1, length, op_.heads, op_.nope_dim + op_.rope_dim});
    const auto q_nope = mx::transpose(columns(q, 0, op_.nope_dim), {0, 2, 1, 3});
    const auto q_rope = rotation_(columns(q, op_.nope_dim, op_.nope_dim + op_.rope_dim), offset);
    const auto compressed = columns(projected, q_dims, projected.shape(2));
    auto latent = mx::expand_dims((*kv_norm_)(columns(compressed, 0, op_.kv_lora)), 1);
    auto key = rotation_(mx::expand_dims(columns(compressed, op_.kv_lora, op_.kv_lora + op_.rope_dim), 2), offset);
    if (held != nullptr) std::tie(latent, key) = held->update(latent, key);
    if (length <= nn::stepwise_tokens) return merge(token_by_token(q_nope, q_rope, latent, key));
    const auto scores = mx::where(causal(length, latent.shape(2)), position_scores(q_rope, key), number(lowest(q.dtype()), q));
    return merge(attend(q_nope, (*embed_q_)(latent, false), (*unembed_out_)(latent, true), scores));
  }

 private:
  static mx::array number(float value, const mx::array& like) { return mx::array(value, like.dtype()); }
  static float lowest(mx::Dtype dtype) { return dtype == mx::float16 ? -65504.f : -3.38e38f; }
  static mx::array causal(int length, int keys) {
    const auto query = mx::expand_dims(mx::arange(keys - length, keys, mx::int32), 1);
    return mx::less_equal(mx::expand_dims(mx::arange(0, keys, mx::int32), 0), query);
  }
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& scores) const {
    const auto logits = mx::add(mx::matmul(mx::multiply(q, number(op_.scale, q)), mx::swapaxes(k, -1, -2)), scores);
    return mx::matmul(mx::softmax(logits, -1, true), v);
  }
  mx::array position_scores(const mx::array& q, const mx::array& key) const {
    return mx::matmul(mx::multiply(q, number(op_.scale, q)), mx::swapaxes(key, -1, -2));
  }
  /** In the latent space, each token by itself: the same bits whatever comes with it. */
  mx::array token_by_token(const mx::array& q_nope, const mx::array& q_rope, const mx::array& latent, const mx::array& key) const {
    const int length = q_nope.shape(2), keys = latent.shape(2);
    const auto rows = [](const mx::array& a, int from, int to) {
      return mx::slice(a, {0, 0, from, 0}, {a.shape(0), a.shape(1), to, a.shape(3)});
    };
    std::vector<mx::array> parts;
    for (int l = 0; l < length; ++l) {
      const int visible = keys - length + l + 1;
      const auto seen = rows(latent, 0, visible);
      const auto scores = position_scores(rows(q_rope, l, l + 1), rows(key, 0, visible));
      parts.push_back((*unembed_out_)(attend((*embed_q_)(rows(q_nope, l, l + 1), true), seen, seen, scores), true));
    }
    return length == 1 ? parts[0] : mx::concatenate(parts, 2);
  }
  mx::array merge(const mx::array& heads) const {
    return mx::reshape(mx::transpose(heads, {0, 2, 1, 3}), {heads.shape(0), heads.shape(2), op_.heads * op_.v_dim});
  }

  arch::Mla op_;
  Rotation rotation_;
  std::shared_ptr<nn::Linear> q_a_, q_, kv_a_, o_;
  std::optional<NormBlock> q_norm_, kv_norm_;
  std::optional<nn::HeadMaps> embed_q_, unembed_out_;
};

}  // namespace

std::unique_ptr<Block> make_attention(const arch::Attention& op, Store& store, const std::string& at) {
  return std::make_unique<AttentionBlock>(op, store, at);
}

std::unique_ptr<Block> make_mla(const arch::Mla& op, Store& store, const std::string& at) {
  return std::make_unique<MlaBlock>(op, store, at);
}

}  // namespace mlxlm::model
