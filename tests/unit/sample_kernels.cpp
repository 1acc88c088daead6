// The sampling kernels against the same in MLX's operations: every draw equal.
#include <cmath>
#include <limits>
#include <tuple>

#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/random.h>
#include <mlx/transforms.h>

#include "kernels/cpu/kernels.h"
#include "sample/sample.h"

namespace {

using namespace mlxlm::sample;
namespace cpu = mlxlm::kernels::cpu;

/** Rows whose largest values stand out as those of a language model do. */
mx::array scores(int rows, int vocab, uint64_t seed, float spread) {
  auto x = mx::random::normal({rows, vocab}, mx::float32, 0.f, spread, mx::random::key(seed));
  return mx::contiguous(log_probabilities(x * mx::abs(x) * mx::array(0.3f)));
}

mx::array by_operations(mx::array x, const mx::array& key, const cpu::DrawOptions& o) {
  if (o.top_p > 0.f && o.top_p < 1.f) x = apply_top_p(x, o.top_p);
  if (o.min_p != 0.f) x = apply_min_p(x, o.min_p, 1);
  if (o.top_k > 0) x = apply_top_k(x, o.top_k);
  return mx::astype(mx::random::categorical(x * mx::array(static_cast<float>(1.0 / static_cast<double>(o.temperature))), -1, key),
                    mx::int32);
}

class Draw : public testing::TestWithParam<std::tuple<int, cpu::DrawOptions>> {};

/** Equal but where rounding moves the border between two tokens across the random number. */
TEST_P(Draw, IsMlxs) {
  const auto& [vocab, options] = GetParam();
  int differ = 0;
  constexpr int draws = 100;
  for (uint64_t seed = 0; seed < draws; ++seed) {
    const auto x = scores(1, vocab, seed, seed % 2 == 0 ? 1.f : 3.f);
    const auto key = mx::random::key(seed * 77 + 1);
    differ += cpu::draw(x, key, options).item<int>() != by_operations(x, key, options).item<int>();
  }
  EXPECT_LE(differ, vocab < 100 ? 0 : 1);
}

/** Every vocabulary with every options that it allows. */
std::vector<std::tuple<int, cpu::DrawOptions>> all_draws() {
  const cpu::DrawOptions all[] = {{},
                                  {.temperature = 0.3f},
                                  {.temperature = 5.f},
                                  {.top_p = 0.9f},
                                  {.top_p = 0.01f},
                                  {.top_p = 0.999f},
                                  {.min_p = 0.05f},
                                  {.top_k = 1},
                                  {.top_k = 40},
                                  {.temperature = 0.8f, .top_p = 0.95f, .min_p = 0.01f, .top_k = 20}};
  std::vector<std::tuple<int, cpu::DrawOptions>> draws;
  for (const int vocab : {1, 2, 7, 33, 1024, 5001}) {
    for (const auto& options : all) {
      if (options.top_k < vocab) draws.emplace_back(vocab, options);
    }
  }
  return draws;
}
INSTANTIATE_TEST_SUITE_P(Options, Draw, testing::ValuesIn(all_draws()));

/** Each token as often as its probability says: three standard deviations of 20000 draws. */
TEST(Draw, FollowsTheProbabilities) {
  const std::vector<float> probabilities{0.5f, 0.2f, 0.15f, 0.1f, 0.04f, 0.01f};
  const int rows = 20000, vocab = static_cast<int>(probabilities.size());
  auto x = mx::contiguous(mx::broadcast_to(mx::log(mx::array(probabilities.data(), {1, vocab}, mx::float32)), {rows, vocab}));
  auto tokens = cpu::draw(x, mx::random::key(5), {});
  mx::eval(tokens);
  std::vector<int> counts(probabilities.size());
  for (int i = 0; i < rows; ++i) ++counts.at(static_cast<std::size_t>(tokens.data<int>()[i]));
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double p = probabilities[i];
    EXPECT_NEAR(counts[i], rows * p, 3 * std::sqrt(rows * p * (1 - p))) << i;
  }
}

TEST(Draw, NeverTakesWhatIsForbidden) {
  const float no = -std::numeric_limits<float>::infinity();
  const auto x = mx::array({no, 0.f, no, no}, {1, 4});
  for (const auto& options :
       {cpu::DrawOptions{}, cpu::DrawOptions{.top_p = 0.5f}, cpu::DrawOptions{.min_p = 0.5f}, cpu::DrawOptions{.top_k = 3}}) {
    for (uint64_t seed = 0; seed < 20; ++seed) EXPECT_EQ(cpu::draw(x, mx::random::key(seed), options).item<int>(), 1);
  }
}

TEST(Argmax, IsTheFirstOfTheLargest) {
  const auto x = mx::array({1.f, 3.f, 3.f, -1.f, -2.f, -5.f, -2.f, -9.f}, {2, 4});
  for (const auto dtype : {mx::float32, mx::float16, mx::bfloat16}) {
    EXPECT_TRUE(mx::array_equal(cpu::argmax(mx::astype(x, dtype)), mx::array({1, 0}, {2}, mx::int32)).item<bool>());
  }
  for (const int vocab : {1, 15, 16, 17, 1000}) {
    const auto y = mx::random::normal({5, vocab}, mx::float32, 0.f, 1.f, mx::random::key(static_cast<uint64_t>(vocab)));
    EXPECT_TRUE(mx::array_equal(cpu::argmax(y), mx::argmax(y, -1)).item<bool>()) << vocab;
  }
}

TEST(LogSoftmax, IsMlxs) {
  for (const int vocab : {1, 3, 16, 100, 4097}) {
    const auto x = mx::random::normal({3, vocab}, mx::float32, 0.f, 8.f, mx::random::key(static_cast<uint64_t>(vocab)));
    const auto wanted = x - mx::logsumexp(x, -1, true);
    EXPECT_LT(mx::max(mx::abs(cpu::log_softmax(x) - wanted)).item<float>(), 2e-5f) << vocab;
  }
}

}  // namespace
