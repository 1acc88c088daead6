// The kernels of the fused executor: the same bits as the primitives where they share arithmetic, plain doubles elsewhere.
#include <array>

#include "kernels/cpu/eager.h"
#include "kernels_cpu_support.h"

namespace mlxlm::tests {
namespace {

cpu::PackedMatrixPtr packed(uint32_t seed, mx::Shape shape, int bits, int group) {
  const auto w = random(seed, std::move(shape), mx::float32, 0.2f);
  if (bits == 0) return cpu::pack_dense({made(mx::astype(w, mx::bfloat16))});
  const auto q = mx::quantize(w, group, bits);
  return cpu::pack_affine({made(q[0])}, {made(mx::astype(q[1], mx::float16))}, {made(mx::astype(q[2], mx::float16))}, bits, group);
}

struct Matrix {
  int rows, bits, group;
  bool bias;
};

/** Rows of an array, as a source of activations. */
struct Source {
  std::vector<double> values;
  int width;
  explicit Source(const mx::array& x) : values(values_of(x)), width(x.shape(-1)) {}
  cpu::RowSource function() const {
    return [this](int row, float* to) { std::copy_n(values.begin() + int64_t(row) * width, width, to); };
  }
};

const std::vector<std::vector<Matrix>>& maps() {
  static const std::vector<std::vector<Matrix>> all{
      {{48, 4, 32, false}},
      {{21, 4, 64, true}},
      {{130, 8, 32, false}},
      {{19, 0, 0, true}},
      {{20, 4, 32, false}, {7, 4, 32, true}, {16, 4, 32, false}},
      {{20, 4, 32, true}, {7, 8, 32, false}, {16, 4, 64, true}, {5, 0, 0, false}, {33, 3, 128, false}},
  };
  return all;
}

TEST(EagerMap, IsTheMatmulOfItsParts) {
  constexpr int k = 128;
  for (const auto& parts : maps()) {
    cpu::EagerMap map;
    std::vector<std::optional<mx::array>> biases;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const auto& p = parts[i];
      const uint32_t seed = 10 + static_cast<uint32_t>(i);
      map.parts.push_back({packed(seed, {p.rows, k}, p.bits, p.group), p.bias ? noise(seed + 50, p.rows) : std::vector<float>{}});
      biases.push_back(p.bias ? std::optional(from(map.parts.back().bias, {p.rows})) : std::nullopt);
      map.out_dims += p.rows;
    }
    for (const auto dtype : float_dtypes()) {
      for (const int m : {1, 2, 3, 8, 13, 16, 17, 65, 130}) {
        const auto x = random(1, {m, k}, dtype);
        const Source source(x);
        const int64_t stride = map.out_dims + 3;
        std::vector<float> out(m * stride, 777.f);
        cpu::eager_map(map, m, source.function(), dtype == mx::float32, out.data(), stride);
        std::vector<mx::array> wanted;
        for (std::size_t i = 0; i < parts.size(); ++i) wanted.push_back(cpu::matmul(x, map.parts[i].matrix, biases[i]));
        const auto y = mx::array(out.data(), {m, static_cast<int>(stride)}, mx::float32);
        ASSERT_EQ(bits_of(mx::astype(mx::slice(y, {0, 0}, {m, map.out_dims}), dtype)), bits_of(mx::concatenate(wanted, -1)))
            << m << " " << name_of(dtype);
        for (int i = 0; i < m; ++i) {
          for (int n = map.out_dims; n < stride; ++n) ASSERT_EQ(out[i * stride + n], 777.f) << "wrote past row " << i;
        }
      }
    }
  }
}

/** Products of one map with that precision: by the fused executor's kernel and by the primitive. */
std::vector<Bits> products(cpu::Precision precision, bool output_layer) {
  constexpr int k = 128, m = 3, rows = 48;
  cpu::set_precision(precision);
  cpu::EagerMap map{.parts = {{packed(3, {rows, k}, 4, 32), {}}}, .out_dims = rows, .output_layer = output_layer};
  const auto x = random(1, {m, k}, mx::bfloat16);
  std::vector<float> out(m * rows);
  cpu::eager_map(map, m, Source(x).function(), false, out.data(), rows);
  const auto y = mx::array(out.data(), {m, rows}, mx::float32);
  auto primitive = cpu::matmul(x, map.parts[0].matrix, std::nullopt, output_layer);
  std::vector<Bits> bits{bits_of(mx::astype(y, mx::bfloat16)), bits_of(primitive)};
  cpu::set_precision(cpu::Precision::standard);
  return bits;
}

TEST(EagerMap, AnOutputLayerKeepsTwoDigitsWhereOthersAreFast) {
  const auto two = products(cpu::Precision::standard, false);
  EXPECT_EQ(two[0], two[1]);
  EXPECT_EQ(products(cpu::Precision::fast, true), two);
  if (cpu::isa().uses_digits) {
    EXPECT_NE(products(cpu::Precision::fast, false), two);
  }
}

TEST(EagerMap, NoRows) {
  cpu::EagerMap map{{{packed(1, {16, 32}, 4, 32), {}}}, 16};
  cpu::eager_map(map, 0, [](int, float*) { FAIL(); }, false, nullptr, 16);
}

TEST(EagerGather, IsTheGatherOfItsParts) {
  constexpr int k = 64, experts = 5;
  for (const auto& parts :
       {std::vector<Matrix>{{21, 4, 32, false}}, {{16, 8, 32, false}, {9, 8, 32, false}}, {{16, 4, 32, false}, {9, 0, 0, false}}}) {
    cpu::EagerMap map;
    for (const auto& p : parts) {
      map.parts.push_back({packed(3, {experts, p.rows, k}, p.bits, p.group), {}});
      map.out_dims += p.rows;
    }
    for (const auto dtype : float_dtypes()) {
      for (const auto& [m, top_k] : {std::pair{1, 1}, {1, 4}, {9, 2}, {40, 3}}) {
        std::vector<int> chosen;
        for (int i = 0; i < m * top_k; ++i) chosen.push_back(static_cast<int>(splitmix64(i) % experts));
        const auto indices = mx::array(chosen.data(), {m, top_k}, mx::int32);
        for (const bool own : {false, true}) {
          const auto x = own ? random(4, {m, top_k, k}, dtype) : random(4, {m, k}, dtype);
          const Source source(x);
          std::vector<float> out(int64_t(m) * top_k * map.out_dims);
          cpu::eager_gather(map, m, top_k, chosen.data(), own, source.function(), dtype == mx::float32, out.data(), map.out_dims);
          std::vector<mx::array> wanted;
          for (const auto& p : map.parts) wanted.push_back(cpu::gather_matmul(x, p.matrix, indices, own));
          const auto y = mx::array(out.data(), {m, top_k, map.out_dims}, mx::float32);
          ASSERT_EQ(bits_of(mx::astype(y, dtype)), bits_of(mx::concatenate(wanted, -1))) << m << " " << top_k << " " << own;
        }
      }
    }
  }
}

TEST(EagerEmbedding, IsTheRow) {
  for (const auto& [bits, group] : {std::pair{4, 32}, {6, 64}, {0, 0}}) {
    const auto table = packed(5, {35, 64}, bits, group);
    for (const int n : {0, 15, 16, 34, -1, 1000}) {
      std::vector<float> row(64);
      cpu::eager_embedding(*table, n, row.data());
      const int inside = std::clamp(n, 0, 34);
      EXPECT_EQ(bits_of(mx::array(row.data(), {1, 64}, mx::float32)), bits_of(cpu::take_rows(table, mx::array({inside}), mx::float32)));
    }
  }
}

// ---- attention -----------------------------------------------------------------------------------------------------

/** A sequence whose cache has room, and its queries side by side with something else. */
struct Sequence {
  int tokens, keys, capacity;
  mx::array q, k, v;  // [1,H,L,E], [1,K,capacity,E], [1,K,capacity,F]
  std::vector<float> rows{};
  std::vector<float> out{};
};

constexpr int kGap = 5;

Sequence make_sequence(uint32_t seed, const cpu::AttentionShape& s, int tokens, int keys, mx::Dtype dtype) {
  const int capacity = keys + 37;
  Sequence made_one{tokens,
                    keys,
                    capacity,
                    random(seed, {1, s.heads, tokens, s.key_dims}),
                    random(seed + 1, {1, s.kv_heads, capacity, s.key_dims}, dtype),
                    random(seed + 2, {1, s.kv_heads, capacity, s.value_dims}, dtype)};
  const auto values = values_of(mx::transpose(made_one.q, {0, 2, 1, 3}));
  const int wide = s.heads * s.key_dims;
  for (int t = 0; t < tokens; ++t) {
    made_one.rows.insert(made_one.rows.end(), values.begin() + t * wide, values.begin() + (t + 1) * wide);
    made_one.rows.resize(made_one.rows.size() + kGap, NAN);
  }
  made_one.out.assign(int64_t(tokens) * (s.heads * s.value_dims + kGap), 777.f);
  return made_one;
}

void run(std::vector<Sequence*> sequences, const cpu::AttentionShape& shape, int window) {
  std::vector<cpu::EagerAttention> parts;
  for (auto* s : sequences) {
    parts.push_back({.q = s->rows.data(),
                     .out = s->out.data(),
                     .q_stride = shape.heads * shape.key_dims + kGap,
                     .out_stride = shape.heads * shape.value_dims + kGap,
                     .tokens = s->tokens,
                     .keys = s->k.data<uint8_t>(),
                     .values = s->v.data<uint8_t>(),
                     .capacity = s->capacity,
                     .visible = s->keys - s->tokens + 1,
                     .window = window});
  }
  cpu::eager_attention(parts, shape);
}

/** What was written, without the gaps; a failure when a gap was touched. */
mx::array result(const Sequence& s, const cpu::AttentionShape& shape) {
  const int wide = shape.heads * shape.value_dims;
  std::vector<float> values;
  for (int t = 0; t < s.tokens; ++t) {
    const float* row = s.out.data() + int64_t(t) * (wide + kGap);
    values.insert(values.end(), row, row + wide);
    for (int i = wide; i < wide + kGap; ++i) EXPECT_EQ(row[i], 777.f);
  }
  return mx::array(values.data(), {1, s.tokens, shape.heads, shape.value_dims}, mx::float32);
}

std::vector<double> plain(const Sequence& s, const cpu::AttentionShape& shape, int window) {
  const auto q = values_of(s.q), k = values_of(s.k), v = values_of(s.v);
  const int e = shape.key_dims, f = shape.value_dims, group = shape.heads / shape.kv_heads;
  std::vector<double> out(int64_t(s.tokens) * shape.heads * f), p(s.keys);
  for (int l = 0; l < s.tokens; ++l) {
    for (int h = 0; h < shape.heads; ++h) {
      const int end = s.keys - s.tokens + l + 1, begin = window > 0 ? std::max(0, end - window) : 0;
      const int64_t base = int64_t(h / group) * s.capacity;
      double peak = -INFINITY, total = 0;
      for (int j = begin; j < end; ++j) {
        p[j] = 0;
        for (int i = 0; i < e; ++i) p[j] += q[(int64_t(h) * s.tokens + l) * e + i] * k[(base + j) * e + i];
        p[j] *= shape.scale;
        if (shape.softcap > 0) p[j] = std::tanh(p[j] / shape.softcap) * shape.softcap;
        peak = std::max(peak, p[j]);
      }
      for (int j = begin; j < end; ++j) total += p[j] = std::exp(p[j] - peak);
      for (int j = begin; j < end; ++j) {
        for (int i = 0; i < f; ++i) out[(int64_t(l) * shape.heads + h) * f + i] += p[j] / total * v[(base + j) * f + i];
      }
    }
  }
  return out;
}

cpu::Storage storage_for(mx::Dtype dtype) {
  return dtype == mx::float32 ? cpu::Storage::f32 : dtype == mx::float16 ? cpu::Storage::f16 : cpu::Storage::bf16;
}

TEST(EagerAttention, AgreesWithDoubles) {
  for (const auto dtype : float_dtypes()) {
    for (const auto& [heads, kv, e, f] : {std::array{2, 2, 64, 64}, {4, 2, 32, 48}, {3, 1, 20, 7}, {8, 1, 16, 16}}) {
      for (const auto& [tokens, keys] :
           {std::pair{1, 1}, {1, 64}, {1, 65}, {1, 300}, {1, 1100}, {3, 3}, {5, 63}, {9, 130}, {33, 520}, {70, 70}}) {
        for (const int window : {0, 1, 50}) {
          for (const float softcap : {0.f, 3.f}) {
            if (keys > 500 && softcap > 0) continue;
            const cpu::AttentionShape shape{heads, kv, e, f, 0.2f, softcap, storage_for(dtype)};
            auto s = make_sequence(1, shape, tokens, keys, dtype);
            run({&s}, shape, window);
            ASSERT_TRUE(near(result(s, shape), plain(s, shape, window), 1e-5))
                << tokens << " of " << keys << " heads " << heads << "/" << kv << " window " << window << " softcap " << softcap << " "
                << name_of(dtype);
          }
        }
      }
    }
  }
}

/** What lies behind the visible keys is never read into a result. */
TEST(EagerAttention, RoomIsNotRead) {
  const cpu::AttentionShape shape{4, 2, 24, 40, 0.2f, 0.f, cpu::Storage::f32};
  for (const int keys : {1, 40, 64, 100}) {
    auto clean = make_sequence(1, shape, 1, keys, mx::float32), dirty = clean;
    const auto spoil = [&](const mx::array& a) {
      const auto used = mx::slice(a, {0, 0, 0, 0}, {1, 2, keys, a.shape(3)});
      return made(mx::concatenate({used, mx::full({1, 2, 37, a.shape(3)}, NAN)}, 2));
    };
    dirty.k = spoil(dirty.k);
    dirty.v = spoil(dirty.v);
    run({&clean}, shape, 0);
    run({&dirty}, shape, 0);
    EXPECT_EQ(bits_of(result(dirty, shape)), bits_of(result(clean, shape))) << keys;
  }
}

/** A token gives the same bits alone, within a prompt and beside other sequences. */
TEST(EagerAttention, TokensDoNotDependOnTheBatch) {
  for (const auto dtype : float_dtypes()) {
    for (const auto& [heads, kv] : {std::pair{4, 2}, {3, 1}, {9, 3}}) {
      for (const int window : {0, 70}) {
        const cpu::AttentionShape shape{heads, kv, 40, 24, 0.2f, 0.f, storage_for(dtype)};
        const int tokens = 37, keys = 560;  // over the border of a span
        auto whole = make_sequence(1, shape, tokens, keys, dtype);
        run({&whole}, shape, window);
        const auto wanted = result(whole, shape);
        for (const int from : {0, 1, 11, 30, 36}) {
          for (const int count : {1, 2, 6}) {
            if (from + count > tokens) continue;
            auto some = whole;
            some.tokens = count;
            some.keys = keys - tokens + from + count;
            const int64_t wide = heads * 40 + kGap;
            some.rows.assign(whole.rows.begin() + from * wide, whole.rows.begin() + (from + count) * wide);
            some.out.assign(count * (heads * 24 + kGap), 777.f);
            auto other = make_sequence(9, shape, 5, 700, dtype), third = make_sequence(19, shape, 1, 3, dtype);
            auto beside = some;
            run({&some}, shape, window);
            run({&other, &beside, &third}, shape, window);
            const auto expected = bits_of(mx::slice(wanted, {0, from, 0, 0}, {1, from + count, heads, 24}));
            ASSERT_EQ(bits_of(result(some, shape)), expected) << from << " " << count << " window " << window;
            ASSERT_EQ(bits_of(result(beside, shape)), expected) << from << " " << count << " window " << window;
          }
        }
      }
    }
  }
}

TEST(EagerAttention, NanShows) {
  const cpu::AttentionShape shape{2, 2, 16, 16, 0.2f, 0.f, cpu::Storage::f32};
  for (const int keys : {1, 20, 600}) {
    auto s = make_sequence(1, shape, 1, keys, mx::float32);
    auto values = values_of(s.k);
    values[3] = NAN;  // key 0 of kv head 0
    s.k = from({values.begin(), values.end()}, {1, 2, s.capacity, 16});
    run({&s}, shape, 0);
    const auto y = values_of(result(s, shape));
    for (int i = 0; i < 32; ++i) EXPECT_EQ(std::isnan(y[i]), i < 16) << keys << " " << i;
  }
}

}  // namespace
}  // namespace mlxlm::tests
