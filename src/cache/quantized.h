// Caches of quantized keys and values. Reference: mlx_lm/models/cache.py QuantizedKVCache
#pragma once

#include <memory>
#include <vector>

#include "cache/cache.h"
#include "kernels/cpu/kernels.h"

namespace mlxlm::cache {

/** Keys and values as mx.quantize lays them out; Planes are packed, scales and biases of the keys, then those of the values. */
class QuantizedCache : public AttentionCache {
 public:
  QuantizedCache(int bits, int group_size) : bits_(bits), group_size_(group_size) {}
  struct Rows {
    kernels::cpu::QuantizedRows keys, values;
  };
  /** As update(), for attention that reads quantized rows. */
  virtual Rows update_quantized(const mx::array& k, const mx::array& v) = 0;
  std::pair<mx::array, mx::array> update(const mx::array& k, const mx::array& v) final;
  std::vector<mx::array> state() const final;
  int64_t bytes() const final;
  /** The dtype is that of the scales. */
  std::optional<KvShape> shape() const final;
  int bits() const { return bits_; }
  int group_size() const { return group_size_; }

 protected:
  Rows as_rows(const Planes& planes) const;
  Planes copied_planes() const;
  void store_planes(Stored& s) const;
  Planes planes_;  // empty, or 6 of [B,K,C,*]
  int bits_, group_size_;
};

/** As WritePlan, for the six planes. */
struct QuantizedPlan {
  Planes planes{}, old_planes{};
  std::vector<WritePlan::Copy> copies{};
  int write_at = 0, visible_rows = 0, bits = 0, group_size = 0;
};

/** Keeps everything. */
class QuantizedKvCache final : public QuantizedCache {
 public:
  /** `planes` (the cache's own) hold `offset` tokens or more; empty = nothing yet. */
  QuantizedKvCache(int bits, int group_size, Planes planes = {}, int offset = 0);
  Rows update_quantized(const mx::array& k, const mx::array& v) override;
  /** As plan_write(), for kernels that quantize the new rows themselves. */
  QuantizedPlan plan_quantized(int tokens, const KvShape& shape);
  int offset() const override { return offset_; }
  bool trimmable() const override { return true; }
  int trim(int n) override;
  std::unique_ptr<Cache> copy() const override;
  Stored stored() const override;

 private:
  int offset_ = 0;
};

/** Keeps the first and the most recent tokens; the reference has no such class, so only this program reads its files. */
class QuantizedRotatingKvCache final : public QuantizedCache {
 public:
  QuantizedRotatingKvCache(int bits, int group_size, const Ring& ring, Planes planes = {});
  Rows update_quantized(const mx::array& k, const mx::array& v) override;
  int offset() const override { return ring_.offset; }
  bool trimmable() const override { return ring_.trimmable(); }
  int trim(int n) override { return ring_.trim(n); }
  int max_size() const override { return ring_.max_size; }
  bool can_rewind(int tokens, bool) const override { return ring_.offset + tokens < ring_.max_size; }
  /** A call of several tokens puts the rows of a full window in another order, which shows in what later tokens sum, if only by rounding.
   */
  bool one_call_agrees(int tokens) const override { return tokens == 1 || can_rewind(tokens, true); }
  std::unique_ptr<Cache> copy() const override;
  Stored stored() const override;

 private:
  Ring ring_;
};

/** How caches are to be quantized; bits 0 = not at all. */
struct Quantization {
  int bits = 0, group_size = 64;
  int start_tokens = 0;  // a cache is converted once it has seen so many
};

/** Six planes of k [B,K,L,E] and v [B,K,L,F]. */
Planes quantize_rows(const mx::array& k, const mx::array& v, int bits, int group_size);

/** Throws Error(bad_request) for bits or groups that do not exist, and when the group size does not divide what a layer keeps for a head.
 */
void check_quantization(const arch::Model& model, const Quantization& wanted);

/** Converts the caches that are due; none of them when this throws. Reference: mlx_lm/generate.py maybe_quantize_kv_cache */
void quantize_caches(Caches& caches, const Quantization& wanted);

}  // namespace mlxlm::cache
