// What a layer remembers between calls. Reference: mlx_lm/models/cache.py
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <mlx/array.h>

#include "arch/model.h"
#include "cache/ring.h"

namespace mlxlm::cache {

namespace mx = mlx::core;

/** A cache as prompt-cache files hold it: the reference's class name, and its state by path ("0.1" = second item of the first). */
struct Stored {
  std::string kind{};
  std::map<std::string, std::optional<mx::array>> arrays{};  // nothing = None
  std::map<std::string, int64_t> numbers{};
  /** Where an array above lies in several places: these, joined along the third axis. */
  std::map<std::string, std::vector<mx::array>> parts{};
  std::vector<std::shared_ptr<const void>> lent{};  // while these live, nobody writes to the memory of what others see as well
};

/** Thread: the one that owns MLX. */
class Cache {
 public:
  virtual ~Cache() = default;
  /** Tokens seen since the beginning; the position of the next token. */
  virtual int offset() const = 0;
  virtual bool trimmable() const = 0;
  /** Forgets the last n tokens, or as many as it can; returns how many it forgot. */
  virtual int trim(int n) = 0;
  /** The most that trim() forgets now. */
  virtual int trimmable_tokens() const { return trimmable() ? offset() : 0; }
  /** Whether rewind() can take back any of `tokens` tokens that are about to be added; else a copy made before must take this cache's
   * place. */
  virtual bool can_rewind(int /*tokens*/, bool /*one_call*/) const { return trimmable(); }
  /** Takes back the last n tokens, as can_rewind() promised; the first token of the latest call stays. */
  virtual void rewind(int n) { trim(n); }
  /** Whether `tokens` tokens in one call see what they see one by one. */
  virtual bool one_call_agrees(int /*tokens*/) const { return true; }
  /** Arrays that must be evaluated to make the cache independent of the graph. */
  virtual std::vector<mx::array> state() const = 0;
  virtual int64_t bytes() const = 0;
  /** Later updates of either do not show in the other; memory may be shared as long as nobody can tell. */
  virtual std::unique_ptr<Cache> copy() const = 0;
  /** The same with memory of its own. */
  virtual std::unique_ptr<Cache> separate_copy() const { return copy(); }
  /** Bytes by where they are, so that memory of several caches counts once. */
  virtual void add_buffers(std::map<const void*, int64_t>& bytes) const { bytes[this] = this->bytes(); }
  /** Throws Error(unsupported) for kinds that have no place in a file. */
  virtual Stored stored() const;
};

using CachePtr = std::unique_ptr<Cache>;
using Caches = std::vector<CachePtr>;  // as plan::cache_layout; null where a layer remembers nothing

/** Keys and values that several caches see and nobody changes any more: the first `rows` rows of [1,K,C,E] and [1,K,C,F]. */
struct SharedRows {
  mx::array keys, values;
  int rows;
  std::shared_ptr<const int> loan;  // lives as long as anyone but the buffer's first owner sees it
};
using SharedRowsPtr = std::shared_ptr<const SharedRows>;

/** What a kernel that works on the memory itself must do to add L tokens: copy rows, write the new ones, then read all shared rows and
 * after them rows of its own, visible_rows in all. */
struct WritePlan {
  struct Copy {
    int from, to, rows;
  };
  mx::array keys, values;                             // in memory, [1,K,C,E] and [1,K,C,F], row contiguous
  std::optional<mx::array> old_keys{}, old_values{};  // where the copies come from
  std::vector<Copy> copies{};
  int write_at = 0, visible_rows = 0;   // write_at: a row of its own
  std::vector<SharedRowsPtr> shared{};  // come before its own
};

/** Shared rows come in multiples of this: what the attention kernels take as one block. */
constexpr int shared_block_rows = 64;

/** Sizes of what is kept for a token. */
struct KvShape {
  int kv_heads, key_dims, value_dims;
  mx::Dtype dtype;
};

/** Keys and values of attention. */
class AttentionCache : public Cache {
 public:
  /** Whether plan_write() works; else only update() does. */
  virtual bool plans_writes() const { return false; }
  /** For the fused executor: advances offset by `tokens`; the caller's kernel then carries the plan out and tells by set_written() when (an
   *  array that is evaluated after the writes). */
  virtual WritePlan plan_write(int tokens, const KvShape& shape);
  void set_written(mx::array written) { written_ = std::move(written); }

  /** The cache that holds the rows: this one, or one inside of it. Rows go in and plans are asked for there, after make_room(). */
  virtual AttentionCache& inner() { return *this; }
  const AttentionCache& inner() const { return const_cast<AttentionCache*>(this)->inner(); }
  /** Forgets what none of the next `tokens` tokens sees. */
  virtual void make_room(int /*tokens*/) {}

  /** k [B,K,L,E], v [B,K,L,F] -> all that queries of this call may see, [B,K,S,E] and [B,K,S,F], oldest first wherever order matters:
   *  for L > 1 the last L are the new ones; for L = 1 all S are visible. Advances offset by L. */
  virtual std::pair<mx::array, mx::array> update(const mx::array& k, const mx::array& v) = 0;

  /** Tokens that a rotating cache keeps; 0 = all. */
  virtual int max_size() const { return 0; }
  /** Sizes of the rows that it holds; nothing while there are none. */
  virtual std::optional<KvShape> shape() const = 0;
  /** Whether quantized() works and is not what this is already. */
  virtual bool can_quantize() const { return false; }
  /** The same tokens in a quantized cache. */
  virtual std::unique_ptr<AttentionCache> quantized(int bits, int group_size) const;

 protected:
  /** Waits for writes that no array of the graph stands for. */
  void settle() const;
  /** Sees to it that they come before what is scheduled next. */
  void schedule_writes() const;
  mutable std::optional<mx::array> written_;
};

/** Keeps everything; grows in blocks of 256 tokens. A copy shares what fills whole blocks of shared_block_rows and holds the rest itself;
 * where one array of everything is asked for (the graph executor, files), shared rows are copied then. */
class KvCache final : public AttentionCache {
 public:
  std::pair<mx::array, mx::array> update(const mx::array& k, const mx::array& v) override;
  bool plans_writes() const override { return true; }
  WritePlan plan_write(int tokens, const KvShape& shape) override;
  int offset() const override { return offset_; }
  bool trimmable() const override { return true; }
  int trim(int n) override;
  std::vector<mx::array> state() const override;
  /** Shared memory counts in full for everyone who holds it. */
  int64_t bytes() const override;
  std::unique_ptr<Cache> copy() const override;
  std::unique_ptr<Cache> separate_copy() const override;
  void add_buffers(std::map<const void*, int64_t>& bytes) const override;
  Stored stored() const override;
  bool can_quantize() const override { return true; }
  std::unique_ptr<AttentionCache> quantized(int bits, int group_size) const override;
  /** Rows that lie in memory of others, and the bytes of that memory. */
  int shared_rows() const { return shared_rows_; }
  int64_t shared_bytes() const;
  /** Brings shared rows into memory of its own. */
  void unshare();
  std::optional<KvShape> shape() const override;
  /** The arrays must be the cache's own. */
  static std::unique_ptr<KvCache> restored(mx::array keys, mx::array values, int offset);

 private:
  int own_rows() const { return offset_ - shared_rows_; }
  std::pair<std::vector<mx::array>, std::vector<mx::array>> parts() const;
  std::pair<mx::array, mx::array> joined() const;
  void cut_shared();
  bool would_change_lent_rows() const { return own_rows() < lent_rows_ && loan_.use_count() > 1; }
  void forget_loan() const;
  std::vector<SharedRowsPtr> shared_;  // whole blocks
  int shared_rows_ = 0;
  std::optional<mx::array> keys_, values_;   // its own: [B,K,capacity,E]
  mutable std::shared_ptr<const int> loan_;  // of these, copies see the first lent_rows_
  mutable int lent_rows_ = 0;
  int offset_ = 0;
};

/** Keeps the first `keep` and the most recent tokens, `max_size` in all. */
class RotatingKvCache final : public AttentionCache {
 public:
  RotatingKvCache(int max_size_tokens, int keep_tokens);
  std::pair<mx::array, mx::array> update(const mx::array& k, const mx::array& v) override;
  bool plans_writes() const override { return true; }
  WritePlan plan_write(int tokens, const KvShape& shape) override;
  int offset() const override { return ring_.offset; }
  bool trimmable() const override { return ring_.trimmable(); }
  int trim(int n) override { return ring_.trim(n); }
  /** A call of several tokens leaves the window before it in place: its tokens can go even when the cache is full. */
  bool can_rewind(int tokens, bool one_call) const override { return ring_.offset + tokens < ring_.max_size || (one_call && tokens > 1); }
  void rewind(int n) override;
  /** A window over a call of several tokens does not spare the first `keep`. */
  bool one_call_agrees(int tokens) const override { return ring_.one_call_agrees(tokens); }
  std::vector<mx::array> state() const override;
  int64_t bytes() const override;
  std::unique_ptr<Cache> copy() const override;
  int max_size() const override { return ring_.max_size; }
  std::optional<KvShape> shape() const override;
  Stored stored() const override;
  bool can_quantize() const override { return true; }
  std::unique_ptr<AttentionCache> quantized(int bits, int group_size) const override;
  /** The arrays must be the cache's own, and fit the ring (Ring::consistent). */
  static std::unique_ptr<RotatingKvCache> restored(mx::array keys, mx::array values, const Ring& ring);

 private:
  WritePlan plan_write_many(int tokens, const KvShape& shape);
  WritePlan plan_write_one(const KvShape& shape);
  std::optional<mx::array> keys_, values_;
  Ring ring_;
};

/** Keeps the chunk at hand: the tokens from the last multiple of `chunk_tokens` on. A call must end where the chunk does or before. The
 * reference keeps the latest chunk_tokens instead and leaves the rest to a mask. */
class ChunkedKvCache final : public AttentionCache {
 public:
  explicit ChunkedKvCache(int chunk_tokens);
  /** `rows`: what is held of the chunk that starts at `start`. */
  ChunkedKvCache(int chunk_tokens, int start, std::unique_ptr<AttentionCache> rows);
  std::pair<mx::array, mx::array> update(const mx::array& k, const mx::array& v) override;
  AttentionCache& inner() override { return *rows_; }
  void make_room(int tokens) override;
  int offset() const override { return start_ + rows_->offset(); }
  /** By any number: only before anything was forgotten. */
  bool trimmable() const override { return start_ == 0; }
  /** Back to where the chunk begins, as in the reference. */
  int trim(int n) override { return rows_->trim(n); }
  int trimmable_tokens() const override { return rows_->offset(); }
  bool can_rewind(int tokens, bool one_call) const override;
  void rewind(int n) override { rows_->rewind(n); }
  std::vector<mx::array> state() const override { return rows_->state(); }
  int64_t bytes() const override { return rows_->bytes(); }
  std::unique_ptr<Cache> copy() const override;
  std::unique_ptr<Cache> separate_copy() const override;
  void add_buffers(std::map<const void*, int64_t>& bytes) const override { rows_->add_buffers(bytes); }
  std::optional<KvShape> shape() const override { return rows_->shape(); }
  int chunk_tokens() const { return chunk_tokens_; }
  Stored stored() const override;
  bool can_quantize() const override { return rows_->can_quantize(); }
  std::unique_ptr<AttentionCache> quantized(int bits, int group_size) const override;

 private:
  std::unique_ptr<ChunkedKvCache> with(std::unique_ptr<Cache> rows) const;
  int chunk_tokens_, start_ = 0;
  std::unique_ptr<AttentionCache> rows_;  // a KvCache, or a quantized one
};

/** Fixed-size state of recurrent layers: slot 0 = convolution tail [B, conv-1, C], slot 1, where there is one, = state. */
class RecurrentCache final : public Cache {
 public:
  explicit RecurrentCache(int slots) : slots_(slots) {}
  int offset() const override { return offset_; }
  bool trimmable() const override { return false; }
  int trim(int) override { return 0; }
  std::vector<mx::array> state() const override;
  int64_t bytes() const override;
  std::unique_ptr<Cache> copy() const override;
  Stored stored() const override;
  int slots() const { return static_cast<int>(slots_.size()); }
  const std::optional<mx::array>& slot(int i) const { return slots_.at(i); }
  void set_slot(int i, mx::array value) { slots_.at(i) = std::move(value); }
  void advance(int tokens) { offset_ += tokens; }

 private:
  std::vector<std::optional<mx::array>> slots_;
  int offset_ = 0;
};

/** As plan::cache_layout says. max_kv_size > 0 bounds every full cache (keep = 4) and every window by it; chunks stay as they are. */
Caches make_caches(const arch::Model& model, int max_kv_size_tokens = 0);

}  // namespace mlxlm::cache
