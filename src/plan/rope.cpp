// Rotation frequencies. Reference: mlx_lm/models/rope_utils.py (its freqs are the inverse of these).
#include <algorithm>
#include <cmath>
#include <numbers>

#include "plan/plan.h"

namespace mlxlm::plan {
namespace {

using arch::Rope;

/** Wavelength of pair i divided by 2 pi. */
double period(const Rope& r, int i, double base) {
  return std::pow(base, 2.0 * i / r.dims);
}

double llama3_period(const Rope& r, double p) {
  const double wavelength = 2 * std::numbers::pi * p;
  const double low = double(r.original_max_positions) / r.low_freq_factor, high = double(r.original_max_positions) / r.high_freq_factor;
  if (wavelength > low) return p * r.factor;
  if (wavelength <= high || wavelength >= low) return p;
  const double smooth = (r.original_max_positions / wavelength - r.low_freq_factor) / (double(r.high_freq_factor) - r.low_freq_factor);
  return p / ((1 - smooth) / r.factor + smooth);
}

std::vector<double> yarn_periods(const Rope& r) {
  const auto correction_dim = [&](double rotations) {
    return r.dims * std::log(r.original_max_positions / (rotations * 2 * std::numbers::pi)) / (2 * std::log(double(r.base)));
  };
  const double low = std::max(std::floor(correction_dim(r.beta_fast)), 0.0);
  double high = std::min(std::ceil(correction_dim(r.beta_slow)), double(r.dims - 1));
  if (low == high) high += 0.001;
  std::vector<double> periods;
  for (int i = 0; i < r.dims / 2; ++i) {
    const double extra = period(r, i, r.base), inter = r.factor * extra;
    const double mask = 1.0 - std::clamp((i - low) / (high - low), 0.0, 1.0);
    periods.push_back(inter * extra / (inter * mask + extra * (1 - mask)));
  }
  return periods;
}

double dynamic_base(const Rope& r, int tokens) {
  const double length = std::max(tokens, r.max_positions);
  return r.base * std::pow(r.factor * length / r.max_positions - (r.factor - 1), double(r.dims) / (r.dims - 2));
}

}  // namespace

std::vector<float> rope_frequencies(const Rope& r, int tokens) {
  std::vector<float> frequencies;
  const auto push = [&](double p) { frequencies.push_back(static_cast<float>(1.0 / p)); };
  if (r.kind == arch::RopeKind::yarn) {
    for (const double p : yarn_periods(r)) push(p);
    return frequencies;
  }
  const double base = r.kind == arch::RopeKind::dynamic_ntk ? dynamic_base(r, tokens) : double(r.base);
  for (int i = 0; i < r.dims / 2; ++i) {
    const double p = period(r, i, base);
    switch (r.kind) {
      case arch::RopeKind::linear:
        push(p * r.factor);
        break;
      case arch::RopeKind::llama3:
        push(llama3_period(r, p));
        break;
      case arch::RopeKind::longrope:
        push(p * r.long_factor.at(i));
        break;
      case arch::RopeKind::proportional:
        if (2 * i < r.rotated_dims)
          push(p * r.factor);
        else
          frequencies.push_back(0.f);
        break;
      default:
        push(p);
    }
  }
  return frequencies;
}

}  // namespace mlxlm::plan
