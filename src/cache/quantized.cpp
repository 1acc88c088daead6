// Quantized caches: rows are quantized as they come. Reference: mlx_lm/models/cache.py QuantizedKVCache
#include "cache/quantized.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/layer_shape.h"
#include "cache/rows.h"
#include "kernels/cpu/memory.h"

namespace mlxlm::cache {

Planes quantize_rows(const mx::array& k, const mx::array& v, int bits, int group_size) {
  Planes planes;
  for (const auto* x : {&k, &v}) {
    for (auto& part : mx::quantize(*x, group_size, bits)) planes.push_back(std::move(part));
  }
  return planes;
}

std::pair<mx::array, mx::array> QuantizedCache::update(const mx::array& k, const mx::array& v) {
  const auto held = update_quantized(k, v);
  return {kernels::cpu::dequantize(held.keys), kernels::cpu::dequantize(held.values)};
}

std::vector<mx::array> QuantizedCache::state() const {
  auto list = planes_;
  if (written_) list.push_back(*written_);
  return list;
}

int64_t QuantizedCache::bytes() const {
  int64_t total = 0;
  for (const auto& plane : planes_) total += static_cast<int64_t>(plane.nbytes());
  return total;
}

std::optional<KvShape> QuantizedCache::shape() const {
  if (planes_.empty()) return std::nullopt;
  return KvShape{planes_[1].shape(1), planes_[1].shape(3) * group_size_, planes_[4].shape(3) * group_size_, planes_[1].dtype()};
}

QuantizedCache::Rows QuantizedCache::as_rows(const Planes& p) const {
  return {{p[0], p[1], p[2], bits_, group_size_}, {p[3], p[4], p[5], bits_, group_size_}};
}

Planes QuantizedCache::copied_planes() const {
  settle();
  Planes copied;
  for (const auto& plane : planes_) copied.push_back(deep(plane));
  return copied;
}

void QuantizedCache::store_planes(Stored& s) const {
  settle();
  if (planes_.empty()) s.arrays = {{"0", std::nullopt}, {"1", std::nullopt}};
  for (std::size_t i = 0; i < planes_.size(); ++i) s.arrays[fmt::format("{}.{}", i / 3, i % 3)] = planes_[i];
}

QuantizedKvCache::QuantizedKvCache(int bits, int group_size, Planes planes, int offset)
    : QuantizedCache(bits, group_size), offset_(offset) {
  planes_ = std::move(planes);
}

QuantizedPlan QuantizedKvCache::plan_quantized(int tokens, const KvShape& shape) {
  schedule_writes();
  QuantizedPlan plan{.bits = bits_, .group_size = group_size_};
  for (auto& plane : planes_) {
    const auto dtype = plane.dtype() == mx::uint32 ? mx::uint32 : shape.dtype;
    if (plane.is_available() && plane.dtype() == dtype && plane.flags().row_contiguous && plane.data_size() == plane.size()) continue;
    plane = mx::contiguous(mx::astype(plane, dtype));
    mx::eval(plane);
  }
  const int end = offset_ + tokens, held = planes_.empty() ? 0 : planes_[0].shape(2);
  if (end > held) {
    const int wanted = std::max(end, held + held / 2), room = (wanted + block_tokens - 1) / block_tokens * block_tokens;
    for (const int dims : {shape.key_dims, shape.value_dims}) {
      for (int part = 0; part < 3; ++part) {
        const auto dtype = part == 0 ? mx::uint32 : shape.dtype;
        const int width = part == 0 ? dims * bits_ / 32 : dims / group_size_;
        const auto bytes = std::size_t(shape.kv_heads) * room * width * mx::size_of(dtype);
        plan.planes.push_back(mx::array(kernels::cpu::allocate(bytes), {1, shape.kv_heads, room, width}, dtype));
      }
    }
    if (offset_ > 0) {
      plan.old_planes = planes_;
      plan.copies = {{0, 0, offset_}};
    }
    planes_ = plan.planes;
  } else {
    plan.planes = planes_;
  }
  plan.write_at = offset_;
  plan.visible_rows = offset_ = end;
  return plan;
}

QuantizedCache::Rows QuantizedKvCache::update_quantized(const mx::array& k, const mx::array& v) {
  settle();
  const auto fresh = quantize_rows(k, v, bits_, group_size_);
  const int end = offset_ + k.shape(2);
  const bool first = planes_.empty();
  Planes seen;
  for (std::size_t i = 0; i < fresh.size(); ++i) {
    std::optional<mx::array> buffer;
    if (!first) buffer = planes_[i].dtype() == fresh[i].dtype() ? planes_[i] : mx::astype(planes_[i], fresh[i].dtype());
    auto next = written(grown(buffer, fresh[i], offset_, end), fresh[i], offset_);
    seen.push_back(rows(next, 0, end));
    if (first)
      planes_.push_back(std::move(next));
    else
      planes_[i] = std::move(next);
  }
  offset_ = end;
  return as_rows(seen);
}

int QuantizedKvCache::trim(int n) {
  n = std::clamp(n, 0, offset_);
  offset_ -= n;
  return n;
}

std::unique_ptr<Cache> QuantizedKvCache::copy() const {
  return std::make_unique<QuantizedKvCache>(bits_, group_size_, copied_planes(), offset_);
}

Stored QuantizedKvCache::stored() const {
  Stored s{.kind = "QuantizedKVCache", .arrays = {}, .numbers = {{"2", offset_}, {"3", group_size_}, {"4", bits_}}};
  store_planes(s);
  for (auto& [path, plane] : s.arrays) {
    if (plane) plane = rows(*plane, 0, offset_);
  }
  return s;
}

QuantizedRotatingKvCache::QuantizedRotatingKvCache(int bits, int group_size, const Ring& ring, Planes planes)
    : QuantizedCache(bits, group_size), ring_(ring) {
  planes_ = std::move(planes);
}

QuantizedCache::Rows QuantizedRotatingKvCache::update_quantized(const mx::array& k, const mx::array& v) {
  return as_rows(ring_.update(planes_, quantize_rows(k, v, bits_, group_size_)));
}

std::unique_ptr<Cache> QuantizedRotatingKvCache::copy() const {
  return std::make_unique<QuantizedRotatingKvCache>(bits_, group_size_, ring_, copied_planes());
}

Stored QuantizedRotatingKvCache::stored() const {
  Stored s{
      .kind = "QuantizedRotatingKVCache",
      .arrays = {},
      .numbers = {{"2", ring_.offset}, {"3", ring_.keep}, {"4", ring_.max_size}, {"5", ring_.index}, {"6", group_size_}, {"7", bits_}}};
  store_planes(s);
  return s;
}

void check_quantization(const arch::Model& model, const Quantization& wanted) {
  if (wanted.bits == 0) return;
  const int known_bits[] = {2, 3, 4, 5, 6, 8}, known_groups[] = {32, 64, 128};
  if (std::ranges::find(known_bits, wanted.bits) == std::end(known_bits)) {
    throw Error(Code::bad_request, "kv_bits", fmt::format("got {}, wanted 2, 3, 4, 5, 6 or 8", wanted.bits));
  }
  if (std::ranges::find(known_groups, wanted.group_size) == std::end(known_groups)) {
    throw Error(Code::bad_request, "kv_group_size", fmt::format("got {}, wanted 32, 64 or 128", wanted.group_size));
  }
  if (wanted.start_tokens < 0) {
    throw Error(Code::bad_request, "quantized_kv_start", fmt::format("got {}, wanted 0 or more", wanted.start_tokens));
  }
  const auto shapes = layer_shapes(model);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    if (!shapes[i].kv) continue;
    for (const int dims : {shapes[i].kv->key_dims, shapes[i].kv->value_dims}) {
      if (dims % wanted.group_size == 0) continue;
      throw Error(Code::bad_request, "kv_group_size",
                  fmt::format("got {}, wanted a divisor of the {} numbers that layer {} keeps for a head{}", wanted.group_size, dims,
                              shapes[i].layer.layer, dims % 32 == 0 ? "" : "; this model's cache cannot be quantized"));
    }
  }
}

void quantize_caches(Caches& caches, const Quantization& wanted) {
  if (wanted.bits == 0) return;
  std::vector<std::pair<CachePtr*, CachePtr>> converted;  // all or none take their place
  for (auto& cache : caches) {
    const auto* attention = dynamic_cast<const AttentionCache*>(cache.get());
    if (attention == nullptr || !attention->can_quantize() || attention->offset() < wanted.start_tokens) continue;
    converted.emplace_back(&cache, attention->quantized(wanted.bits, wanted.group_size));
  }
  for (auto& [place, cache] : converted) *place = std::move(cache);
}

}  // namespace mlxlm::cache
