// What the tests of the CPU kernels share: numbers from a seed, plain double arithmetic, bounds of a dtype.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <mlx/array.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "kernels/cpu/kernels.h"
#include "tiny_weights.h"

namespace mlxlm::tests {

namespace mx = mlx::core;
namespace cpu = kernels::cpu;

inline const std::vector<mx::Dtype>& float_dtypes() {
  static const std::vector<mx::Dtype> all{mx::float32, mx::float16, mx::bfloat16};
  return all;
}

inline std::string name_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? "f32" : dtype == mx::float16 ? "f16" : dtype == mx::bfloat16 ? "bf16" : "other";
}

inline std::vector<float> noise(uint32_t seed, int64_t count, float spread = 1.f) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = tiny_noise(0x5eed, seed, i) * spread;
  return values;
}

inline mx::array made(mx::array a) {
  a = mx::contiguous(a);
  mx::eval(a);
  return a;
}

inline mx::array from(const std::vector<float>& values, mx::Shape shape, mx::Dtype dtype = mx::float32) {
  return made(mx::astype(mx::array(values.data(), std::move(shape), mx::float32), dtype));
}

inline mx::array random(uint32_t seed, mx::Shape shape, mx::Dtype dtype = mx::float32, float spread = 1.f) {
  int64_t count = 1;
  for (const int dim : shape) count *= dim;
  return from(noise(seed, count, spread), std::move(shape), dtype);
}

/** All values, row major, exactly. */
inline std::vector<double> values_of(const mx::array& a) {
  const auto f = made(mx::astype(a, mx::float32));
  return {f.data<float>(), f.data<float>() + f.size()};
}

/** The bytes of an array, row major; printed as a checksum. */
struct Bits {
  std::string bytes;
  bool operator==(const Bits&) const = default;
  friend void PrintTo(const Bits& b, std::ostream* out) {
    *out << b.bytes.size() << " bytes, crc32 " << crc32(b.bytes.data(), b.bytes.size());
  }
};

inline Bits bits_of(const mx::array& a) {
  const auto c = made(a);
  return {{c.data<char>(), c.nbytes()}};
}

/** Rows [from, to) of the first axis. */
inline mx::array part(const mx::array& a, int from, int to) {
  mx::Shape start(a.ndim(), 0), stop = a.shape();
  start[0] = from;
  stop[0] = to;
  return mx::slice(a, start, stop);
}

/** How far a value may lie from its nearest in `dtype`, as a part of it. */
inline double rounding(mx::Dtype dtype) {
  return dtype == mx::float16 ? 0x1.02p-11 : dtype == mx::bfloat16 ? 0x1.02p-8 : 0x1p-23;
}

/** Half the step between the smallest values of `dtype`. */
inline double smallest(mx::Dtype dtype) {
  return dtype == mx::float16 ? 0x1p-25 : 0x1p-126;
}

/** Each value within `relative` of its own size and `absolute`, beside what rounding to got's dtype costs. Names the worst. */
inline testing::AssertionResult near(const mx::array& got, const std::vector<double>& wanted, double absolute, double relative = 0) {
  const auto values = values_of(got);
  if (values.size() != wanted.size()) {
    return testing::AssertionFailure() << "got " << values.size() << " values, wanted " << wanted.size();
  }
  const double unit = rounding(got.dtype()) + relative, floor = smallest(got.dtype()) + absolute;
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double allowed = std::abs(wanted[i]) * unit + floor;
    double excess = std::abs(values[i] - wanted[i]) / allowed;
    if (std::isnan(values[i]) != std::isnan(wanted[i])) excess = std::numeric_limits<double>::infinity();
    if (values[i] == wanted[i] || (std::isnan(values[i]) && std::isnan(wanted[i]))) excess = 0;
    if (excess > worst) {
      worst = excess;
      at = i;
    }
  }
  if (worst <= 1) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "value " << at << ": got " << values[at] << ", wanted " << wanted[at] << ", " << worst
                                     << " times what is allowed";
}

}  // namespace mlxlm::tests
