// Packing: layouts, widths, what is refused, conversion of dtypes; and results that do not depend on the number of threads.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "base/error.h"
#include "base/thread_pool.h"
#include "kernels_cpu_weights.h"

namespace mlxlm::tests {
namespace {

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

/** Every code with every scale has MLX's value, and reads alike as a table and as a product with a unit vector. */
TEST(PackFloat, EveryCodeAndScale) {
  const struct {
    const char* mode;
    int bits, group;
  } kinds[] = {{"mxfp4", 4, 32}, {"mxfp8", 8, 32}, {"nvfp4", 4, 16}};
  for (const auto& kind : kinds) {
    const int k = kind.bits == 8 ? 256 : 32, groups = k / kind.group, rows = 256;
    std::vector<uint8_t> bytes(rows * k * kind.bits / 8), scale_bytes(rows * groups);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      bytes[i] = static_cast<uint8_t>(kind.bits == 8 ? i : (2 * i % 16) | (2 * i + 1) % 16 << 4);
    }
    for (std::size_t i = 0; i < scale_bytes.size(); ++i) scale_bytes[i] = static_cast<uint8_t>(i / groups);
    std::vector<uint32_t> words(bytes.size() / 4);
    std::memcpy(words.data(), bytes.data(), bytes.size());
    const auto w = mx::array(words.data(), {rows, k * kind.bits / 32}, mx::uint32);
    const auto s = mx::array(scale_bytes.data(), {rows, groups}, mx::uint8);
    const auto wanted = values_of(mx::dequantize(w, s, std::nullopt, kind.group, kind.bits, kind.mode, std::nullopt, mx::float32));
    const auto packed = cpu::pack_float({w}, {s}, kind.mode, kind.bits, kind.group);
    const auto table = values_of(cpu::take_rows(packed, mx::arange(0, rows, mx::int32), mx::float32));
    const auto product = values_of(mx::transpose(cpu::matmul(mx::eye(k), packed)));
    for (int i = 0; i < rows * k; ++i) {
      const int row = i / k;
      if (kind.group == 16 ? row % 128 == 127 : row >= 254) continue;  // scales that are not numbers; products that overflow
      if (kind.bits == 8 && i % 128 == 127) continue;                  // codes that are not numbers
      ASSERT_EQ(table[i], wanted[i]) << kind.mode << " value " << i;
      if (kind.bits == 8 && row >= 246) continue;  // infinite beside other values of its row
      ASSERT_EQ(product[i], wanted[i]) << kind.mode << " value " << i;
    }
  }
}

/** Panels are no larger than the checkpoint's own tensors. */
TEST(Pack, TakesTheBytesOfTheCheckpoint) {
  for (const auto& kind : all_kinds()) {
    if (kind.mode == "dense") continue;
    const auto w = make(kind, {1024, 1024}, 3);
    int64_t stored = 0;
    for (const auto* arrays : {&w.weight, &w.scales, &w.biases}) {
      for (const auto& a : *arrays) stored += static_cast<int64_t>(a.nbytes());
    }
    EXPECT_LE(cpu::packed_bytes(*pack(kind, w)), stored * 1.001) << kind.name();
  }
}

/** The other precisions than the default, for every kind. */
TEST(Precision, ExactAndFast) {
  for (const auto& kind : all_kinds()) {
    const int k = 4 * kind.group, m = 27, n = 40;
    const auto w = make(kind, {n, k}, 80);
    const auto packed = pack(kind, w);
    const auto x = random(81, {m, k}, mx::bfloat16), wide = mx::astype(x, mx::float32);
    cpu::set_precision(cpu::Precision::exact);
    const auto exact = made(cpu::matmul(x, packed));
    cpu::set_precision(cpu::Precision::fast);
    const auto fast = made(cpu::matmul(x, packed));
    for (const int size : {1, 2, 5, 13}) {
      for (int at = 0; at + size <= m; at += 7) {
        ASSERT_EQ(bits_of(cpu::matmul(part(x, at, at + size), packed)), bits_of(part(fast, at, at + size))) << kind.name();
      }
    }
    cpu::set_precision(cpu::Precision::standard);
    EXPECT_EQ(bits_of(exact), bits_of(mx::astype(cpu::matmul(wide, packed), mx::bfloat16))) << kind.name();
    const auto y = values_of(fast);
    const auto wanted = multiply(values_of(x), w, kind, mx::float32).y;
    double error = 0, size = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      error += (y[i] - wanted[i]) * (y[i] - wanted[i]);
      size += wanted[i] * wanted[i];
    }
    EXPECT_LE(std::sqrt(error / size), 0.012) << kind.name();
  }
}

TEST(PackFloatBad, IsRefused) {
  const auto q = mx::quantize(random(1, {16, 128}), 32, 4, "mxfp4");
  const auto w = made(q[0]), s = made(q[1]);
  EXPECT_THROW(cpu::pack_float({}, {}, "mxfp4", 4, 32), Error);
  EXPECT_THROW(cpu::pack_float({w}, {s, s}, "mxfp4", 4, 32), Error);
  EXPECT_THROW(cpu::pack_float({w}, {s}, "mxfp5", 4, 32), Error);
  EXPECT_THROW(cpu::pack_float({w}, {s}, "mxfp4", 8, 32), Error);
  EXPECT_THROW(cpu::pack_float({w}, {s}, "mxfp4", 4, 64), Error);
  EXPECT_THROW(cpu::pack_float({w}, {s}, "nvfp4", 4, 16), Error);
  EXPECT_THROW(cpu::pack_float({w}, {s}, "mxfp8", 8, 32), Error);
  EXPECT_THROW(cpu::pack_float({w}, {part(s, 0, 15)}, "mxfp4", 4, 32), Error);
  EXPECT_THROW(cpu::pack_float({w}, {mx::astype(s, mx::float32)}, "mxfp4", 4, 32), Error);
  EXPECT_THROW(cpu::pack_float({mx::astype(w, mx::int32)}, {s}, "mxfp4", 4, 32), Error);
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
