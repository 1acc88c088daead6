// The caches and their growth. Reference: mlx_lm/models/cache.py
#include "cache/cache.h"

#include <algorithm>

#include <mlx/allocator.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "kernels/cpu/kernels.h"
#include "plan/plan.h"

namespace mlxlm::cache {
namespace {

constexpr int block_tokens = 256;

mx::array rows(const mx::array& a, int from, int to) {
  return mx::slice(a, {0, 0, from, 0}, {a.shape(0), a.shape(1), to, a.shape(3)});
}

mx::array zeros_like_rows(const mx::array& a, int count) { return mx::zeros({a.shape(0), a.shape(1), count, a.shape(3)}, a.dtype()); }

/** buffer with x at [start, start + L); in place where we own the memory. */
mx::array written(const mx::array& buffer, const mx::array& x, int start) {
  if (kernels::cpu::active()) return kernels::cpu::write_rows(buffer, x, start);
  return mx::slice_update(buffer, x, mx::Shape{0, 0, start, 0}, mx::Shape{x.shape(0), x.shape(1), start + x.shape(2), x.shape(3)});
}

/** buffer [B,K,C,E] with room for `wanted` tokens, of which `used` are kept. */
mx::array grown(const std::optional<mx::array>& buffer, const mx::array& like, int used, int wanted) {
  const int capacity = (wanted + block_tokens - 1) / block_tokens * block_tokens;
  if (!buffer) return zeros_like_rows(like, capacity);
  if (buffer->shape(2) >= wanted) return *buffer;
  // Half as much again, so that a long run copies each token a bounded number of times.
  const int target = std::max(capacity, (buffer->shape(2) * 3 / 2 + block_tokens - 1) / block_tokens * block_tokens);
  const auto kept = rows(*buffer, 0, used);
  return mx::contiguous(mx::concatenate({kept, zeros_like_rows(like, target - used)}, 2));
}

std::optional<mx::array> deep(const std::optional<mx::array>& a) {
  if (!a) return std::nullopt;
  // copy() of MLX may share memory; adding nothing does not.
  auto copied = mx::add(*a, mx::zeros({1}, a->dtype()));
  mx::eval(copied);
  return copied;
}

mx::array new_buffer(int heads, int rows, int dims, mx::Dtype dtype) {
  const auto bytes = static_cast<std::size_t>(heads) * rows * dims * mx::size_of(dtype);
  return mx::array(mx::allocator::malloc(bytes), {1, heads, rows, dims}, dtype);
}

/** A plan with fresh buffers of `rows` rows. */
WritePlan fresh_plan(const KvShape& s, int rows, const std::optional<mx::array>& old_keys, const std::optional<mx::array>& old_values) {
  return {new_buffer(s.kv_heads, rows, s.key_dims, s.dtype), new_buffer(s.kv_heads, rows, s.value_dims, s.dtype), old_keys, old_values};
}

/** Makes the buffer lie in memory as kernels read it. */
void settle_in_memory(std::optional<mx::array>& a, mx::Dtype dtype) {
  if (!a || (a->is_available() && a->dtype() == dtype && a->flags().row_contiguous && a->data_size() == a->size())) return;
  a = mx::contiguous(mx::astype(*a, dtype));
  mx::eval(*a);
}

int64_t bytes_of(const std::optional<mx::array>& a) { return a ? static_cast<int64_t>(a->nbytes()) : 0; }

std::vector<mx::array> both(const std::optional<mx::array>& a, const std::optional<mx::array>& b, const std::optional<mx::array>& written) {
  std::vector<mx::array> list;
  if (written) list.push_back(*written);
  if (a) list.push_back(*a);
  if (b) list.push_back(*b);
  return list;
}

}  // namespace

WritePlan AttentionCache::plan_write(int, const KvShape&) { throw Error(Code::internal, "cache", "this kind is not written by kernels"); }

void AttentionCache::settle() const {
  if (written_) mx::eval(*written_);
  written_.reset();
}

std::pair<mx::array, mx::array> KvCache::update(const mx::array& k, const mx::array& v) {
  settle();
  const int end = offset_ + k.shape(2);
  keys_ = written(grown(keys_, k, offset_, end), k, offset_);
  values_ = written(grown(values_, v, offset_, end), v, offset_);
  offset_ = end;
  return {rows(*keys_, 0, end), rows(*values_, 0, end)};
}

WritePlan KvCache::plan_write(int tokens, const KvShape& shape) {
  settle_in_memory(keys_, shape.dtype);
  settle_in_memory(values_, shape.dtype);
  const int end = offset_ + tokens, held = keys_ ? keys_->shape(2) : 0;
  std::optional<WritePlan> plan;
  if (end <= held) {
    plan = WritePlan{*keys_, *values_};
  } else {
    const int wanted = std::max(end, held + held / 2);
    plan = fresh_plan(shape, (wanted + block_tokens - 1) / block_tokens * block_tokens, keys_, values_);
    if (offset_ > 0) plan->copies = {{0, 0, offset_}};
    keys_ = plan->keys;
    values_ = plan->values;
  }
  plan->write_at = offset_;
  plan->visible_rows = offset_ = end;
  return *plan;
}

int KvCache::trim(int n) {
  n = std::clamp(n, 0, offset_);
  offset_ -= n;
  return n;
}

std::vector<mx::array> KvCache::state() const { return both(keys_, values_, written_); }
int64_t KvCache::bytes() const { return bytes_of(keys_) + bytes_of(values_); }

std::unique_ptr<Cache> KvCache::copy() const {
  settle();
  auto other = std::make_unique<KvCache>();
  other->keys_ = deep(keys_);
  other->values_ = deep(values_);
  other->offset_ = offset_;
  return other;
}

RotatingKvCache::RotatingKvCache(int max_size_tokens, int keep_tokens) : max_size_(max_size_tokens), keep_(keep_tokens) {}

/** The first `keep`, then the others from the oldest to the newest. */
mx::array RotatingKvCache::temporal_order(const mx::array& v) const {
  const int held = v.shape(2);
  if (index_ == held) return v;
  if (index_ < offset_) return mx::concatenate({rows(v, 0, keep_), rows(v, index_, held), rows(v, keep_, index_)}, 2);
  return rows(v, 0, index_);
}

/** Without the `count` oldest after the first `keep`. */
mx::array RotatingKvCache::trimmed(int count, const mx::array& v, const mx::array* append) const {
  std::vector<mx::array> parts;
  if (count > 0) {
    parts = {rows(v, 0, keep_), rows(v, count + keep_, v.shape(2))};
  } else {
    parts = {v};
  }
  if (append != nullptr) parts.push_back(*append);
  return parts.size() == 1 ? parts[0] : mx::concatenate(parts, 2);
}

/** As the two branches of update(), in rows instead of arrays. */
WritePlan RotatingKvCache::plan_write(int tokens, const KvShape& shape) {
  settle_in_memory(keys_, shape.dtype);
  settle_in_memory(values_, shape.dtype);
  auto plan = tokens > 1 ? plan_write_many(tokens, shape) : plan_write_one(shape);
  keys_ = plan.keys;
  values_ = plan.values;
  return plan;
}

WritePlan RotatingKvCache::plan_write_many(int tokens, const KvShape& shape) {
  std::vector<std::pair<int, int>> order;  // rows from the oldest to the newest
  const int held = keys_ ? keys_->shape(2) : 0;
  if (keys_ && index_ == held) {
    order = {{0, std::min(keep_, held)}, {std::min(keep_, held), held}};
  } else if (keys_ && index_ < offset_) {
    order = {{0, keep_}, {index_, held}, {keep_, index_}};
  } else if (keys_) {
    order = {{0, std::min(keep_, index_)}, {std::min(keep_, index_), index_}};
  }
  int kept = 0;
  for (const auto& [from, to] : order) kept += to - from;
  int excess = std::max(0, kept - max_size_ + 1);  // each new token sees max_size tokens, itself included
  std::vector<WritePlan::Copy> copies;
  int at = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    auto [from, to] = order[i];
    const int dropped = i == 0 ? 0 : std::min(excess, to - from);
    excess -= dropped;
    from += dropped;
    if (to > from) copies.push_back({from, at, to - from});
    at += std::max(0, to - from);
  }
  auto plan = fresh_plan(shape, at + tokens, keys_, values_);
  plan.copies = std::move(copies);
  plan.write_at = at;
  plan.visible_rows = index_ = at + tokens;
  offset_ += tokens;
  return plan;
}

WritePlan RotatingKvCache::plan_write_one(const KvShape& shape) {
  int held = keys_ ? keys_->shape(2) : 0;
  std::optional<WritePlan> plan;
  if (!keys_ || (offset_ >= held && held < max_size_)) {
    plan = fresh_plan(shape, held + std::min(block_tokens, max_size_ - held), keys_, values_);
    if (held > 0) plan->copies = {{0, 0, held}};
    index_ = offset_;
  } else if (const int excess = held - max_size_; excess > 0) {
    plan = fresh_plan(shape, max_size_, keys_, values_);
    if (keep_ > 0) plan->copies.push_back({0, 0, keep_});
    plan->copies.push_back({excess + keep_, keep_, max_size_ - keep_});
    index_ = max_size_;
  } else {
    plan = WritePlan{*keys_, *values_};
  }
  held = plan->keys.shape(2);
  if (index_ == max_size_) index_ = keep_;
  plan->write_at = index_++;
  ++offset_;
  plan->visible_rows = offset_ < max_size_ ? offset_ : held;
  return *plan;
}

std::pair<mx::array, mx::array> RotatingKvCache::update(const mx::array& k, const mx::array& v) {
  settle();
  const int length = k.shape(2);
  if (length > 1) {
    if (!keys_) {
      // Copies: the arrays of the graph are not ours to write into later.
      keys_ = mx::concatenate({k, zeros_like_rows(k, 0)}, 2);
      values_ = mx::concatenate({v, zeros_like_rows(v, 0)}, 2);
    } else {
      keys_ = temporal_order(*keys_);
      values_ = temporal_order(*values_);
      // Each new token sees max_size tokens, itself included.
      const int excess = keys_->shape(2) - max_size_ + 1;
      keys_ = trimmed(excess, *keys_, &k);
      values_ = trimmed(excess, *values_, &v);
    }
    offset_ += length;
    index_ = keys_->shape(2);
    return {*keys_, *values_};
  }
  const int held = keys_ ? keys_->shape(2) : 0;
  if (!keys_ || (offset_ >= held && held < max_size_)) {
    const int more = std::min(block_tokens, max_size_ - held);
    const auto new_keys = zeros_like_rows(k, more), new_values = zeros_like_rows(v, more);
    keys_ = keys_ ? mx::concatenate({*keys_, new_keys}, 2) : new_keys;
    values_ = values_ ? mx::concatenate({*values_, new_values}, 2) : new_values;
    index_ = offset_;
  }
  if (const int excess = keys_->shape(2) - max_size_; excess > 0) {
    keys_ = trimmed(excess, *keys_, nullptr);
    values_ = trimmed(excess, *values_, nullptr);
    index_ = max_size_;
  }
  if (index_ == max_size_) index_ = keep_;
  keys_ = written(mx::contiguous(*keys_), k, index_);
  values_ = written(mx::contiguous(*values_), v, index_);
  ++offset_;
  ++index_;
  if (offset_ < max_size_) return {rows(*keys_, 0, offset_), rows(*values_, 0, offset_)};
  return {*keys_, *values_};
}

int RotatingKvCache::trim(int n) {
  if (!trimmable()) return 0;
  n = std::clamp(n, 0, offset_);
  offset_ -= n;
  index_ -= n;
  return n;
}

void RotatingKvCache::rewind(int n) {
  if (n == 0 || trim(n) == n) return;
  if (n < 0 || n >= index_ || index_ != keys_->shape(2)) throw Error(Code::internal, "cache", "got tokens of an earlier call to take back");
  settle();
  offset_ -= n;
  index_ -= n;
  keys_ = rows(*keys_, 0, index_);
  values_ = rows(*values_, 0, index_);
}

std::vector<mx::array> RotatingKvCache::state() const { return both(keys_, values_, written_); }
int64_t RotatingKvCache::bytes() const { return bytes_of(keys_) + bytes_of(values_); }

std::unique_ptr<Cache> RotatingKvCache::copy() const {
  settle();
  auto other = std::make_unique<RotatingKvCache>(max_size_, keep_);
  other->keys_ = deep(keys_);
  other->values_ = deep(values_);
  other->offset_ = offset_;
  other->index_ = index_;
  return other;
}

std::vector<mx::array> RecurrentCache::state() const {
  std::vector<mx::array> list;
  for (const auto& slot : slots_) {
    if (slot) list.push_back(*slot);
  }
  return list;
}

int64_t RecurrentCache::bytes() const {
  int64_t total = 0;
  for (const auto& slot : slots_) total += bytes_of(slot);
  return total;
}

std::unique_ptr<Cache> RecurrentCache::copy() const {
  auto other = std::make_unique<RecurrentCache>(static_cast<int>(slots_.size()));
  for (std::size_t i = 0; i < slots_.size(); ++i) other->slots_[i] = deep(slots_[i]);
  other->offset_ = offset_;
  return other;
}

Caches make_caches(const arch::Model& model, int max_kv_size_tokens) {
  constexpr int keep_tokens = 4;
  Caches caches;
  for (const auto& layer : plan::cache_layout(model)) {
    switch (layer.kind) {
      case plan::CacheKind::none: caches.push_back(nullptr); break;
      case plan::CacheKind::recurrent: caches.push_back(std::make_unique<RecurrentCache>(2)); break;
      case plan::CacheKind::rotating:
        caches.push_back(std::make_unique<RotatingKvCache>(
            max_kv_size_tokens > 0 ? std::min(max_kv_size_tokens, layer.window_tokens) : layer.window_tokens, 0));
        break;
      case plan::CacheKind::full:
        if (max_kv_size_tokens > 0) {
          caches.push_back(std::make_unique<RotatingKvCache>(max_kv_size_tokens, std::min(keep_tokens, max_kv_size_tokens - 1)));
        } else {
          caches.push_back(std::make_unique<KvCache>());
        }
    }
  }
  return caches;
}

}  // namespace mlxlm::cache
