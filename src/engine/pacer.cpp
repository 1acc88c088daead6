// A model of a step's time: that of its decoding rows, and so much for each prompt token, more the more tokens it has before it.
#include "engine/pacer.h"

#include <algorithm>
#include <cmath>

namespace mlxlm::engine {
namespace {

constexpr std::size_t kDecodeSteps = 12;
constexpr double kWeightOfMore = 0.5, kWeightOfLess = 0.2;  // a machine that slows down is believed sooner than one that speeds up
constexpr int kFirstGuessTokensPerRow = 2;                  // about twice the time where time grows with the rows
constexpr double kGuessedGrowth = 1. / 2000, kMostGrowth = 1. / 200, kKnownSpread = 300;  // 1 / tokens, 1 / tokens, tokens
constexpr double kForgetting = 0.995;

}  // namespace

void Pacer::Line::add(double held_tokens, double seconds) {
  for (auto* sum : {&weight, &x, &y, &xx, &xy}) *sum *= kForgetting;
  weight += 1;
  x += held_tokens;
  y += seconds;
  xx += held_tokens * held_tokens;
  xy += held_tokens * seconds;
}

/** By what part of itself the time of a prompt token grows for each token before it: a guess as long as all had about as many. */
double Pacer::Line::growth() const {
  if (weight == 0) return kGuessedGrowth;
  const double mean_x = x / weight, mean_y = y / weight;
  const double spread = std::max(0., xx / weight - mean_x * mean_x), known = spread / (spread + kKnownSpread * kKnownSpread);
  const double slope = spread > 0 ? std::max(0., (xy / weight - mean_x * mean_y) / spread) : 0, first = mean_y - slope * mean_x;
  const double seen = slope < kMostGrowth * first ? slope / first : kMostGrowth;
  return known * seen + (1 - known) * kGuessedGrowth;
}

/** Seconds of a step of so many rows and nothing else; 0 = not known. The lower quartile of the latest: what disturbs a step or two does
 * not make room for prompts, nor does what a long prompt's other steps add to the rows' own contexts. */
double Pacer::decode_s(int rows) const {
  const auto of = [](const std::vector<double>& seconds) {
    auto sorted = seconds;
    std::ranges::sort(sorted);
    return sorted[sorted.size() / 4];
  };
  if (decode_s_.empty()) return 0;
  const auto above = decode_s_.lower_bound(rows);
  if (above != decode_s_.end() && above->first == rows) return of(above->second);
  // Between fixed and proportional cost: a neighbour's time is taken as it is if it has fewer rows, and scaled down if it has more.
  if (above == decode_s_.begin()) return of(above->second) * rows / above->first;
  return of(std::prev(above)->second);
}

void Pacer::observe(int decode_rows, int prompt_tokens, double held_tokens, double seconds) {
  if (seconds <= 0 || !std::isfinite(seconds)) return;
  if (prompt_tokens == 0) {
    if (decode_rows == 0) return;
    auto& latest = decode_s_[decode_rows];
    if (latest.size() == kDecodeSteps) latest.erase(latest.begin());
    latest.push_back(seconds);
    return;
  }
  const double own = seconds - (decode_rows > 0 ? decode_s(decode_rows) : 0);
  const double each = std::max(own, 0.05 * seconds) / prompt_tokens;
  line_.add(held_tokens, each);
  const double first = each / (1 + line_.growth() * held_tokens);
  const double weight = first_token_s_ == 0 ? 1 : first > first_token_s_ ? kWeightOfMore : kWeightOfLess;
  first_token_s_ += weight * (first - first_token_s_);
}

int Pacer::prompt_tokens(int decode_rows, int held_tokens) const {
  if (decode_rows <= 0) return most_tokens_;
  const double base = decode_s(decode_rows);
  double tokens = kFirstGuessTokensPerRow * decode_rows;
  if (base > 0 && first_token_s_ > 0) tokens = (ratio_ - 1) * base / token_s(held_tokens);
  return static_cast<int>(std::clamp(tokens, static_cast<double>(least_tokens_), static_cast<double>(most_tokens_)));
}

}  // namespace mlxlm::engine
