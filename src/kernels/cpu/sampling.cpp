// Scores of the vocabulary -> a token: normalizing, filters and the draw, one row at a time.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "base/thread_pool.h"
#include "kernels/cpu/kernel.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/rows.h"

namespace mlxlm::kernels::cpu {
namespace {

constexpr float lowest = -std::numeric_limits<float>::infinity();

template <class RowBody>
void each_row(int64_t rows, RowBody&& body) {
  compute_pool().parallel_for(static_cast<int>(rows), [&](int row, int) { body(row); });
}

mx::Shape rows_of(const mx::array& a, const char* where) {
  if (a.ndim() != 2 || a.shape(1) == 0) throw Error(Code::internal, where, "wanted [B, V]");
  storage_of(a.dtype());
  return {a.shape(0)};
}

int first_of(const float* x, int64_t count, float value) {
  const float* found = std::find(x, x + count, value);
  return found == x + count ? 0 : static_cast<int>(found - x);
}

/** Number `i` of `total` uniform ones in [0, 1) that MLX makes of a key. Reference: Salmon, Moraes, Dror, Shaw 2011, "Parallel random
 * numbers: as easy as 1, 2, 3" (Threefry-2x32-20) */
float uniform(const uint32_t key[2], uint32_t i, uint32_t total) {
  constexpr int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDAu};
  // Each counter gives two numbers, i and i + half; with an odd total the last of the first half stands alone.
  const uint32_t half = (total + 1) / 2, counter = i % half;
  uint32_t a = counter + keys[0], b = (total % 2 == 1 && counter == half - 1 ? 0 : half + counter) + keys[1];
  for (uint32_t round = 0; round < 5; ++round) {
    for (const int turn : turns[round % 2]) {
      a += b;
      b = std::rotl(b, turn) ^ a;
    }
    a += keys[(round + 1) % 3];
    b += keys[(round + 2) % 3] + round + 1;
  }
  const auto bits = static_cast<float>(i < half ? a : b);
  return std::min(bits / static_cast<float>(std::numeric_limits<uint32_t>::max()), std::nextafter(1.f, 0.f));
}

/** A row in buckets by distance from its largest value, so that only one bucket must be sorted to know where to cut. */
class Cut {
 public:
  Cut(const float* x, int64_t count, float peak) : x_(x), count_(count), peak_(peak) {}

  /** The smallest value that stays: those before it, likeliest first, weigh less than `mass` times the sum of weights. */
  float by_mass(const float* weights, float total, float top_p) {
    std::array<double, buckets> held{};
    for (int64_t i = 0; i < count_; ++i) {
      if (weights[i] > 0.f) held[bucket(x_[i])] += weights[i];
    }
    const double wanted = double(top_p) * total;
    double above = 0;
    int at = 0;
    while (at < buckets - 1 && above + held[at] < wanted) above += held[at++];
    auto members = sorted(at, lowest);
    std::size_t last = 0;
    for (std::size_t j = 0; j < members.size() && above < wanted; ++j) {
      last = j;
      above += weights[members[j]];
    }
    return members.empty() ? lowest : x_[members[last]];
  }

  /** Tokens of the `wanted` largest values among those of at least `least`; of equals the first. */
  std::vector<int> by_count(int wanted, float least) {
    std::array<int64_t, buckets> held{};
    for (int64_t i = 0; i < count_; ++i) held[bucket(x_[i])] += x_[i] >= least;
    int64_t above = 0;
    int at = 0;
    while (at < buckets - 1 && above + held[at] < wanted) above += held[at++];
    std::vector<int> kept;
    for (int64_t i = 0; i < count_; ++i) {
      if (x_[i] >= least && bucket(x_[i]) < at) kept.push_back(static_cast<int>(i));
    }
    const auto members = sorted(at, least);
    kept.insert(kept.end(), members.begin(), members.begin() + std::min<int64_t>(static_cast<int64_t>(members.size()), wanted - above));
    return kept;
  }

 private:
  static constexpr int buckets = 512;
  int bucket(float value) const {
    const float distance = (peak_ - value) * 16.f;
    return distance < buckets - 1 ? static_cast<int>(distance) : buckets - 1;  // NaN and infinity: the last
  }
  std::vector<int> sorted(int wanted, float least) const {
    std::vector<int> members;
    for (int64_t i = 0; i < count_; ++i) {
      if (bucket(x_[i]) == wanted && x_[i] >= least) members.push_back(static_cast<int>(i));
    }
    std::stable_sort(members.begin(), members.end(), [&](int a, int b) { return x_[a] > x_[b]; });
    return members;
  }
  const float* x_;
  int64_t count_;
  float peak_;
};

/** The last token before which the weights, in order, come to at most `part` of their sum. */
int pick(const float* weights, int64_t count, float part) {
  constexpr int64_t block = 512;
  std::vector<double> sums;
  double total = 0;
  for (int64_t i = 0; i < count; i += block) {
    float sum = 0;
    for (int64_t j = i; j < std::min(count, i + block); ++j) sum += weights[j];
    sums.push_back(total);
    total += sum;
  }
  const double wanted = part * total;
  auto at = std::upper_bound(sums.begin(), sums.end(), wanted) - sums.begin() - 1;
  // Rounding may leave the end of a block behind its sum: nothing of weight 0 may be chosen.
  double before = sums[static_cast<std::size_t>(at)];
  int chosen = -1;
  for (int64_t j = at * block; j < std::min(count, (at + 1) * block) && (chosen < 0 || before <= wanted); ++j) {
    if (weights[j] > 0.f) chosen = static_cast<int>(j);
    before += weights[j];
  }
  while (chosen < 0 && at > 0) {
    --at;
    for (int64_t j = (at + 1) * block - 1; j >= at * block && chosen < 0; --j) {
      if (weights[j] > 0.f) chosen = static_cast<int>(j);
    }
  }
  return std::max(chosen, 0);
}

int draw_row(const float* x, int64_t count, const DrawOptions& o, float part) {
  const float peak = isa().row_max(x, count), factor = static_cast<float>(1.0 / static_cast<double>(o.temperature));
  if (!std::isfinite(peak)) return first_of(x, count, peak);
  float *weights = scratch(1, count), *scores = scratch(2, count);
  Cut cut(x, count, peak);
  float least = lowest;
  if (o.top_p > 0.f && o.top_p < 1.f) {
    const float total = isa().exps(x, peak, count, weights);
    least = cut.by_mass(weights, total, o.top_p);
  }
  if (o.min_p != 0.f) least = std::max(least, peak + static_cast<float>(std::log(static_cast<double>(o.min_p))));
  if (o.top_k > 0) {
    std::fill(scores, scores + count, lowest);
    for (const int token : cut.by_count(o.top_k, least)) scores[token] = x[token] * factor;
  } else {
    for (int64_t i = 0; i < count; ++i) scores[i] = x[i] >= least ? x[i] * factor : lowest;
  }
  isa().exps(scores, peak * factor, count, weights);
  return pick(weights, count, part);
}

}  // namespace

mx::array argmax(const mx::array& logits) {
  return make_kernel("Argmax", rows_of(logits, "argmax"), mx::int32, {logits}, [](const auto& in, auto& out) {
    const Rows rows(in[0]);
    auto* tokens = out[0].template data<int>();
    each_row(rows.count(), [&](int64_t row) {
      float* x = scratch(0, rows.width());
      rows.load(row, x);
      tokens[row] = first_of(x, rows.width(), isa().row_max(x, rows.width()));
    });
  });
}

mx::array log_softmax(const mx::array& logits) {
  rows_of(logits, "log_softmax");
  return make_kernel("LogSoftmax", logits.shape(), mx::float32, {logits}, [](const auto& in, auto& out) {
    const Rows rows(in[0]);
    const int64_t width = rows.width();
    each_row(rows.count(), [&](int64_t row) {
      float *x = scratch(0, width), *to = out[0].template data<float>() + row * width;
      rows.load(row, x);
      const float peak = isa().row_max(x, width);
      const float sum = std::isfinite(peak) ? peak + std::log(isa().exps(x, peak, width, to)) : peak;
      for (int64_t i = 0; i < width; ++i) to[i] = x[i] - sum;
    });
  });
}

mx::array draw(const mx::array& logprobs, const mx::array& key, const DrawOptions& options) {
  const auto shape = rows_of(logprobs, "draw");
  if (logprobs.dtype() != mx::float32 || key.shape() != mx::Shape{2} || key.dtype() != mx::uint32 || !(options.temperature > 0.f)) {
    throw Error(Code::internal, "draw", "wanted float32 scores, a key and a temperature");
  }
  return make_kernel("Draw", shape, mx::int32, {logprobs, key}, [options](const auto& in, auto& out) {
    const Rows rows(in[0]);
    const int64_t width = rows.width();
    const uint32_t key[2] = {in[1].template data<uint32_t>()[0], in[1].template data<uint32_t>()[in[1].strides(0)]};
    const auto total = static_cast<uint32_t>(rows.count());
    auto* tokens = out[0].template data<int>();
    each_row(rows.count(), [&](int64_t row) {
      const float* x = in[0].template data<float>() + rows.offset(row);
      if (in[0].strides(1) != 1) {
        float* copy = scratch(0, width);
        rows.load(row, copy);
        x = copy;
      }
      tokens[row] = draw_row(x, width, options, uniform(key, static_cast<uint32_t>(row), total));
    });
  });
}

}  // namespace mlxlm::kernels::cpu
