// The caches and their growth. Reference: mlx_lm/models/cache.py
#include "cache/cache.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/quantized.h"
#include "cache/rows.h"
#include "kernels/cpu/memory.h"
#include "plan/plan.h"

namespace mlxlm::cache {
namespace {

mx::array new_buffer(int heads, int rows, int dims, mx::Dtype dtype) {
  const auto bytes = static_cast<std::size_t>(heads) * rows * dims * mx::size_of(dtype);
  return mx::array(kernels::cpu::allocate(bytes), {1, heads, rows, dims}, dtype);
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

int64_t bytes_of(const std::optional<mx::array>& a) {
  return a ? static_cast<int64_t>(a->nbytes()) : 0;
}

std::vector<mx::array> both(const std::optional<mx::array>& a, const std::optional<mx::array>& b, const std::optional<mx::array>& written) {
  std::vector<mx::array> list;
  if (written) list.push_back(*written);
  if (a) list.push_back(*a);
  if (b) list.push_back(*b);
  return list;
}

std::optional<KvShape> shape_of(const std::optional<mx::array>& keys, const std::optional<mx::array>& values) {
  if (!keys || !values) return std::nullopt;
  return KvShape{keys->shape(1), keys->shape(3), values->shape(3), keys->dtype()};
}

}  // namespace

WritePlan AttentionCache::plan_write(int, const KvShape&) {
  throw Error(Code::internal, "cache", "this kind is not written by kernels");
}

std::unique_ptr<AttentionCache> AttentionCache::quantized(int, int) const {
  throw Error(Code::unsupported, "cache", "got a kind of cache that cannot be quantized");
}

Stored Cache::stored() const {
  throw Error(Code::unsupported, "prompt cache", "got a kind of cache that cannot be stored");
}

void AttentionCache::settle() const {
  if (written_) mx::eval(*written_);
  written_.reset();
}

std::pair<mx::array, mx::array> KvCache::update(const mx::array& k, const mx::array& v) {
  settle();
  unshare();
  if (would_change_lent_rows()) {
    keys_ = deep(keys_);
    values_ = deep(values_);
    forget_loan();
  }
  const int end = offset_ + k.shape(2);
  if (keys_ && keys_->dtype() != k.dtype()) keys_ = mx::astype(*keys_, k.dtype());  // from a file of another precision
  if (values_ && values_->dtype() != v.dtype()) values_ = mx::astype(*values_, v.dtype());
  keys_ = written(grown(keys_, k, offset_, end), k, offset_);
  values_ = written(grown(values_, v, offset_, end), v, offset_);
  offset_ = end;
  return {rows(*keys_, 0, end), rows(*values_, 0, end)};
}

/** The stream runs in order, so it is enough that earlier writes are on their way: waiting would end the look-ahead of decoding. */
void AttentionCache::schedule_writes() const {
  if (written_ && written_->status() == mx::array::Status::unscheduled) mx::async_eval(*written_);
}

WritePlan KvCache::plan_write(int tokens, const KvShape& shape) {
  schedule_writes();
  for (const auto& part : shared_) {
    if (part->keys.dtype() == shape.dtype && part->values.dtype() == shape.dtype) continue;
    unshare();  // from a file of another precision
    break;
  }
  settle_in_memory(keys_, shape.dtype);
  settle_in_memory(values_, shape.dtype);
  const int own = own_rows(), end = own + tokens, held = keys_ ? keys_->shape(2) : 0;
  std::optional<WritePlan> plan;
  if (end <= held && !would_change_lent_rows()) {
    plan = WritePlan{*keys_, *values_};
  } else {
    const int wanted = end <= held ? held : std::max(end, held + held / 2);
    plan = fresh_plan(shape, (wanted + block_tokens - 1) / block_tokens * block_tokens, keys_, values_);
    if (own > 0) plan->copies = {{0, 0, own}};
    keys_ = plan->keys;
    values_ = plan->values;
    forget_loan();
  }
  plan->write_at = own;
  offset_ += tokens;
  plan->visible_rows = offset_;
  plan->shared = shared_;
  return *plan;
}

int KvCache::trim(int n) {
  n = std::clamp(n, 0, offset_);
  offset_ -= n;
  if (offset_ < shared_rows_) cut_shared();
  return n;
}

/** Nothing of its own is left: whole blocks stay shared, the rest of a block becomes its own. */
void KvCache::cut_shared() {
  settle();
  keys_.reset();
  values_.reset();
  forget_loan();
  const auto parts = std::exchange(shared_, {});
  shared_rows_ = 0;
  for (const auto& part : parts) {
    const int left = std::min(part->rows, offset_ - shared_rows_);
    const int whole = left / shared_block_rows * shared_block_rows;
    if (whole > 0)
      shared_.push_back(whole == part->rows ? part
                                            : std::make_shared<const SharedRows>(SharedRows{part->keys, part->values, whole, part->loan}));
    shared_rows_ += whole;
    if (left > whole) {
      keys_ = deep(rows(part->keys, whole, left));
      values_ = deep(rows(part->values, whole, left));
    }
    if (left < part->rows) break;
  }
}

/** Keys and values, each as the arrays that they lie in, [B,K,n,E] and [B,K,n,F]. */
std::pair<std::vector<mx::array>, std::vector<mx::array>> KvCache::parts() const {
  std::vector<mx::array> keys, values;
  for (const auto& part : shared_) {
    keys.push_back(rows(part->keys, 0, part->rows));
    values.push_back(rows(part->values, 0, part->rows));
  }
  if (own_rows() > 0) {
    keys.push_back(rows(*keys_, 0, own_rows()));
    values.push_back(rows(*values_, 0, own_rows()));
  }
  for (auto* list : {&keys, &values}) {
    for (auto& a : *list) a = mx::astype(a, list->front().dtype());
  }
  return {std::move(keys), std::move(values)};
}

/** All keys and values, [B,K,offset,E] and [B,K,offset,F]; the cache must not be empty. */
std::pair<mx::array, mx::array> KvCache::joined() const {
  const auto [keys, values] = parts();
  if (keys.size() == 1) return {keys[0], values[0]};
  return {mx::concatenate(keys, 2), mx::concatenate(values, 2)};
}

void KvCache::unshare() {
  if (shared_.empty()) return;
  settle();
  const auto [keys, values] = joined();
  keys_ = deep(keys);
  values_ = deep(values);
  forget_loan();
  shared_.clear();
  shared_rows_ = 0;
}

/** When the buffers are others than those that were lent. */
void KvCache::forget_loan() const {
  loan_.reset();
  lent_rows_ = 0;
}

std::vector<mx::array> KvCache::state() const {
  return both(keys_, values_, written_);
}

int64_t KvCache::bytes() const {
  return bytes_of(keys_) + bytes_of(values_) + shared_bytes();
}

int64_t KvCache::shared_bytes() const {
  int64_t total = 0;
  for (const auto& part : shared_) total += static_cast<int64_t>(part->keys.nbytes() + part->values.nbytes());
  return total;
}

void KvCache::add_buffers(std::map<const void*, int64_t>& bytes) const {
  const auto add = [&](const mx::array& a) {
    const bool in_memory = a.status() == mx::array::Status::available;
    bytes[in_memory ? a.data<void>() : static_cast<const void*>(this)] = static_cast<int64_t>(a.nbytes());
  };
  for (const auto& part : shared_) {
    add(part->keys);
    add(part->values);
  }
  if (keys_) add(*keys_);
  if (values_) add(*values_);
}

std::optional<KvShape> KvCache::shape() const {
  return shared_.empty() ? shape_of(keys_, values_) : shape_of(shared_[0]->keys, shared_[0]->values);
}

std::unique_ptr<Cache> KvCache::separate_copy() const {
  settle();
  auto other = std::make_unique<KvCache>();
  if (offset_ > 0) {
    const auto [keys, values] = joined();
    other->keys_ = deep(keys);
    other->values_ = deep(values);
  }
  other->offset_ = offset_;
  return other;
}

std::unique_ptr<Cache> KvCache::copy() const {
  settle();
  const int own = own_rows(), whole = own / shared_block_rows * shared_block_rows;
  const auto lies_in_memory = [](const std::optional<mx::array>& a) {
    return a && a->shape(0) == 1 && a->is_available() && a->flags().row_contiguous && a->data_size() == a->size();
  };
  if (whole > 0 && !(lies_in_memory(keys_) && lies_in_memory(values_))) return separate_copy();
  auto other = std::make_unique<KvCache>();
  other->shared_ = shared_;
  other->shared_rows_ = shared_rows_ + whole;
  other->offset_ = offset_;
  if (whole > 0) {
    if (!loan_) loan_ = std::make_shared<const int>(0);
    lent_rows_ = std::max(loan_.use_count() > 1 ? lent_rows_ : 0, whole);
    other->shared_.push_back(std::make_shared<const SharedRows>(SharedRows{*keys_, *values_, whole, loan_}));
  }
  if (own > whole) {
    other->keys_ = deep(rows(*keys_, whole, own));
    other->values_ = deep(rows(*values_, whole, own));
  }
  return other;
}

std::unique_ptr<AttentionCache> KvCache::quantized(int bits, int group_size) const {
  settle();
  Planes planes;
  if (offset_ > 0) {
    const auto [keys, values] = joined();
    planes = quantize_rows(keys, values, bits, group_size);
  }
  return std::make_unique<QuantizedKvCache>(bits, group_size, std::move(planes), offset_);
}

Stored KvCache::stored() const {
  settle();
  Stored s{.kind = "KVCache", .arrays = {{"0", std::nullopt}, {"1", std::nullopt}}, .numbers = {{"2", offset_}}};
  if (offset_ == 0) return s;
  const auto [keys, values] = joined();
  s.arrays["0"] = keys;
  s.arrays["1"] = values;
  std::tie(s.parts["0"], s.parts["1"]) = parts();
  s.lent.assign(shared_.begin(), shared_.end());
  return s;
}

std::unique_ptr<KvCache> KvCache::restored(mx::array keys, mx::array values, int offset) {
  auto made = std::make_unique<KvCache>();
  made->keys_ = std::move(keys);
  made->values_ = std::move(values);
  made->offset_ = offset;
  return made;
}

RotatingKvCache::RotatingKvCache(int max_size_tokens, int keep_tokens) {
  ring_ = {.max_size = max_size_tokens, .keep = keep_tokens};
}

/** As the two branches of update(), in rows instead of arrays. */
WritePlan RotatingKvCache::plan_write(int tokens, const KvShape& shape) {
  schedule_writes();
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
  if (keys_ && ring_.index == held) {
    order = {{0, std::min(ring_.keep, held)}, {std::min(ring_.keep, held), held}};
  } else if (keys_ && ring_.index < ring_.offset) {
    order = {{0, ring_.keep}, {ring_.index, held}, {ring_.keep, ring_.index}};
  } else if (keys_) {
    order = {{0, std::min(ring_.keep, ring_.index)}, {std::min(ring_.keep, ring_.index), ring_.index}};
  }
  int kept = 0;
  for (const auto& [from, to] : order) kept += to - from;
  int excess = std::max(0, kept - ring_.max_size + 1);  // each new token sees max_size tokens, itself included
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
  plan.visible_rows = ring_.index = at + tokens;
  ring_.offset += tokens;
  return plan;
}

WritePlan RotatingKvCache::plan_write_one(const KvShape& shape) {
  int held = keys_ ? keys_->shape(2) : 0;
  std::optional<WritePlan> plan;
  if (!keys_ || (ring_.offset >= held && held < ring_.max_size)) {
    plan = fresh_plan(shape, held + std::min(block_tokens, ring_.max_size - held), keys_, values_);
    if (held > 0) plan->copies = {{0, 0, held}};
    ring_.index = ring_.offset;
  } else if (const int excess = held - ring_.max_size; excess > 0) {
    plan = fresh_plan(shape, ring_.max_size, keys_, values_);
    if (ring_.keep > 0) plan->copies.push_back({0, 0, ring_.keep});
    plan->copies.push_back({excess + ring_.keep, ring_.keep, ring_.max_size - ring_.keep});
    ring_.index = ring_.max_size;
  } else {
    plan = WritePlan{*keys_, *values_};
  }
  held = plan->keys.shape(2);
  if (ring_.index == ring_.max_size) ring_.index = ring_.keep;
  plan->write_at = ring_.index++;
  ++ring_.offset;
  plan->visible_rows = ring_.offset < ring_.max_size ? ring_.offset : held;
  return *plan;
}

std::pair<mx::array, mx::array> RotatingKvCache::update(const mx::array& k, const mx::array& v) {
  settle();
  Planes planes;
  if (keys_) planes = {*keys_, *values_};
  const auto seen = ring_.update(planes, {k, v});
  keys_ = planes[0];
  values_ = planes[1];
  return {seen[0], seen[1]};
}

void RotatingKvCache::rewind(int n) {
  if (n == 0 || trim(n) == n) return;
  if (n < 0 || n >= ring_.index || ring_.index != keys_->shape(2)) {
    throw Error(Code::internal, "cache", "got tokens of an earlier call to take back");
  }
  settle();
  ring_.offset -= n;
  ring_.index -= n;
  keys_ = rows(*keys_, 0, ring_.index);
  values_ = rows(*values_, 0, ring_.index);
}

std::vector<mx::array> RotatingKvCache::state() const {
  return both(keys_, values_, written_);
}
int64_t RotatingKvCache::bytes() const {
  return bytes_of(keys_) + bytes_of(values_);
}

std::optional<KvShape> RotatingKvCache::shape() const {
  return shape_of(keys_, values_);
}

std::unique_ptr<Cache> RotatingKvCache::copy() const {
  settle();
  auto other = std::make_unique<RotatingKvCache>(ring_.max_size, ring_.keep);
  other->keys_ = deep(keys_);
  other->values_ = deep(values_);
  other->ring_ = ring_;
  return other;
}

std::unique_ptr<AttentionCache> RotatingKvCache::quantized(int bits, int group_size) const {
  settle();
  Planes planes;
  if (keys_) planes = quantize_rows(*keys_, *values_, bits, group_size);
  return std::make_unique<QuantizedRotatingKvCache>(bits, group_size, ring_, std::move(planes));
}

Stored RotatingKvCache::stored() const {
  settle();
  return {.kind = "RotatingKVCache",
          .arrays = {{"0", keys_}, {"1", values_}},
          .numbers = {{"2", ring_.offset}, {"3", ring_.keep}, {"4", ring_.max_size}, {"5", ring_.index}}};
}

std::unique_ptr<RotatingKvCache> RotatingKvCache::restored(mx::array keys, mx::array values, const Ring& ring) {
  auto made = std::make_unique<RotatingKvCache>(ring.max_size, ring.keep);
  made->keys_ = std::move(keys);
  made->values_ = std::move(values);
  made->ring_ = ring;
  return made;
}

ChunkedKvCache::ChunkedKvCache(int chunk_tokens) : ChunkedKvCache(chunk_tokens, 0, std::make_unique<KvCache>()) {}

ChunkedKvCache::ChunkedKvCache(int chunk_tokens, int start, std::unique_ptr<AttentionCache> rows)
    : chunk_tokens_(chunk_tokens), start_(start), rows_(std::move(rows)) {}

void ChunkedKvCache::make_room(int tokens) {
  if (offset() % chunk_tokens_ + tokens > chunk_tokens_) throw Error(Code::internal, "cache", "got tokens of several chunks at once");
  if (rows_->offset() < chunk_tokens_) return;
  start_ += chunk_tokens_;
  const auto* held = dynamic_cast<const QuantizedCache*>(rows_.get());
  if (held == nullptr)
    rows_ = std::make_unique<KvCache>();
  else
    rows_ = std::make_unique<QuantizedKvCache>(held->bits(), held->group_size());
}

std::pair<mx::array, mx::array> ChunkedKvCache::update(const mx::array& k, const mx::array& v) {
  make_room(k.shape(2));
  return rows_->update(k, v);
}

bool ChunkedKvCache::can_rewind(int tokens, bool one_call) const {
  return offset() % chunk_tokens_ + tokens <= chunk_tokens_ && rows_->can_rewind(tokens, one_call);
}

std::unique_ptr<ChunkedKvCache> ChunkedKvCache::with(std::unique_ptr<Cache> rows) const {
  return std::make_unique<ChunkedKvCache>(chunk_tokens_, start_,
                                          std::unique_ptr<AttentionCache>(static_cast<AttentionCache*>(rows.release())));
}
std::unique_ptr<Cache> ChunkedKvCache::copy() const {
  return with(rows_->copy());
}
std::unique_ptr<Cache> ChunkedKvCache::separate_copy() const {
  return with(rows_->separate_copy());
}
std::unique_ptr<AttentionCache> ChunkedKvCache::quantized(int bits, int group_size) const {
  return with(rows_->quantized(bits, group_size));
}

Stored ChunkedKvCache::stored() const {
  auto s = rows_->stored();
  const bool quantized = s.kind == "QuantizedKVCache";
  const auto group_size = quantized ? s.numbers.at("3") : 0, bits = quantized ? s.numbers.at("4") : 0;
  s.kind = quantized ? "QuantizedChunkedKVCache" : "ChunkedKVCache";
  s.numbers = {{"2", offset()}, {"3", chunk_tokens_}, {"4", start_}};
  if (quantized) s.numbers.insert({{"5", group_size}, {"6", bits}});
  return s;
}

Stored RecurrentCache::stored() const {
  Stored s{.kind = "ArraysCache", .arrays = {{"1", std::nullopt}, {"2", std::nullopt}}, .numbers = {}};  // no padding, no lengths
  for (std::size_t i = 0; i < slots_.size(); ++i) s.arrays["0." + std::to_string(i)] = slots_[i];
  return s;
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
      case plan::CacheKind::none:
        caches.push_back(nullptr);
        break;
      case plan::CacheKind::recurrent:
        caches.push_back(std::make_unique<RecurrentCache>(layer.states));
        break;
      case plan::CacheKind::rotating:
        caches.push_back(std::make_unique<RotatingKvCache>(
            max_kv_size_tokens > 0 ? std::min(max_kv_size_tokens, layer.window_tokens) : layer.window_tokens, 0));
        break;
      case plan::CacheKind::chunked:
        caches.push_back(std::make_unique<ChunkedKvCache>(layer.window_tokens));
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
