// Matrices as MLX stores them, the values they stand for, and their products in doubles.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels_cpu_support.h"

namespace mlxlm::tests {

struct Kind {
  std::string mode;  // affine, mxfp4, mxfp8, nvfp4, dense
  int bits = 0, group = 0;
  mx::Dtype dtype = mx::float32;  // of the scales, or of dense weights
  std::string name() const {
    if (mode == "dense") return "dense_" + name_of(dtype);
    return mode + std::to_string(bits) + "_g" + std::to_string(group) + "_" + name_of(dtype);
  }
};

inline std::vector<Kind> all_kinds() {
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

inline void add_part(Weights& w, const Kind& kind, const mx::array& dense) {
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

inline Weights make(const Kind& kind, mx::Shape shape, uint32_t seed = 1) {
  Weights w;
  add_part(w, kind, random(seed, shape, mx::float32, 1.f / std::sqrt(float(shape.back()))));
  return w;
}

inline cpu::PackedMatrixPtr pack(const Kind& kind, const Weights& w) {
  if (kind.mode == "dense") return cpu::pack_dense(w.weight);
  if (kind.mode == "affine") return cpu::pack_affine(w.weight, w.scales, w.biases, kind.bits, kind.group);
  return cpu::pack_float(w.weight, w.scales, kind.mode, kind.bits, kind.group);
}

/** x [M, K] times matrix `m`, each value with the error that it may have: float32 sums, and for narrow activations two digits of
 *  7 bits below the peak of the group. */
struct Reference {
  std::vector<double> y, allowed;
};

inline Reference multiply(const std::vector<double>& x, const Weights& w, const Kind& kind, mx::Dtype dtype, int matrix = 0,
                          const std::vector<double>& bias = {}) {
  Reference r;
  const bool digits = dtype != mx::float32 && kind.mode != "dense" && kind.mode != "mxfp8";
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

inline testing::AssertionResult agrees(const mx::array& got, const Reference& r) {
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

inline std::vector<int> expert_choices(int tokens, int per_token, int experts) {
  std::vector<int> indices;
  for (int i = 0; i < tokens * per_token; ++i) indices.push_back(static_cast<int>(splitmix64(i) % experts));
  return indices;
}

}  // namespace mlxlm::tests
