// Builds caches from what a file says, which may be anything.
#include "cache/restore.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "cache/quantized.h"
#include "cache/rows.h"

namespace mlxlm::cache {
namespace {

class Reader {
 public:
  Reader(const Stored& stored, const LayerShape& wanted, const std::string& where) : stored_(stored), wanted_(wanted), where_(where) {}

  CachePtr read() const {
    const auto& kind = stored_.kind;
    const bool recurrent = kind == "ArraysCache";
    const bool chunked = kind == "ChunkedKVCache" || kind == "QuantizedChunkedKVCache";
    const bool attention =
        chunked || kind == "KVCache" || kind == "RotatingKVCache" || kind == "QuantizedKVCache" || kind == "QuantizedRotatingKVCache";
    if (!recurrent && !attention) throw Error(Code::unsupported, where_, "class '" + kind.substr(0, 60) + "' is not supported");
    if (recurrent != (wanted_.layer.kind == plan::CacheKind::recurrent)) {
      bad(fmt::format("got a {}, wanted one for {}; is it of another model?", kind, recurrent ? "attention" : "a recurrent layer"));
    }
    if (recurrent) return arrays_cache();
    if (chunked != (wanted_.layer.kind == plan::CacheKind::chunked)) {
      bad(fmt::format("got a {}, wanted one {} chunks; is it of another model?", kind, chunked ? "without" : "for"));
    }
    if (chunked) return chunked_cache();
    if (kind == "KVCache") return kv_cache();
    if (kind == "RotatingKVCache") return rotating_cache();
    return kind == "QuantizedKVCache" ? quantized_cache() : quantized_rotating_cache();
  }

 private:
  [[noreturn]] void bad(const std::string& problem) const { throw Error(Code::bad_weights, where_, problem); }

  int number(const std::string& path, const char* name) const {
    const auto found = stored_.numbers.find(path);
    if (found == stored_.numbers.end()) bad(fmt::format("{} is missing", name));
    if (found->second < 0 || found->second > most_tokens) bad(fmt::format("got {} {}, wanted 0 to {}", name, found->second, most_tokens));
    return static_cast<int>(found->second);
  }

  /** Nothing when it is stored as None. */
  std::optional<mx::array> array(const std::string& path) const {
    const auto found = stored_.arrays.find(path);
    if (found == stored_.arrays.end()) bad(fmt::format("state {} is missing", path));
    return found->second;
  }

  static std::string shape_text(const mx::array& a) { return fmt::format("[{}]", fmt::join(a.shape(), ", ")); }

  /** [1, kv_heads, S, width] of a float dtype. */
  void check_rows(const mx::array& a, int kv_heads, int width, const char* name) const {
    if (a.ndim() != 4 || a.shape(0) != 1 || a.shape(1) != kv_heads || a.shape(3) != width) {
      bad(fmt::format("{}: shape {}, wanted [1, {}, tokens, {}]; is it of another model?", name, shape_text(a), kv_heads, width));
    }
  }
  void check_float(const mx::array& a, const char* name) const {
    if (a.dtype() != mx::float32 && a.dtype() != mx::float16 && a.dtype() != mx::bfloat16) bad(fmt::format("{}: wanted floats", name));
  }

  LayerShape::Kv kv() const {
    if (wanted_.kv) return *wanted_.kv;
    throw Error(Code::unsupported, where_, "prompt caches of this kind of layer are not supported");
  }

  /** Keys and values, or nothing when both are None. */
  std::optional<std::pair<mx::array, mx::array>> keys_and_values() const {
    const auto k = array("0"), v = array("1");
    if (!k && !v) return std::nullopt;
    if (!k || !v) bad("got only one of keys and values");
    check_rows(*k, kv().kv_heads, kv().key_dims, "keys");
    check_rows(*v, kv().kv_heads, kv().value_dims, "values");
    check_float(*k, "keys");
    check_float(*v, "values");
    if (k->shape(2) != v->shape(2) || k->dtype() != v->dtype()) bad("keys and values differ in length or dtype");
    return std::pair(deep(*k), deep(*v));
  }

  CachePtr kv_cache() const {
    const auto held = keys_and_values();
    const int offset = held || stored_.numbers.contains("2") ? number("2", "offset") : 0;
    check_offset(offset, held ? held->first.shape(2) : 0);
    if (!held) return std::make_unique<KvCache>();
    return KvCache::restored(held->first, held->second, offset);
  }

  void check_offset(int offset, int rows) const {
    if (offset > rows) bad(fmt::format("offset {} is beyond the {} tokens that are stored", offset, rows));
  }

  /** The reference keeps rows of the chunk before, too, and room for more behind the last. */
  CachePtr chunked_cache() const {
    const bool quantized = stored_.kind == "QuantizedChunkedKVCache";
    const int offset = number("2", "offset"), chunk = number("3", "chunk_size"), start = number("4", "start_position");
    if (chunk != wanted_.layer.window_tokens) {
      bad(fmt::format("got chunks of {} tokens, wanted {}; is it of another model?", chunk, wanted_.layer.window_tokens));
    }
    const int begin = offset - offset % chunk, used = offset - begin;
    if (start > offset || (used > 0 && start > begin)) {
      bad(fmt::format("offset {} and start_position {} leave out tokens of a chunk of {}", offset, start, chunk));
    }
    std::unique_ptr<AttentionCache> rows;
    Planes parts;
    std::optional<Quantization> q;
    if (quantized) {
      q = quantization("5", "6");
      parts = planes(*q);
    } else if (const auto held = keys_and_values()) {
      parts = {held->first, held->second};
    }
    check_offset(offset - start, parts.empty() ? 0 : parts[0].shape(2));
    if (used == 0) parts.clear();
    for (auto& part : parts) part = deep(cache::rows(part, begin - start, offset - start));
    if (q)
      rows = std::make_unique<QuantizedKvCache>(q->bits, q->group_size, std::move(parts), used);
    else if (parts.empty())
      rows = std::make_unique<KvCache>();
    else
      rows = KvCache::restored(parts[0], parts[1], used);
    return std::make_unique<ChunkedKvCache>(chunk, begin, std::move(rows));
  }

  Ring ring(int rows) const {
    const Ring r{
        .max_size = number("4", "max_size"), .keep = number("3", "keep"), .offset = number("2", "offset"), .index = number("5", "index")};
    if (!r.consistent(rows)) {
      bad(fmt::format("offset {}, keep {}, max_size {}, index {} contradict the {} tokens that are stored", r.offset, r.keep, r.max_size,
                      r.index, rows));
    }
    // One token sees all that the cache holds, so it may not hold more than the window.
    if (const int window = wanted_.layer.window_tokens; wanted_.layer.kind == plan::CacheKind::rotating && r.max_size > window) {
      bad(fmt::format("got max_size {}, wanted at most the layer's window of {}; is it of another model?", r.max_size, window));
    }
    return r;
  }

  CachePtr rotating_cache() const {
    const auto held = keys_and_values();
    const auto r = ring(held ? held->first.shape(2) : 0);
    if (!held) return std::make_unique<RotatingKvCache>(r.max_size, r.keep);
    return RotatingKvCache::restored(held->first, held->second, r);
  }

  Quantization quantization(const char* group_path, const char* bits_path) const {
    const Quantization q{.bits = number(bits_path, "bits"), .group_size = number(group_path, "group_size"), .start_tokens = 0};
    const bool bits_known = (q.bits >= 2 && q.bits <= 6) || q.bits == 8,
               group_known = q.group_size == 32 || q.group_size == 64 || q.group_size == 128;
    if (!bits_known || !group_known)
      bad(fmt::format("got {} bits in groups of {}, wanted 2 to 8 bits in groups of 32, 64 or 128", q.bits, q.group_size));
    for (const int dims : {kv().key_dims, kv().value_dims}) {
      if (dims % q.group_size != 0) bad(fmt::format("groups of {} do not divide the {} numbers of a head", q.group_size, dims));
    }
    return q;
  }

  /** Six planes, or none. */
  Planes planes(const Quantization& q) const {
    if (stored_.arrays.contains("0") && !array("0")) return {};
    Planes list;
    const char* names[] = {"keys", "scales of the keys", "biases of the keys", "values", "scales of the values", "biases of the values"};
    for (int i = 0; i < 6; ++i) {
      const auto part = array(fmt::format("{}.{}", i / 3, i % 3));
      const int dims = i < 3 ? kv().key_dims : kv().value_dims;
      if (!part) bad(fmt::format("{} are missing", names[i]));
      check_rows(*part, kv().kv_heads, i % 3 == 0 ? dims * q.bits / 32 : dims / q.group_size, names[i]);
      if (i % 3 == 0 && part->dtype() != mx::uint32) bad(fmt::format("{}: wanted uint32", names[i]));
      if (i % 3 != 0) check_float(*part, names[i]);
      list.push_back(*part);
    }
    for (int i = 1; i < 6; ++i) {
      const bool same_dtype = i % 3 == 0 || list[i].dtype() == list[1].dtype();
      if (list[i].shape(2) != list[0].shape(2) || !same_dtype) bad("the parts of keys and values differ in length or dtype");
    }
    for (auto& part : list) part = deep(part);
    return list;
  }

  CachePtr quantized_cache() const {
    const auto q = quantization("3", "4");
    auto parts = planes(q);
    const int offset = number("2", "offset");
    check_offset(offset, parts.empty() ? 0 : parts[0].shape(2));
    return std::make_unique<QuantizedKvCache>(q.bits, q.group_size, std::move(parts), offset);
  }

  CachePtr quantized_rotating_cache() const {
    const auto q = quantization("6", "7");
    auto parts = planes(q);
    const auto r = ring(parts.empty() ? 0 : parts[0].shape(2));
    return std::make_unique<QuantizedRotatingKvCache>(q.bits, q.group_size, r, std::move(parts));
  }

  CachePtr arrays_cache() const {
    for (const char* path : {"1", "2"}) {
      if (const auto found = stored_.arrays.find(path); found != stored_.arrays.end() && found->second)
        bad("caches of padded batches are not supported");
    }
    const int count = wanted_.layer.states;
    auto made = std::make_unique<RecurrentCache>(count);
    int64_t values = 0;
    for (int i = 0; i < count; ++i) {
      const auto slot = array(fmt::format("0.{}", i));
      if (!slot) continue;
      if (!wanted_.slots.empty() && !std::ranges::equal(slot->shape(), wanted_.slots[i])) {
        bad(fmt::format("state {}: shape {}, wanted [{}]; is it of another model?", i, shape_text(*slot),
                        fmt::join(wanted_.slots[i], ", ")));
      }
      check_float(*slot, "state");
      values += static_cast<int64_t>(slot->size());
      made->set_slot(i, deep(*slot));
    }
    if (values != 0 && values != wanted_.layer.values_fixed) {
      bad(fmt::format("got {} numbers of state, wanted {}; is it of another model?", values, wanted_.layer.values_fixed));
    }
    if (stored_.arrays.contains(fmt::format("0.{}", count))) bad(fmt::format("got more than {} states; is it of another model?", count));
    return made;
  }

  const Stored& stored_;
  const LayerShape& wanted_;
  const std::string& where_;
};

}  // namespace

CachePtr restore(const Stored& stored, const LayerShape& wanted, const std::string& where) {
  return Reader(stored, wanted, where).read();
}

}  // namespace mlxlm::cache
