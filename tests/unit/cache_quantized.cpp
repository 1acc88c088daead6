// Quantized caches: the layout of mx.quantize, growth, rotation, and attention that reads the rows as they lie.
#include <cmath>
#include <new>
#include <random>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "arch/config.h"
#include "arch/registry.h"
#include "base/error.h"
#include "cache/prompt_file.h"
#include "cache/quantized.h"

namespace {

using namespace mlxlm;
namespace mx = mlx::core;
namespace cpu = kernels::cpu;

mx::array noise(mx::Shape shape, uint32_t seed, mx::Dtype dtype = mx::float32) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  int64_t count = 1;
  for (const int dim : shape) count *= dim;
  std::vector<float> values(count);
  for (auto& v : values) v = normal(random);
  return mx::astype(mx::array(values.data(), std::move(shape), mx::float32), dtype);
}

cpu::QuantizedRows quantized(const mx::array& x, int bits, int group) {
  const auto parts = mx::quantize(x, group, bits);
  return {parts[0], parts[1], parts[2], bits, group};
}

mx::array expanded(const cpu::QuantizedRows& r) {
  return mx::dequantize(r.packed, r.scales, r.biases, r.group_size, r.bits);
}

double worst(const mx::array& a, const mx::array& b) {
  EXPECT_EQ(a.shape(), b.shape());
  return mx::max(mx::abs(mx::astype(a, mx::float32) - mx::astype(b, mx::float32))).item<float>();
}

bool same(const mx::array& a, const mx::array& b) {
  return a.dtype() == b.dtype() && mx::array_equal(a, b).item<bool>();
}

TEST(QuantizedRows, ExpandAsMlxDoes) {
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const int group : {32, 64, 128}) {
      const auto rows = quantized(noise({1, 3, 5, 128}, bits), bits, group);
      EXPECT_LE(worst(cpu::dequantize(rows), expanded(rows)), 2e-6) << bits << " bits, groups of " << group;
    }
  }
}

/** Against attention over the expanded rows: the same numbers. */
TEST(QuantizedAttention, IsAttentionOverTheExpandedRows) {
  struct Case {
    int heads, kv_heads, tokens, keys, dims, window;
    float softcap;
  };
  const Case cases[] = {{4, 2, 1, 1, 64, 0, 0},    {9, 3, 1, 65, 64, 0, 0},    {4, 1, 7, 64, 128, 0, 0},    {2, 2, 33, 130, 128, 9, 0},
                        {6, 2, 1, 1100, 64, 0, 0}, {8, 2, 40, 700, 64, 0, 30}, {4, 4, 2, 600, 256, 100, 0}, {3, 1, 1, 17, 192, 0, 0}};
  int seed = 0;
  for (const auto& c : cases) {
    for (const int bits : {2, 3, 4, 6, 8}) {
      for (const auto dtype : {mx::float32, mx::float16, mx::bfloat16}) {
        SCOPED_TRACE(fmt::format("{} heads, {} keys, {} bits", c.heads, c.keys, bits));
        const auto q = noise({1, c.heads, c.tokens, c.dims}, ++seed, dtype);
        const auto k = quantized(noise({1, c.kv_heads, c.keys, c.dims}, ++seed, dtype), bits, 64);
        const auto v = quantized(noise({1, c.kv_heads, c.keys, c.dims}, ++seed, dtype), bits, 64);
        const cpu::AttentionOptions options{.scale = 1.f / std::sqrt(float(c.dims)), .window = c.window, .softcap = c.softcap};
        const auto got = cpu::attention(q, k, v, options);
        const auto in_f32 = [](const cpu::QuantizedRows& r) {
          return expanded({r.packed, mx::astype(r.scales, mx::float32), mx::astype(r.biases, mx::float32), r.bits, r.group_size});
        };
        const auto wanted = cpu::attention(mx::astype(q, mx::float32), in_f32(k), in_f32(v), options);
        EXPECT_LE(worst(got, wanted), dtype == mx::float32 ? 2e-5 : dtype == mx::float16 ? 4e-3 : 3e-2);
      }
    }
  }
}

TEST(QuantizedAttention, TakesViewsOfLargerBuffers) {
  const auto all = quantized(noise({1, 2, 50, 64}, 1), 4, 32);
  const auto cut = [](const mx::array& a) { return mx::slice(a, {0, 0, 3, 0}, {1, 2, 40, a.shape(3)}); };
  const cpu::QuantizedRows view{cut(all.packed), cut(all.scales), cut(all.biases), 4, 32};
  const cpu::QuantizedRows copy{mx::contiguous(view.packed), mx::contiguous(view.scales), mx::contiguous(view.biases), 4, 32};
  const auto q = noise({1, 4, 2, 64}, 2);
  EXPECT_TRUE(same(cpu::attention(q, view, view, {}), cpu::attention(q, copy, copy, {})));
  EXPECT_TRUE(same(cpu::dequantize(view), cpu::dequantize(copy)));
}

TEST(QuantizedKvCache, HoldsWhatQuantizeGives) {
  for (const int bits : {2, 3, 4, 6, 8}) {
    cache::QuantizedKvCache cache(bits, 32);
    std::vector<mx::array> keys, values;
    int at = 0;
    for (const int count : {5, 1, 1, 250, 300, 1, 2}) {
      keys.push_back(noise({1, 2, count, 96}, ++at));
      values.push_back(noise({1, 2, count, 64}, 100 + at));
      const auto held = cache.update_quantized(keys.back(), values.back());
      const auto k = quantized(mx::concatenate(keys, 2), bits, 32), v = quantized(mx::concatenate(values, 2), bits, 32);
      for (const auto& [got, wanted] : {std::pair(held.keys, k), std::pair(held.values, v)}) {
        EXPECT_TRUE(same(got.packed, wanted.packed) && same(got.scales, wanted.scales) && same(got.biases, wanted.biases))
            << bits << " bits, call " << at;
      }
    }
    EXPECT_EQ(cache.offset(), 560);
  }
}

TEST(QuantizedKvCache, ForgetsAndGoesOn) {
  cache::QuantizedKvCache cache(8, 32);
  const auto first = noise({1, 1, 4, 32}, 1), second = noise({1, 1, 2, 32}, 2);
  cache.update_quantized(first, first);
  EXPECT_EQ(cache.trim(1), 1);
  const auto copied = cache.copy();
  const auto held = cache.update_quantized(second, second);
  EXPECT_EQ(cache.offset(), 5);
  const auto wanted = quantized(mx::concatenate({mx::slice(first, {0, 0, 0, 0}, {1, 1, 3, 32}), second}, 2), 8, 32);
  EXPECT_TRUE(same(held.keys.packed, wanted.packed));
  EXPECT_EQ(copied->offset(), 3);
  EXPECT_EQ(cache.trim(100), 5);
}

/** Row by row quantization commutes with rotation. */
TEST(QuantizedRotatingKvCache, HoldsTheRowsOfThePlainOne) {
  for (const int keep : {0, 4}) {
    cache::RotatingKvCache plain(12, keep);
    std::unique_ptr<cache::AttentionCache> rotating;
    int at = 0;
    for (const int count : {3, 1, 1, 6, 1, 1, 1, 1, 1, 20, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5}) {
      if (++at == 3) rotating = plain.quantized(8, 32);
      const auto k = noise({1, 2, count, 32}, at), v = noise({1, 2, count, 64}, 50 + at);
      const auto wanted = plain.update(k, v);
      if (!rotating) continue;
      const auto got = rotating->update(k, v);
      EXPECT_LE(worst(got.first, expanded(quantized(wanted.first, 8, 32))), 1e-6) << "keep " << keep << ", call " << at;
      EXPECT_LE(worst(got.second, expanded(quantized(wanted.second, 8, 32))), 1e-6);
      EXPECT_EQ(rotating->offset(), plain.offset());
      EXPECT_EQ(rotating->trimmable(), plain.trimmable());
      EXPECT_EQ(rotating->max_size(), 12);
    }
  }
}

/** Where a call of several tokens is said to agree, it leaves the very rows, in the order in which later tokens sum them. */
TEST(QuantizedRotatingKvCache, OneCallAgreesToTheBit) {
  const auto token = [](int i) { return noise({1, 2, 1, 32}, 100 + i); };
  int agreed = 0;
  for (int before = 0; before < 20; ++before) {
    for (const int count : {2, 3}) {
      cache::QuantizedRotatingKvCache one(8, 32, {.max_size = 12}), together(8, 32, {.max_size = 12});
      for (auto* c : {&one, &together}) {
        for (int i = 0; i < before; ++i) c->update(token(i), token(i));
      }
      if (!together.one_call_agrees(count)) continue;
      ++agreed;
      std::vector<mx::array> call;
      for (int i = before; i < before + count; ++i) {
        one.update(token(i), token(i));
        call.push_back(token(i));
      }
      const auto x = mx::concatenate(call, 2);
      together.update(x, x);
      const auto wanted = one.update(token(50), token(50)), got = together.update(token(50), token(50));
      EXPECT_TRUE(mx::array_equal(got.first, wanted.first).item<bool>()) << count << " tokens after " << before;
    }
  }
  EXPECT_GT(agreed, 15);
}

TEST(QuantizeCaches, ConvertsWhenDue) {
  cache::Caches caches;
  caches.push_back(std::make_unique<cache::KvCache>());
  caches.push_back(nullptr);
  caches.push_back(std::make_unique<cache::RecurrentCache>(2));
  caches.push_back(std::make_unique<cache::RotatingKvCache>(8, 0));
  const auto kv = [&](int i) { return dynamic_cast<cache::AttentionCache*>(caches[i].get()); };
  const auto is_quantized = [&](int i) { return dynamic_cast<cache::QuantizedCache*>(caches[i].get()) != nullptr; };
  const cache::Quantization wanted{.bits = 4, .group_size = 32, .start_tokens = 10};
  const auto x = noise({1, 2, 9, 64}, 1);
  for (const int i : {0, 3}) kv(i)->update(x, x);
  const auto floats = cache::total_bytes(caches);
  cache::quantize_caches(caches, {});
  cache::quantize_caches(caches, wanted);
  EXPECT_FALSE(is_quantized(0) || is_quantized(3));
  for (const int i : {0, 3}) kv(i)->update(noise({1, 2, 1, 64}, 2), noise({1, 2, 1, 64}, 3));
  cache::quantize_caches(caches, wanted);
  EXPECT_TRUE(is_quantized(0) && is_quantized(3) && !is_quantized(2));
  EXPECT_EQ(kv(0)->offset(), 10);
  EXPECT_LT(cache::total_bytes(caches), floats / 4);
  EXPECT_NO_THROW(cache::check_prompt_quantization(caches, 4, 32));
  EXPECT_NO_THROW(cache::check_prompt_quantization(caches, 0, 0));
  try {  // the name of the field: the caller may be no command
    cache::check_prompt_quantization(caches, 8, 0);
    ADD_FAILURE() << "was accepted";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "kv_bits: got 8, but the prompt cache is quantized to 4 bits");
  }
  EXPECT_THROW(cache::check_prompt_quantization(caches, 4, 64), Error);
}

/** Cannot be converted, as when memory for it cannot be had. */
struct Inconvertible final : cache::AttentionCache {
  std::pair<mx::array, mx::array> update(const mx::array& k, const mx::array& v) override { return {k, v}; }
  int offset() const override { return 9; }
  bool trimmable() const override { return true; }
  int trim(int) override { return 0; }
  std::vector<mx::array> state() const override { return {}; }
  int64_t bytes() const override { return 0; }
  std::unique_ptr<cache::Cache> copy() const override { return std::make_unique<Inconvertible>(); }
  std::optional<cache::KvShape> shape() const override { return std::nullopt; }
  bool can_quantize() const override { return true; }
  std::unique_ptr<cache::AttentionCache> quantized(int, int) const override { throw std::bad_alloc(); }
};

TEST(QuantizeCaches, AFailureConvertsNone) {
  cache::Caches caches;
  caches.push_back(std::make_unique<cache::KvCache>());
  caches.push_back(std::make_unique<Inconvertible>());
  const auto x = noise({1, 2, 9, 64}, 1);
  dynamic_cast<cache::AttentionCache&>(*caches[0]).update(x, x);
  EXPECT_THROW(cache::quantize_caches(caches, {.bits = 4, .group_size = 32}), std::bad_alloc);
  ASSERT_NE(dynamic_cast<cache::KvCache*>(caches[0].get()), nullptr);
  EXPECT_EQ(caches[0]->offset(), 9);
}

TEST(QuantizeCaches, RefusesWhatCannotBe) {
  json config{{"model_type", "llama"},  {"hidden_size", 160},       {"intermediate_size", 64},
              {"num_hidden_layers", 1}, {"num_attention_heads", 2}, {"num_key_value_heads", 1},
              {"rms_norm_eps", 1e-5},   {"vocab_size", 16},         {"rope_theta", 1e4}};
  const auto check = [&](int bits, int group, int start = 0) {
    cache::check_quantization(arch::build(arch::Config(config)), {.bits = bits, .group_size = group, .start_tokens = start});
  };
  EXPECT_NO_THROW(check(0, 64));
  EXPECT_THROW(check(4, 32), Error);  // 80 dims
  config["head_dim"] = 96;
  EXPECT_NO_THROW(check(4, 32));
  for (const auto& [bits, group] : {std::pair(7, 32), {1, 32}, {16, 32}, {-4, 32}, {4, 16}, {4, 0}, {4, 64}, {4, -32}}) {
    EXPECT_THROW(check(bits, group), Error) << bits << " " << group;
  }
  EXPECT_THROW(check(4, 32, -1), Error);
}

}  // namespace
