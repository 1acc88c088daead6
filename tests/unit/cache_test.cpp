// Caches against sequences recorded from mlx_lm (make_expected_cache.py): by update() and by plans that the test carries out.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <numeric>

#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "cache/cache.h"
#include "cache/prompt_file.h"

namespace mlxlm::cache {
namespace {

constexpr int kHeads = 3, kKeyDims = 4, kValueDims = 5;

/** As rows() of make_expected_cache.py. */
float number(int token, int b, int h, int e) {
  return float(token * 64 + b * 32 + h * 8 + e);
}

mx::array rows(int first, int count, int batch, int dims, float sign, mx::Dtype dtype = mx::float32) {
  std::vector<float> values;
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < kHeads; ++h) {
      for (int t = first; t < first + count; ++t) {
        for (int e = 0; e < dims; ++e) values.push_back(sign * number(t, b, h, e));
      }
    }
  }
  return mx::astype(mx::array(values.data(), {batch, kHeads, count, dims}, mx::float32), dtype);
}

/** The tokens that every head and batch entry holds; a failure when they differ. */
std::vector<int> tokens_of(const mx::array& a, float sign) {
  auto values = mx::contiguous(mx::astype(a, mx::float32));
  mx::eval(values);
  const int batch = a.shape(0), length = a.shape(2), dims = a.shape(3);
  std::vector<int> tokens;
  for (int t = 0; t < length; ++t) tokens.push_back(static_cast<int>(sign * values.data<float>()[t * dims]) / 64);
  for (int i = 0; i < static_cast<int>(values.size()); ++i) {
    const int e = i % dims, t = i / dims % length, h = i / dims / length % kHeads, b = i / dims / length / kHeads;
    if (values.data<float>()[i] != sign * number(tokens[t], b % batch, h, e)) {
      ADD_FAILURE() << "batch " << b << " head " << h << " row " << t << " dim " << e << ": " << values.data<float>()[i];
      break;
    }
  }
  return tokens;
}

std::vector<int> expand(const json& runs) {
  std::vector<int> tokens;
  for (const auto& run : runs) {
    for (int i = 0; i < run[1].get<int>(); ++i) tokens.push_back(run[0].get<int>() + i);
  }
  return tokens;
}

std::unique_ptr<AttentionCache> make(const json& expected) {
  if (expected.at("kind") == "full") return std::make_unique<KvCache>();
  return std::make_unique<RotatingKvCache>(expected.at("max_size").get<int>(), expected.at("keep").get<int>());
}

using Pair = std::pair<mx::array, mx::array>;

Pair by_update(AttentionCache& cache, int first, int count, int batch, mx::Dtype dtype) {
  return cache.update(rows(first, count, batch, kKeyDims, 1, dtype), rows(first, count, batch, kValueDims, -1, dtype));
}

/** What a kernel does with a plan. */
void carry_out(const WritePlan& plan, mx::array buffer, const std::optional<mx::array>& old, mx::array added) {
  added = mx::contiguous(added);
  mx::eval(added);
  const int64_t row_bytes = buffer.shape(3) * int64_t(mx::size_of(buffer.dtype())), capacity = buffer.shape(2);
  for (int h = 0; h < kHeads; ++h) {
    auto* to = buffer.data<char>() + h * capacity * row_bytes;
    for (const auto& copy : plan.copies) {
      ASSERT_TRUE(old.has_value());
      const char* from = old->data<char>() + h * old->shape(2) * row_bytes;
      ASSERT_GE(copy.from, 0);
      ASSERT_LE(copy.from + copy.rows, old->shape(2));
      ASSERT_LE(copy.to + copy.rows, capacity);
      std::memcpy(to + copy.to * row_bytes, from + copy.from * row_bytes, copy.rows * row_bytes);
    }
    ASSERT_GE(plan.write_at, 0);
    ASSERT_LE(plan.write_at + added.shape(2), capacity);
    std::memcpy(to + plan.write_at * row_bytes, added.data<char>() + h * added.shape(2) * row_bytes, added.shape(2) * row_bytes);
  }
}

Pair by_plan(AttentionCache& cache, int first, int count, mx::Dtype dtype) {
  const auto plan = cache.plan_write(count, {kHeads, kKeyDims, kValueDims, dtype});
  carry_out(plan, plan.keys, plan.old_keys, rows(first, count, 1, kKeyDims, 1, dtype));
  carry_out(plan, plan.values, plan.old_values, rows(first, count, 1, kValueDims, -1, dtype));
  std::vector<mx::array> seen_keys, seen_values;
  int own = plan.visible_rows;
  for (const auto& part : plan.shared) {
    seen_keys.push_back(mx::slice(part->keys, {0, 0, 0, 0}, {1, kHeads, part->rows, kKeyDims}));
    seen_values.push_back(mx::slice(part->values, {0, 0, 0, 0}, {1, kHeads, part->rows, kValueDims}));
    own -= part->rows;
  }
  EXPECT_LE(own, plan.keys.shape(2));
  seen_keys.push_back(mx::slice(plan.keys, {0, 0, 0, 0}, {1, kHeads, own, kKeyDims}));
  seen_values.push_back(mx::slice(plan.values, {0, 0, 0, 0}, {1, kHeads, own, kValueDims}));
  return {mx::concatenate(seen_keys, 2), mx::concatenate(seen_values, 2)};
}

enum class How { update, batch, f16, plan, both };

/** Plays a recorded sequence. `both` alternates, as a model does when one executor takes over from the other. */
void play(const json& expected, How how) {
  const auto cache = make(expected);
  const auto dtype = how == How::f16 ? mx::float16 : mx::float32;
  int next = 0, step_number = 0;
  for (const auto& step : expected.at("steps")) {
    if (step.contains("trim")) {
      ASSERT_EQ(cache->trim(step.at("trim").get<int>()), step.at("trimmed").get<int>()) << "step " << step_number;
    } else {
      const int count = step.at("update").get<int>();
      const bool plan = how == How::plan || (how == How::both && step_number % 2 == 1);
      const auto [k, v] = plan ? by_plan(*cache, next, count, dtype) : by_update(*cache, next, count, how == How::batch ? 2 : 1, dtype);
      next += count;
      ASSERT_EQ(tokens_of(k, 1), expand(step.at("tokens"))) << "step " << step_number;
      ASSERT_EQ(tokens_of(v, -1), expand(step.at("tokens"))) << "step " << step_number;
    }
    ASSERT_EQ(cache->offset(), step.at("offset").get<int>()) << "step " << step_number;
    ASSERT_EQ(cache->trimmable(), step.at("trimmable").get<bool>()) << "step " << step_number;
    ++step_number;
  }
}

const json& cases() {
  static const json all = read_json_file(std::filesystem::path(MLXLM_TEST_DATA) / "cache" / "expected.json");
  return all;
}

std::string name_of(How how) {
  const char* names[] = {"update", "batch", "f16", "plan", "both"};
  return names[static_cast<int>(how)];
}

class Recorded : public testing::TestWithParam<How> {};
INSTANTIATE_TEST_SUITE_P(Ways, Recorded, testing::Values(How::update, How::batch, How::f16, How::plan, How::both),
                         [](const auto& info) { return name_of(info.param); });

TEST_P(Recorded, AsTheReference) {
  ASSERT_GT(cases().size(), 50u);
  for (std::size_t i = 0; i < cases().size(); ++i) {
    const auto& expected = cases()[i];
    int total = 0;
    for (const auto& step : expected.at("steps")) total += step.value("update", 0);
    if (GetParam() == How::f16 && total > 30) continue;  // float16 holds whole numbers up to 2048 only
    SCOPED_TRACE("case " + std::to_string(i) + ": " + expected.at("kind").get<std::string>() + ", max " +
                 std::to_string(expected.value("max_size", 0)) + ", keep " + std::to_string(expected.value("keep", 0)));
    play(expected, GetParam());
    if (testing::Test::HasFatalFailure()) return;
  }
}

/** What was given stays as it was, also when the cache writes into its memory later. */
TEST(Caches, DoNotWriteIntoWhatTheyWereGiven) {
  for (const char* kind : {"full", "rotating"}) {
    const auto cache = make(json{{"kind", kind}, {"max_size", 4}, {"keep", 1}});
    auto k = mx::contiguous(rows(0, 4, 1, kKeyDims, 1)), v = mx::contiguous(rows(0, 4, 1, kValueDims, -1));
    mx::eval(k, v);
    cache->update(k, v);
    for (int t = 4; t < 12; ++t) {
      const auto [a, b] = by_update(*cache, t, 1, 1, mx::float32);
      mx::eval(a, b);
    }
    EXPECT_EQ(tokens_of(k, 1), (std::vector<int>{0, 1, 2, 3})) << kind;
    EXPECT_EQ(tokens_of(v, -1), (std::vector<int>{0, 1, 2, 3})) << kind;
  }
}

/** Several steps may be built before the first is evaluated. */
TEST(Caches, UpdatesMayBeEvaluatedLate) {
  for (const char* kind : {"full", "rotating"}) {
    const auto cache = make(json{{"kind", kind}, {"max_size", 300}, {"keep", 4}});
    for (int t = 0; t < 270; ++t) by_update(*cache, t, 1, 1, mx::float32);
    const auto [k, v] = by_update(*cache, 270, 1, 1, mx::float32);
    std::vector<int> all(271);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(tokens_of(k, 1), all) << kind;
    EXPECT_EQ(tokens_of(v, -1), all) << kind;
  }
}

TEST(Caches, CopiesAreIndependent) {
  for (const char* kind : {"full", "rotating"}) {
    for (const int before : {1, 3, 6, 9, 257}) {
      for (const bool plan : {false, true}) {
        SCOPED_TRACE(std::string(kind) + " after " + std::to_string(before) + (plan ? " by plan" : ""));
        const auto add = [&](AttentionCache& c, int first, int count) {
          return plan ? by_plan(c, first, count, mx::float32) : by_update(c, first, count, 1, mx::float32);
        };
        const json spec{{"kind", kind}, {"max_size", 8}, {"keep", 2}};
        const auto first = make(spec), alone = make(spec);
        add(*first, 0, before);
        const auto copied = first->copy();
        auto& second = dynamic_cast<AttentionCache&>(*copied);
        EXPECT_EQ(second.offset(), first->offset());
        EXPECT_EQ(second.trimmable(), first->trimmable());
        // The copy goes another way; the first then is as if there had been none.
        add(*alone, 0, before);
        for (int i = 0; i < 10; ++i) add(second, 1000 + i, 1);
        add(second, 1100, 3);
        for (int i = 0; i < 10; ++i) {
          const auto a = add(*first, before + i, 1), b = add(*alone, before + i, 1);
          ASSERT_EQ(tokens_of(a.first, 1), tokens_of(b.first, 1));
          ASSERT_EQ(tokens_of(a.second, -1), tokens_of(b.second, -1));
        }
      }
    }
  }
  EXPECT_EQ(KvCache().copy()->offset(), 0);
  EXPECT_TRUE(RotatingKvCache(4, 0).copy()->state().empty());
}

TEST(Caches, BytesAndState) {
  KvCache full;
  EXPECT_EQ(full.bytes(), 0);
  EXPECT_TRUE(full.state().empty());
  by_update(full, 0, 3, 1, mx::float16);
  ASSERT_EQ(full.state().size(), 2u);
  EXPECT_EQ(full.bytes(), 256 * kHeads * (kKeyDims + kValueDims) * 2);
  by_update(full, 3, 254, 1, mx::float16);
  EXPECT_GE(full.bytes(), 257 * kHeads * (kKeyDims + kValueDims) * 2);
  EXPECT_LE(full.bytes(), 512 * kHeads * (kKeyDims + kValueDims) * 2);

  RotatingKvCache rotating(10, 2);
  EXPECT_EQ(rotating.max_size(), 10);
  EXPECT_EQ(rotating.bytes(), 0);
  for (int t = 0; t < 100; ++t) {
    by_update(rotating, t, 1, 1, mx::float16);
    ASSERT_EQ(rotating.bytes(), 10 * kHeads * (kKeyDims + kValueDims) * 2);
  }
}

TEST(Caches, TrimForgetsNoMoreThanThereIs) {
  KvCache full;
  EXPECT_EQ(full.trim(5), 0);
  by_update(full, 0, 3, 1, mx::float32);
  EXPECT_EQ(full.trim(-1), 0);
  EXPECT_EQ(full.trim(2), 2);
  EXPECT_EQ(full.trim(2), 1);
  EXPECT_EQ(full.offset(), 0);
  RotatingKvCache rotating(4, 0);
  by_update(rotating, 0, 3, 1, mx::float32);
  EXPECT_EQ(rotating.trim(-7), 0);
  EXPECT_EQ(rotating.trim(7), 3);
  by_update(rotating, 3, 4, 1, mx::float32);
  EXPECT_FALSE(rotating.trimmable());
  EXPECT_EQ(rotating.trim(1), 0);  // what it would need is overwritten
  EXPECT_EQ(rotating.offset(), 4);
}

/** A chunk that is not the first can be cut back to where it begins; several layers only by what all can forget. */
TEST(Caches, TrimWithinAChunk) {
  const auto chunked = [](int tokens) {
    auto c = std::make_unique<ChunkedKvCache>(8);
    for (int i = 0; i < tokens; ++i) c->update(rows(i, 1, 1, kKeyDims, 1), rows(i, 1, 1, kValueDims, -1));
    return c;
  };
  const auto c = chunked(13);
  EXPECT_FALSE(c->trimmable());
  EXPECT_EQ(c->trimmable_tokens(), 5);
  EXPECT_EQ(c->trim(3), 3);
  EXPECT_EQ(c->offset(), 10);
  const auto [k, v] = c->update(rows(20, 2, 1, kKeyDims, 1), rows(20, 2, 1, kValueDims, -1));
  EXPECT_EQ(tokens_of(k, 1), (std::vector<int>{8, 9, 20, 21}));
  EXPECT_EQ(tokens_of(v, -1), (std::vector<int>{8, 9, 20, 21}));
  EXPECT_EQ(c->trim(100), 4);
  EXPECT_EQ(c->offset(), 8);
  EXPECT_EQ(c->trim(1), 0);
  for (const int n : {5, 6}) {
    Caches layers;
    layers.push_back(chunked(13));
    layers.push_back(nullptr);
    auto whole = std::make_unique<KvCache>();
    whole->update(rows(0, 13, 1, kKeyDims, 1), rows(0, 13, 1, kValueDims, -1));
    layers.push_back(std::move(whole));
    EXPECT_EQ(trim(layers, n), n == 5 ? 5 : 0);
    EXPECT_EQ(layers[0]->offset(), n == 5 ? 8 : 13);
    EXPECT_EQ(layers[2]->offset(), n == 5 ? 8 : 13);
  }
}

TEST(Caches, Recurrent) {
  RecurrentCache cache(2);
  EXPECT_TRUE(cache.state().empty());
  EXPECT_EQ(cache.bytes(), 0);
  EXPECT_FALSE(cache.slot(0) || cache.slot(1));
  EXPECT_FALSE(cache.trimmable());
  EXPECT_EQ(cache.trim(3), 0);
  cache.set_slot(1, mx::full({2, 3}, 7.f));
  cache.advance(5);
  EXPECT_EQ(cache.offset(), 5);
  EXPECT_EQ(cache.bytes(), 24);
  EXPECT_EQ(cache.state().size(), 1u);
  const auto copied = cache.copy();
  cache.set_slot(1, mx::full({2, 3}, 8.f));
  cache.advance(1);
  auto& other = dynamic_cast<RecurrentCache&>(*copied);
  EXPECT_EQ(other.offset(), 5);
  EXPECT_FALSE(other.slot(0));
  ASSERT_TRUE(other.slot(1));
  EXPECT_EQ(mx::max(*other.slot(1)).item<float>(), 7.f);
  EXPECT_THROW(cache.slot(2), std::out_of_range);
}

// ---- make_caches ---------------------------------------------------------------------------------------------------

arch::Model model_of(std::vector<arch::Layer> layers) {
  arch::Model model;
  model.vocab = 16;
  model.width = 8;
  model.layers = std::move(layers);
  return model;
}

arch::Layer layer_of(arch::Op op) {
  return {arch::Step{.pre = {}, .ops = {std::move(op)}, .post = {}}};
}

arch::Attention attention(std::optional<int> window) {
  arch::Attention a;
  a.heads = 2;
  a.kv_heads = 1;
  a.head_dim = 4;
  a.window = window;
  return a;
}

/** Where the second token more than `max` goes: the first that is lost. */
int first_lost(Cache& cache, int max) {
  auto& c = dynamic_cast<AttentionCache&>(cache);
  for (int t = 0; t < max; ++t) by_update(c, t, 1, 1, mx::float32);
  const auto held = tokens_of(by_update(c, max, 1, 1, mx::float32).first, 1);
  for (int t = 0; t < max; ++t) {
    if (std::find(held.begin(), held.end(), t) == held.end()) return t;
  }
  return -1;
}

TEST(MakeCaches, FollowTheLayers) {
  const auto model = model_of({layer_of(attention({})), layer_of(attention(6)), layer_of(arch::Mlp{.hidden = 4}),
                               layer_of(arch::Mamba2{.heads = 2, .head_dim = 4, .state = 4, .groups = 1, .conv = 4})});
  const auto caches = make_caches(model);
  ASSERT_EQ(caches.size(), 4u);
  EXPECT_NE(dynamic_cast<KvCache*>(caches[0].get()), nullptr);
  const auto* rotating = dynamic_cast<RotatingKvCache*>(caches[1].get());
  ASSERT_NE(rotating, nullptr);
  EXPECT_EQ(rotating->max_size(), 6);
  EXPECT_EQ(first_lost(*caches[1], 6), 0);
  EXPECT_EQ(caches[2], nullptr);
  EXPECT_NE(dynamic_cast<RecurrentCache*>(caches[3].get()), nullptr);
  EXPECT_TRUE(make_caches(model_of({})).empty());
}

TEST(MakeCaches, ABoundHoldsForEveryLayer) {
  const auto model = model_of({layer_of(attention({})), layer_of(attention(6)), layer_of(attention(100))});
  for (const int bound : {1, 2, 4, 5, 20}) {
    const auto caches = make_caches(model, bound);
    const auto size = [&](int i) { return dynamic_cast<RotatingKvCache&>(*caches[i]).max_size(); };
    EXPECT_EQ(size(0), bound);
    EXPECT_EQ(size(1), std::min(bound, 6));
    EXPECT_EQ(size(2), std::min(bound, 100));
    EXPECT_EQ(first_lost(*caches[0], bound), std::min(4, bound - 1)) << bound;  // the first four stay
    EXPECT_EQ(first_lost(*caches[2], bound), 0) << bound;
  }
}

}  // namespace
}  // namespace mlxlm::cache
