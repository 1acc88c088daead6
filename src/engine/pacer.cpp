// A linear model of a step's time: that of its decoding rows, and so much for each prompt token.
#include "engine/pacer.h"

#include <algorithm>
#include <cmath>

namespace mlxlm::engine {
namespace {

constexpr double kWeightOfNew = 0.25;
constexpr int kFirstGuessTokensPerRow = 2;  // about twice the time where time grows with the rows

void smooth(double& value, double seen) {
  value = value == 0 ? seen : value + kWeightOfNew * (seen - value);
}

}  // namespace

double Pacer::decode_s(int rows) const {
  if (decode_s_.empty()) return 0;
  const auto above = decode_s_.lower_bound(rows);
  if (above != decode_s_.end() && above->first == rows) return above->second;
  // Between fixed and proportional cost: a neighbour's time is taken as it is if it has fewer rows, and scaled down if it has more.
  if (above == decode_s_.begin()) return above->second * rows / above->first;
  return std::prev(above)->second;
}

void Pacer::observe(int decode_rows, int prompt_tokens, double seconds) {
  if (seconds <= 0 || !std::isfinite(seconds)) return;
  if (prompt_tokens == 0) {
    if (decode_rows > 0) smooth(decode_s_[decode_rows], seconds);
    return;
  }
  const double own = seconds - (decode_rows > 0 ? decode_s(decode_rows) : 0);
  smooth(prompt_token_s_, std::max(own, 0.05 * seconds) / prompt_tokens);
}

int Pacer::prompt_tokens(int decode_rows) const {
  if (decode_rows <= 0) return most_tokens_;
  const double base = decode_s(decode_rows);
  double tokens = kFirstGuessTokensPerRow * decode_rows;
  if (base > 0 && prompt_token_s_ > 0) tokens = (ratio_ - 1) * base / prompt_token_s_;
  return static_cast<int>(std::clamp(tokens, static_cast<double>(least_tokens_), static_cast<double>(most_tokens_)));
}

}  // namespace mlxlm::engine
