// Matrix products with packed weights against plain double arithmetic, and their rows' independence of the batch.
#include "kernels_cpu_weights.h"

namespace mlxlm::tests {
namespace {

class Matmul : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Kinds, Matmul, testing::ValuesIn(all_kinds()), [](const auto& info) { return info.param.name(); });

TEST_P(Matmul, EveryShapeAgreesWithDoubles) {
  const auto& kind = GetParam();
  // Rows that do and do not fill a panel of 16; K of one group, of an odd number of groups, of many.
  const struct {
    int n, groups;
  } shapes[] = {{1, 1}, {16, 1}, {17, 3}, {50, 2}, {35, 5}};
  for (const auto& s : shapes) {
    const int k = s.groups * kind.group;
    const auto w = make(kind, {s.n, k}, 10 + s.n);
    const auto packed = pack(kind, w);
    EXPECT_GT(cpu::packed_bytes(*packed), 0);
    for (const int m : {1, 2, 3, 5, 8, 13, 64, 65, 130}) {
      if (m > 13 && s.n > 17 && s.groups == 2) continue;
      for (const auto dtype : float_dtypes()) {
        const auto x = random(100 + m, {m, k}, dtype);
        const auto y = cpu::matmul(x, packed);
        EXPECT_EQ(y.dtype(), dtype);
        EXPECT_EQ(y.shape(), (mx::Shape{m, s.n}));
        ASSERT_TRUE(agrees(y, multiply(values_of(x), w, kind, dtype))) << m << " x " << s.n << " x " << k << " " << name_of(dtype);
      }
    }
  }
}

/** The bound that users see, apart from the derived one: 1e-5 of the row's spread, and what the dtype rounds. */
TEST_P(Matmul, ExactForF32ActivationsOfARow) {
  const auto& kind = GetParam();
  const auto w = make(kind, {70, 3 * kind.group}, 77);
  const auto x = random(78, {4, 3 * kind.group});
  const auto got = values_of(cpu::matmul(x, pack(kind, w)));
  const auto wanted = multiply(values_of(x), w, kind, mx::float32).y;
  for (int m = 0; m < 4; ++m) {
    const auto [low, high] = std::minmax_element(wanted.begin() + m * 70, wanted.begin() + (m + 1) * 70);
    for (int n = 0; n < 70; ++n) EXPECT_NEAR(got[m * 70 + n], wanted[m * 70 + n], 1e-5 * (*high - *low)) << m << " " << n;
  }
}

TEST_P(Matmul, ConcatenatedPartsAreTheParts) {
  const auto& kind = GetParam();
  const int k = 2 * kind.group;
  Weights all;
  std::vector<Weights> parts;
  const auto x = random(3, {5, k}, mx::float16);
  std::vector<mx::array> separate;
  for (const int n : {18, 7, 1, 16, 9}) {  // the boundaries fall inside panels
    const auto dense = random(20 + n, {n, k}, mx::float32, 0.1f);
    add_part(all, kind, dense);
    Weights one;
    add_part(one, kind, dense);
    separate.push_back(cpu::matmul(x, pack(kind, one)));
  }
  const auto joined = cpu::matmul(x, pack(kind, all));
  EXPECT_TRUE(agrees(joined, multiply(values_of(x), all, kind, mx::float16)));
  EXPECT_EQ(bits_of(joined), bits_of(mx::concatenate(separate, -1)));
}

TEST_P(Matmul, Bias) {
  const auto& kind = GetParam();
  const int k = kind.group, n = 19;
  const auto w = make(kind, {n, k}, 5);
  const auto packed = pack(kind, w);
  for (const auto dtype : float_dtypes()) {
    const auto x = random(6, {3, k}, dtype);
    const auto wide = random(7, {2 * n}, dtype);
    for (const auto& bias : {part(wide, 0, n), mx::slice(wide, {0}, {2 * n}, {2})}) {
      EXPECT_TRUE(agrees(cpu::matmul(x, packed, bias), multiply(values_of(x), w, kind, dtype, 0, values_of(bias))));
    }
  }
}

/** Any strides: the result is bit for bit that of a copy. */
TEST_P(Matmul, StridedActivations) {
  const auto& kind = GetParam();
  const int k = 2 * kind.group, m = 6;
  const auto packed = pack(kind, make(kind, {21, k}, 8));
  for (const auto dtype : float_dtypes()) {
    const auto wide = random(9, {m, 2 * k + 5}, dtype), tall = random(10, {k, m}, dtype), cube = random(11, {2, 3, 4, k}, dtype);
    const mx::array views[] = {
        mx::transpose(tall),
        mx::slice(wide, {0, 5}, {m, 5 + k}),
        mx::slice(wide, {0, 1}, {m, 1 + 2 * k}, {1, 2}),
        mx::slice(wide, {1, 0}, {m, k}, {2, 1}),
        mx::slice(wide, {m - 1, 0}, {-m - 1, k}, {-1, 1}),
        mx::broadcast_to(mx::slice(wide, {2, 3}, {3, 3 + k}), {4, k}),
        mx::transpose(cube, {2, 0, 1, 3}),
        mx::slice(cube, {0, 1, 0, 0}, {2, 2, 4, k}),
        mx::reshape(mx::slice(wide, {0, 0}, {1, k}), {k}),
    };
    for (std::size_t i = 0; i < std::size(views); ++i) {
      const auto got = cpu::matmul(views[i], packed);
      EXPECT_EQ(got.shape(-1), 21);
      EXPECT_EQ(bits_of(got), bits_of(cpu::matmul(made(mx::copy(views[i])), packed))) << "view " << i << " " << name_of(dtype);
    }
  }
}

TEST_P(Matmul, NoRows) {
  const auto& kind = GetParam();
  const auto packed = pack(kind, make(kind, {5, kind.group}));
  const auto y = made(cpu::matmul(mx::zeros({2, 0, kind.group}, mx::float16), packed));
  EXPECT_EQ(y.shape(), (mx::Shape{2, 0, 5}));
}

TEST_P(Matmul, ZerosGiveZeros) {
  const auto& kind = GetParam();
  const auto packed = pack(kind, make(kind, {33, 2 * kind.group}));
  for (const auto dtype : float_dtypes()) {
    for (const double value : values_of(cpu::matmul(mx::zeros({3, 2 * kind.group}, dtype), packed))) ASSERT_EQ(value, 0.0);
  }
  Weights zero;
  add_part(zero, kind, mx::zeros({33, kind.group}));
  const auto x = random(1, {3, kind.group});
  for (const double value : values_of(cpu::matmul(x, pack(kind, zero)))) ASSERT_EQ(value, 0.0);
}

TEST_P(Matmul, LargeAndSmallActivations) {
  const auto& kind = GetParam();
  const int k = 3 * kind.group;
  const auto w = make(kind, {20, k}, 31);
  const auto packed = pack(kind, w);
  for (const auto dtype : float_dtypes()) {
    for (const float size : {1e4f, 1e-3f, 1e-6f}) {
      auto values = noise(32, 2 * k, size);
      values[3] = 8 * size > 6e4f ? 6e4f : 4 * size;  // one that stands out in its group
      values[k + 1] = 0.f;
      const auto x = from(values, {2, k}, dtype);
      EXPECT_TRUE(agrees(cpu::matmul(x, packed), multiply(values_of(x), w, kind, dtype))) << size << " " << name_of(dtype);
    }
  }
  for (const float size : {1e30f, 1e-20f, 1e-33f}) {  // beyond float16
    const auto x = from(noise(33, k, size), {1, k}, mx::bfloat16);
    auto r = multiply(values_of(x), w, kind, mx::bfloat16);
    for (auto& allowed : r.allowed) allowed += 1e-3 * size;  // steps between digits are denormal at the end
    EXPECT_TRUE(agrees(cpu::matmul(x, packed), r)) << size;
  }
}

TEST_P(Matmul, DenormalActivationsStayTiny) {
  const auto& kind = GetParam();
  const auto packed = pack(kind, make(kind, {20, kind.group}, 34));
  for (const auto dtype : {mx::float32, mx::bfloat16}) {
    for (const float size : {1e-35f, 1e-37f, 1e-38f, 1e-39f, 1e-40f}) {
      auto values = noise(35, kind.group, size);
      values[0] = values[5] = 0.f;
      for (const double y : values_of(cpu::matmul(from(values, {1, kind.group}, dtype), packed))) {
        ASSERT_LE(std::abs(y), 20 * size) << name_of(dtype);
      }
    }
  }
}

/** An infinite or undefined activation shows in its own row, in no other. */
TEST_P(Matmul, InfAndNanReachTheirRow) {
  const auto& kind = GetParam();
  const int k = 3 * kind.group, n = 18, m = 9;
  const auto packed = pack(kind, make(kind, {n, k}, 36));
  for (const auto dtype : float_dtypes()) {
    const auto good = noise(37, int64_t(m) * k);
    const auto clean = cpu::matmul(from(good, {m, k}, dtype), packed);
    for (const float bad : {INFINITY, -INFINITY, NAN}) {
      auto values = good;
      values[4 * k + kind.group + 3] = bad;
      const auto y = cpu::matmul(from(values, {m, k}, dtype), packed);
      for (const double value : values_of(part(y, 4, 5))) ASSERT_FALSE(std::isfinite(value)) << bad << " " << name_of(dtype);
      EXPECT_EQ(bits_of(part(y, 0, 4)), bits_of(part(clean, 0, 4)));
      EXPECT_EQ(bits_of(part(y, 5, m)), bits_of(part(clean, 5, m)));
    }
  }
}

/** Products beyond the range of the result's dtype become infinite with the right sign. */
TEST_P(Matmul, OverflowOfF16) {
  const auto& kind = GetParam();
  Weights w;
  std::vector<float> values(2 * kind.group, 1.f);
  for (int i = kind.group; i < 2 * kind.group; ++i) values[i] = -1.f;
  add_part(w, kind, from(values, {2, kind.group}));
  const auto x = mx::full({1, kind.group}, 3e4f, mx::float16);
  const auto y = values_of(cpu::matmul(x, pack(kind, w)));
  EXPECT_EQ(y[0], INFINITY);
  EXPECT_EQ(y[1], -INFINITY);
}

/** A row alone, in any batch and at any place of it, gives the same bits. */
TEST_P(Matmul, RowsDoNotDependOnTheBatch) {
  const auto& kind = GetParam();
  const int k = 5 * kind.group, n = 37, m = 130;
  const auto packed = pack(kind, make(kind, {n, k}, 40));
  for (const auto dtype : float_dtypes()) {
    const auto x = random(41, {m, k}, dtype);
    const auto whole = made(cpu::matmul(x, packed));
    for (const int size : {1, 2, 3, 5, 7, 8, 13, 64, 65}) {
      for (int at = size == 1 ? 0 : 1; at + size <= m; at += std::max(size, 11)) {
        ASSERT_EQ(bits_of(cpu::matmul(part(x, at, at + size), packed)), bits_of(part(whole, at, at + size)))
            << size << " rows at " << at << " " << name_of(dtype);
      }
    }
  }
}

// ---- experts -------------------------------------------------------------------------------------------------------

TEST_P(Matmul, ExpertsAgreeWithDoubles) {
  const auto& kind = GetParam();
  const int experts = 5, n = 21, k = 2 * kind.group;
  const auto w = make(kind, {experts, n, k}, 50);
  const auto packed = pack(kind, w);
  for (const auto dtype : float_dtypes()) {
    for (const int tokens : {1, 7, 40}) {
      for (const int per_token : {1, 3}) {
        const auto choices = expert_choices(tokens, per_token, experts);
        const auto indices = mx::array(choices.data(), {tokens, per_token}, mx::int32);
        for (const bool own : {false, true}) {
          const auto x = own ? random(51, {tokens, per_token, k}, dtype) : random(52, {tokens, k}, dtype);
          const auto y = made(cpu::gather_matmul(x, packed, own ? mx::astype(indices, mx::uint32) : indices, own));
          EXPECT_EQ(y.shape(), (mx::Shape{tokens, per_token, n}));
          EXPECT_EQ(y.dtype(), dtype);
          const auto xs = values_of(x);
          Reference wanted;
          for (int i = 0; i < tokens * per_token; ++i) {
            const auto at = xs.begin() + int64_t(own ? i : i / per_token) * k;
            const auto one = multiply({at, at + k}, w, kind, dtype, choices[i]);
            wanted.y.insert(wanted.y.end(), one.y.begin(), one.y.end());
            wanted.allowed.insert(wanted.allowed.end(), one.allowed.begin(), one.allowed.end());
          }
          ASSERT_TRUE(agrees(y, wanted)) << tokens << " tokens, " << per_token << " each, own " << own << " " << name_of(dtype);
        }
      }
    }
  }
}

TEST_P(Matmul, ExpertsOfSeveralParts) {
  const auto& kind = GetParam();
  const int experts = 3, k = 2 * kind.group;
  Weights w;
  add_part(w, kind, random(53, {experts, 9, k}, mx::float32, 0.1f));
  add_part(w, kind, random(54, {experts, 20, k}, mx::float32, 0.1f));
  const auto x = random(55, {4, k}, mx::float16);
  const int choices[] = {2, 0, 1, 1};
  const auto y = cpu::gather_matmul(x, pack(kind, w), mx::array(choices, {4, 1}, mx::int32), false);
  for (int t = 0; t < 4; ++t) {
    EXPECT_TRUE(agrees(part(y, t, t + 1), multiply(values_of(part(x, t, t + 1)), w, kind, mx::float16, choices[t])));
  }
}

/** A token's experts do not depend on the other tokens; and an expert is the matmul of its own matrix. */
TEST_P(Matmul, ExpertRowsDoNotDependOnTheBatch) {
  const auto& kind = GetParam();
  const int experts = 4, n = 19, k = 3 * kind.group, tokens = 33, per_token = 2;
  const auto dense = random(56, {experts, n, k}, mx::float32, 0.1f);
  Weights stacked;
  add_part(stacked, kind, dense);
  const auto packed = pack(kind, stacked);
  const auto choices = expert_choices(tokens, per_token, experts);
  const auto indices = mx::array(choices.data(), {tokens, per_token}, mx::int32);
  for (const auto dtype : float_dtypes()) {
    const auto x = random(57, {tokens, k}, dtype);
    const auto whole = made(cpu::gather_matmul(x, packed, indices, false));
    for (const int size : {1, 2, 9}) {
      for (int at = 0; at + size <= tokens; at += 8) {
        ASSERT_EQ(bits_of(cpu::gather_matmul(part(x, at, at + size), packed, part(indices, at, at + size), false)),
                  bits_of(part(whole, at, at + size)));
      }
    }
    Weights single;
    add_part(single, kind, mx::reshape(part(dense, choices[0], choices[0] + 1), {n, k}));
    const auto alone = cpu::matmul(part(x, 0, 1), pack(kind, single));
    EXPECT_EQ(bits_of(alone), bits_of(mx::slice(whole, {0, 0, 0}, {1, 1, n})));
  }
}

TEST(GatherMatmul, StridedIndicesAndActivations) {
  const Kind kind{"affine", 4, 32, mx::float16};
  const auto packed = pack(kind, make(kind, {4, 10, 64}));
  const int choices[] = {3, 1, 0, 2, 2, 1};
  const auto indices = mx::transpose(mx::array(choices, {2, 3}, mx::int32));  // [3, 2]
  const auto x = mx::transpose(random(1, {64, 3}));
  EXPECT_EQ(bits_of(cpu::gather_matmul(x, packed, indices, false)), bits_of(cpu::gather_matmul(made(x), packed, made(indices), false)));
}

TEST(GatherMatmul, IndicesOutOfRangeDoNotReadOutside) {
  const Kind kind{"affine", 4, 32, mx::float16};
  const auto packed = pack(kind, make(kind, {4, 10, 64}));
  const int choices[] = {-1, 4, 1 << 30, 0};
  const auto y = made(cpu::gather_matmul(random(1, {4, 64}), packed, mx::array(choices, {4, 1}, mx::int32), false));
  for (const double value : values_of(y)) EXPECT_TRUE(std::isfinite(value));
}

// ---- embeddings ----------------------------------------------------------------------------------------------------

TEST_P(Matmul, RowsOfATable) {
  const auto& kind = GetParam();
  const auto w = make(kind, {35, 3 * kind.group}, 60);
  const auto packed = pack(kind, w);
  const int tokens[] = {0, 34, 17, 16, 15, 0};
  std::vector<double> wanted;
  for (const int t : tokens) wanted.insert(wanted.end(), w.values.begin() + t * w.k, w.values.begin() + (t + 1) * w.k);
  for (const auto dtype : float_dtypes()) {
    const auto rows = cpu::take_rows(packed, mx::array(tokens, {2, 3}, mx::int32), dtype);
    EXPECT_EQ(rows.shape(), (mx::Shape{2, 3, w.k}));
    EXPECT_EQ(rows.dtype(), dtype);
    EXPECT_TRUE(near(rows, wanted, 1e-7)) << name_of(dtype);
    const auto strided = mx::transpose(mx::array(tokens, {2, 3}, mx::uint32));
    EXPECT_EQ(bits_of(cpu::take_rows(packed, strided, dtype)), bits_of(mx::transpose(rows, {1, 0, 2})));
  }
  const int outside[] = {-5, 35, 1 << 30};
  for (const double value : values_of(cpu::take_rows(packed, mx::array(outside, {3}, mx::int32), mx::float32))) {
    EXPECT_TRUE(std::isfinite(value));
  }
}

}  // namespace
}  // namespace mlxlm::tests
