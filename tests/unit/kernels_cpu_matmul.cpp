// Matrix products with packed weights against plain double arithmetic, and their rows' independence of the batch and the threads.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "base/error.h"
#include "base/thread_pool.h"
#include "kernels_cpu_support.h"

namespace mlxlm::tests {
namespace {

struct Kind {
  std::string mode;  // affine, mxfp4, mxfp8, nvfp4, dense
  int bits = 0, group = 0;
  mx::Dtype dtype = mx::float32;  // of the scales, or of dense weights
  std::string name() const {
    if (mode == "dense") return "dense_" + name_of(dtype);
    return mode + std::to_string(bits) + "_g" + std::to_string(group) + "_" + name_of(dtype);
  }
};

std::vector<Kind> all_kinds() {
  std::vector<Kind> kinds;
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    // Each width with each group; the dtype of the scales changes along.
    for (const int group : {32, 64, 128}) kinds.push_back({"affine", bits, group, float_dtypes()[(bits + group / 32) % 3]});
  }
  kinds.push_back({"mxfp4", 4, 32});
  kinds.push_back({"mxfp8", 8, 32});
  kinds.push_back({"nvfp4", 4, 16});
  for (const auto dtype : float_dtypes()) kinds.push_back({"dense", 0, 16, dtype});
  return kinds;
}

/** A matrix as MLX stores it, and the values it stands for. */
struct Weights {
  std::vector<mx::array> weight{}, scales{}, biases{};
  std::vector<double> values{};  // [X, N, K] of all parts, one below the other
  int matrices = 1, rows = 0, k = 0;
};

void add_part(Weights& w, const Kind& kind, const mx::array& dense) {
  w.k = dense.shape(-1);
  w.matrices = dense.ndim() == 3 ? dense.shape(0) : 1;
  auto stored = dense;
  if (kind.mode == "dense") {
    w.weight.push_back(made(mx::astype(dense, kind.dtype)));
    stored = w.weight.back();
  } else if (kind.mode == "affine") {
    const auto q = mx::quantize(dense, kind.group, kind.bits);
    w.weight.push_back(made(q[0]));
    w.scales.push_back(made(mx::astype(q[1], kind.dtype)));
    w.biases.push_back(made(mx::astype(q[2], kind.dtype)));
    stored =
        mx::dequantize(q[0], mx::astype(w.scales.back(), mx::float32), mx::astype(w.biases.back(), mx::float32), kind.group, kind.bits);
  } else {
    // MLX's nvfp4 takes even numbers of groups only: twice the rows, then the first half of them.
    const auto half = [&](const mx::array& a) {
      auto stop = a.shape();
      stop[stop.size() - 2] = dense.shape(-2);
      return made(mx::slice(a, mx::Shape(a.ndim(), 0), stop));
    };
    const auto q = mx::quantize(mx::concatenate({dense, dense}, -2), kind.group, kind.bits, kind.mode);
    w.weight.push_back(half(q[0]));
    w.scales.push_back(half(q[1]));
    stored = half(mx::dequantize(q[0], q[1], std::nullopt, kind.group, kind.bits, kind.mode, std::nullopt, mx::float32));
  }
  const auto part = values_of(stored);
  const int64_t old_size = int64_t(w.rows) * w.k, new_size = int64_t(dense.shape(-2)) * w.k;
  std::vector<double> joined;
  for (int m = 0; m < w.matrices; ++m) {
    joined.insert(joined.end(), w.values.begin() + m * old_size, w.values.begin() + (m + 1) * old_size);
    joined.insert(joined.end(), part.begin() + m * new_size, part.begin() + (m + 1) * new_size);
  }
  w.values = std::move(joined);
  w.rows += dense.shape(-2);
}

Weights make(const Kind& kind, mx::Shape shape, uint32_t seed = 1) {
  Weights w;
  add_part(w, kind, random(seed, shape, mx::float32, 1.f / std::sqrt(float(shape.back()))));
  return w;
}

cpu::PackedMatrixPtr pack(const Kind& kind, const Weights& w) {
  if (kind.mode == "dense") return cpu::pack_dense(w.weight);
  if (kind.mode == "affine") return cpu::pack_affine(w.weight, w.scales, w.biases, kind.bits, kind.group);
  return cpu::pack_float(w.weight, w.scales, kind.mode, kind.bits, kind.group);
}

/** x [M, K] times matrix `m`, each value with the error that it may have: float32 sums, and for narrow activations two digits of
 *  7 bits below the peak of the group. */
struct Reference {
  std::vector<double> y, allowed;
};

Reference multiply(const std::vector<double>& x, const Weights& w, const Kind& kind, mx::Dtype dtype, int matrix = 0,
                   const std::vector<double>& bias = {}) {
  Reference r;
  const bool digits = dtype != mx::float32 && kind.mode == "affine";
  for (std::size_t m = 0; m < x.size() / w.k; ++m) {
    const double* xm = x.data() + m * w.k;
    std::vector<double> step(w.k / kind.group + 1, 0);
    double norm = 0;
    for (int k = 0; k < w.k; ++k) {
      step[k / kind.group] = std::max(step[k / kind.group], std::abs(xm[k]) / 16256 * 0.502);
      norm += xm[k] * xm[k];
    }
    double largest = 0;
    for (int n = 0; n < w.rows; ++n) {
      const double* wn = w.values.data() + (int64_t(matrix) * w.rows + n) * w.k;
      double total = 0, error = 0, norm_w = 0;
      for (int k = 0; k < w.k; ++k) {
        total += xm[k] * wn[k];
        norm_w += wn[k] * wn[k];
        if (digits) error += step[k / kind.group] * std::abs(wn[k]);
      }
      r.y.push_back(total + (bias.empty() ? 0 : bias[n]));
      r.allowed.push_back(error);
      largest = std::max(largest, std::sqrt(norm * norm_w));
    }
    for (int n = 0; n < w.rows; ++n) r.allowed[m * w.rows + n] += 2e-6 * largest;
  }
  return r;
}

testing::AssertionResult agrees(const mx::array& got, const Reference& r) {
  const auto values = values_of(got);
  if (values.size() != r.y.size()) return testing::AssertionFailure() << "got " << values.size() << " values, wanted " << r.y.size();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double allowed = r.allowed[i] + std::abs(r.y[i]) * rounding(got.dtype()) + smallest(got.dtype());
    if (!(std::abs(values[i] - r.y[i]) <= allowed)) {
      return testing::AssertionFailure() << "value " << i << ": got " << values[i] << ", wanted " << r.y[i] << " +- " << allowed;
    }
  }
  return testing::AssertionSuccess();
}

class Matmul : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Kinds, Matmul, testing::ValuesIn(all_kinds()), [](const auto& info) { return info.param.name(); });

TEST_P(Matmul, EveryShapeAgreesWithDoubles) {
  const auto& kind = GetParam();
  // Rows that do and do not fill a panel of 16; K of one group, of an odd number of groups, of many.
  const struct { int n, groups; } shapes[] = {{1, 1}, {16, 1}, {17, 3}, {50, 2}, {35, 5}};
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
  if (kind.mode != "dense" && kind.mode != "affine") return;
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

std::vector<int> expert_choices(int tokens, int per_token, int experts) {
  std::vector<int> indices;
  for (int i = 0; i < tokens * per_token; ++i) indices.push_back(static_cast<int>(splitmix64(i) % experts));
  return indices;
}

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

/** The layout by formula, without MLX's own functions: codes are a little-endian stream of bits. */
TEST(PackAffine, CodesAreAStreamOfBits) {
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    const int rows = 18, k = 64, group = 32;
    std::vector<uint8_t> bytes(rows * k * bits / 8);
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(splitmix64(i + bits));
    std::vector<uint32_t> words(bytes.size() / 4);
    std::memcpy(words.data(), bytes.data(), bytes.size());
    const auto scales = random(bits, {rows, k / group}), biases = random(bits + 10, {rows, k / group});
    const auto packed = cpu::pack_affine({mx::array(words.data(), {rows, k * bits / 32}, mx::uint32)}, {scales}, {biases}, bits, group);
    const auto got = values_of(cpu::take_rows(packed, mx::arange(0, rows, mx::int32), mx::float32));
    const auto s = values_of(scales), b = values_of(biases);
    for (int i = 0; i < rows * k; ++i) {
      const int row_bits = k * bits, at = i / k * row_bits + i % k * bits;
      int code = 0;
      for (int j = 0; j < bits; ++j) code |= (bytes[(at + j) / 8] >> ((at + j) % 8) & 1) << j;
      const double wanted = s[i / group] * code + b[i / group];
      ASSERT_NEAR(got[i], wanted, 1e-6 * (std::abs(s[i / group]) * code + std::abs(b[i / group]))) << bits << " bits, value " << i;
    }
  }
}

TEST(PackAffine, PartsWithScalesOfOtherDtypes) {
  const Kind wide{"affine", 4, 32, mx::float32}, narrow{"affine", 4, 32, mx::bfloat16};
  Weights w;
  add_part(w, wide, random(1, {5, 64}));
  add_part(w, narrow, random(2, {14, 64}));
  const auto x = random(3, {2, 64});
  EXPECT_TRUE(agrees(cpu::matmul(x, pack(wide, w)), multiply(values_of(x), w, wide, mx::float32)));
}

TEST(PackDense, AnyWidthAndMixedDtypes) {
  for (const int k : {1, 7, 15, 16, 17, 33, 100}) {
    const Kind kind{"dense", 0, k, mx::float16};
    Weights w;
    add_part(w, kind, random(1, {9, k}));
    add_part(w, {"dense", 0, k, mx::float32}, random(2, {4, k}));
    const auto x = random(3, {6, k}, mx::bfloat16);
    EXPECT_TRUE(agrees(cpu::matmul(x, pack(kind, w)), multiply(values_of(x), w, kind, mx::bfloat16))) << k;
  }
}

TEST(PackDense, RowsOfAnyWidthDoNotDependOnTheBatch) {
  for (const int k : {1, 7, 15, 17, 33, 100}) {
    for (const auto dtype : float_dtypes()) {
      const auto packed = cpu::pack_dense({random(4, {38, k}, dtype)});
      const auto x = random(5, {66, k}, dtype);
      const auto whole = made(cpu::matmul(x, packed));
      for (const int size : {1, 2, 3, 7}) {
        for (int at = 0; at + size <= 66; at += 9) {
          ASSERT_EQ(bits_of(cpu::matmul(part(x, at, at + size), packed)), bits_of(part(whole, at, at + size)))
              << k << " " << size << " at " << at;
        }
      }
    }
  }
}

TEST(PackDense, StridedWeights) {
  const auto tall = random(4, {32, 18}), x = random(5, {3, 32});
  EXPECT_EQ(bits_of(cpu::matmul(x, cpu::pack_dense({mx::transpose(tall)}))),
            bits_of(cpu::matmul(x, cpu::pack_dense({made(mx::transpose(tall))}))));
}

/** A value that is not finite in one row of the weights shows in its column only. */
TEST(PackDense, BadWeightStaysInItsColumn) {
  auto values = noise(1, 20 * 32);
  const auto x = random(2, {5, 32});
  const auto clean = made(cpu::matmul(x, cpu::pack_dense({from(values, {20, 32})})));
  values[7 * 32 + 3] = NAN;
  const auto y = values_of(cpu::matmul(x, cpu::pack_dense({from(values, {20, 32})}))), wanted = values_of(clean);
  for (int i = 0; i < 100; ++i) {
    if (i % 20 == 7)
      EXPECT_TRUE(std::isnan(y[i]));
    else
      EXPECT_EQ(y[i], wanted[i]);
  }
}

TEST(PackBad, IsRefused) {
  const auto q = mx::quantize(random(1, {16, 128}), 32, 4);
  const auto w = made(q[0]), s = made(q[1]), b = made(q[2]);
  EXPECT_THROW(cpu::pack_affine({}, {}, {}, 4, 32), Error);
  EXPECT_THROW(cpu::pack_affine({w}, {s, s}, {b}, 4, 32), Error);
  EXPECT_THROW(cpu::pack_affine({w}, {s}, {}, 4, 32), Error);
  for (const int bits : {-1, 0, 1, 7, 9, 32}) EXPECT_THROW(cpu::pack_affine({w}, {s}, {b}, bits, 32), Error) << bits;
  for (const int group : {-32, 0, 1, 24, 64}) EXPECT_THROW(cpu::pack_affine({w}, {s}, {b}, 4, group), Error) << group;
  EXPECT_THROW(cpu::pack_affine({mx::astype(w, mx::int32)}, {s}, {b}, 4, 32), Error);
  EXPECT_THROW(cpu::pack_affine({w}, {mx::astype(s, mx::int32)}, {b}, 4, 32), Error);
  EXPECT_THROW(cpu::pack_affine({w}, {part(s, 0, 15)}, {b}, 4, 32), Error);
  EXPECT_THROW(cpu::pack_affine({w}, {s}, {part(b, 0, 3)}, 4, 32), Error);
  EXPECT_THROW(cpu::pack_affine({w, part(w, 0, 2)}, {s, s}, {b, b}, 4, 32), Error);
  const auto narrow = mx::quantize(random(1, {16, 64}), 32, 4);
  EXPECT_THROW(cpu::pack_affine({w, narrow[0]}, {s, narrow[1]}, {b, narrow[2]}, 4, 32), Error);
  EXPECT_THROW(cpu::pack_dense({}), Error);
  EXPECT_THROW(cpu::pack_dense({random(1, {4})}), Error);
  EXPECT_THROW(cpu::pack_dense({random(1, {4, 8}), random(1, {4, 9})}), Error);
  EXPECT_THROW(cpu::pack_dense({mx::zeros({4, 8}, mx::int32)}), Error);
}

TEST(MatmulBad, IsRefusedWhereItIsBuilt) {
  const auto w = cpu::pack_dense({random(1, {6, 32})});
  const auto experts = cpu::pack_dense({random(1, {3, 6, 32})});
  const int chosen[] = {0, 1};
  const auto indices = mx::array(chosen, {2, 1}, mx::int32);
  EXPECT_THROW(cpu::matmul(random(1, {2, 31}), w), Error);
  EXPECT_THROW(cpu::matmul(mx::array(1.f), w), Error);
  EXPECT_THROW(cpu::matmul(mx::zeros({2, 32}, mx::int32), w), Error);
  EXPECT_THROW(cpu::matmul(random(1, {2, 32}), w, random(1, {7})), Error);
  EXPECT_THROW(cpu::matmul(random(1, {2, 32}), w, random(1, {5})), Error);
  EXPECT_THROW(cpu::matmul(random(1, {2, 32}), w, mx::zeros({6}, mx::int32)), Error);
  EXPECT_THROW(cpu::gather_matmul(random(1, {2, 31}), experts, indices, false), Error);
  EXPECT_THROW(cpu::gather_matmul(random(1, {3, 32}), experts, indices, false), Error);
  EXPECT_THROW(cpu::gather_matmul(random(1, {2, 2, 32}), experts, indices, true), Error);
  EXPECT_THROW(cpu::gather_matmul(mx::zeros({2, 32}, mx::int32), experts, indices, false), Error);
  EXPECT_THROW(cpu::take_rows(w, indices, mx::int32), Error);
}

// ---- conversion ----------------------------------------------------------------------------------------------------

/** Every float16 and bfloat16 reads as MLX reads it, and floats round to them as MLX rounds. */
TEST(Conversion, EveryNarrowValueReadsExactly) {
  std::vector<uint16_t> patterns(65536);
  std::iota(patterns.begin(), patterns.end(), uint16_t{0});
  const auto bits = mx::array(patterns.data(), {256, 256}, mx::uint16);
  for (const auto dtype : {mx::float16, mx::bfloat16}) {
    const auto table = made(mx::view(bits, dtype));
    const auto got = values_of(cpu::take_rows(cpu::pack_dense({table}), mx::arange(0, 256, mx::int32), mx::float32));
    const auto wanted = values_of(table);
    for (int i = 0; i < 65536; ++i) {
      if (std::isnan(wanted[i]))
        ASSERT_TRUE(std::isnan(got[i])) << i;
      else
        ASSERT_EQ(got[i], wanted[i]) << i;
    }
  }
}

TEST(Conversion, RoundsToNearestEven) {
  std::vector<float> values{0.f,           -0.f,          INFINITY,      -INFINITY, 65504.f, 65519.996f,    65520.f,
                            -65520.f,      65536.f,       1e30f,         3.4e38f,   1e-8f,   2.9802322e-8f, 2.9802326e-8f,
                            6.1035156e-5f, 6.0975552e-5f, 6.1005354e-5f, 1e-40f,    1e-45f};
  for (uint64_t i = 0; values.size() < 4096; ++i) {
    // Ties between neighbours, and values anywhere.
    const uint32_t random_bits = static_cast<uint32_t>(splitmix64(i));
    const uint32_t pattern = i % 3 == 0   ? random_bits
                             : i % 3 == 1 ? (random_bits & 0xffff0000u) | 0x8000u
                                          : (random_bits & 0xffffe000u) | 0x1000u;
    float f;
    std::memcpy(&f, &pattern, 4);
    if (!std::isnan(f)) values.push_back(f);
  }
  const auto table = from(values, {64, 64});
  const auto packed = cpu::pack_dense({table});
  for (const auto dtype : {mx::float16, mx::bfloat16}) {
    const auto got = values_of(cpu::take_rows(packed, mx::arange(0, 64, mx::int32), dtype)), wanted = values_of(mx::astype(table, dtype));
    for (std::size_t i = 0; i < values.size(); ++i) ASSERT_EQ(got[i], wanted[i]) << values[i] << " to " << name_of(dtype);
  }
}

// ---- threads -------------------------------------------------------------------------------------------------------

constexpr const char* threads_variable = "MLXLM_TEST_THREADS";

/** A checksum of results of every kind, for any number of threads. */
uint32_t digest() {
  uint32_t crc = 0;
  const auto add = [&](const mx::array& a) {
    const auto bytes = bits_of(a).bytes;
    crc = crc32(bytes.data(), bytes.size(), crc);
  };
  for (const auto& kind : all_kinds()) {
    const int k = 4 * kind.group;
    const auto packed = pack(kind, make(kind, {100, k}, 70));
    const auto experts = pack(kind, make(kind, {3, 40, k}, 71));
    for (const auto dtype : float_dtypes()) {
      for (const int m : {1, 7, 130}) add(cpu::matmul(random(72, {m, k}, dtype), packed));
      const auto choices = expert_choices(9, 2, 3);
      add(cpu::gather_matmul(random(73, {9, k}, dtype), experts, mx::array(choices.data(), {9, 2}, mx::int32), false));
    }
  }
  const auto q = random(74, {2, 6, 9, 64}), kv = random(75, {2, 2, 120, 64});
  add(cpu::attention(q, kv, kv, {.scale = 0.125f, .window = 50}));
  add(cpu::rms_norm(random(76, {500, 100}), std::nullopt, 1e-5f, false));
  add(cpu::rope_heads(random(77, {1, 90, 8, 64}), std::make_shared<const std::vector<float>>(32, 0.1f), 3, false, 1.f));
  add(cpu::glu(random(78, {300, 128}), cpu::GluAct::silu));
  return crc;
}

/** The child's side of the test below; alone it does nothing. */
TEST(Threads, Child) {
  const char* threads = std::getenv(threads_variable);
  if (threads == nullptr) return;
  set_compute_threads(std::atoi(threads));
  ASSERT_EQ(compute_pool().threads(), std::atoi(threads));
  std::printf("digest %08x\n", digest());
}

std::string digest_with_threads(int threads) {
  char self[4096] = {};
  if (readlink("/proc/self/exe", self, sizeof self - 1) <= 0) return "";
  const std::string command =
      std::string(threads_variable) + "=" + std::to_string(threads) + " '" + self + "' --gtest_filter=Threads.Child 2>&1";
  std::FILE* pipe = popen(command.c_str(), "r");
  std::string text;
  char line[256];
  while (pipe != nullptr && std::fgets(line, sizeof line, pipe) != nullptr) text += line;
  if (pipe != nullptr) pclose(pipe);
  const auto at = text.find("digest ");
  return at == std::string::npos ? "" : text.substr(at, 15);
}

TEST(Threads, ResultsAreTheSameBitsWithAnyNumber) {
  char self[4096];
  if (readlink("/proc/self/exe", self, sizeof self) <= 0) GTEST_SKIP() << "no /proc";
  const auto one = digest_with_threads(1);
  ASSERT_EQ(one.size(), 15u);
  for (const int threads : {2, 3, 7}) EXPECT_EQ(digest_with_threads(threads), one) << threads;
}

}  // namespace
}  // namespace mlxlm::tests
