// Common beginnings of prompts, against a trie made by hand and against all pairs.
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "gen/shared_prefix.h"

namespace mlxlm {
namespace {

using Tokens = std::vector<int>;
using Lengths = std::vector<std::vector<int>>;

Lengths of(const std::vector<Tokens>& prompts, int least_tokens = 1) {
  return gen::shared_prefixes({prompts.begin(), prompts.end()}, least_tokens);
}

TEST(SharedPrefixes, AreKeptByTheFirstThatComes) {
  EXPECT_TRUE(of({}).empty());
  EXPECT_EQ(of({{1, 2, 3}}), (Lengths{{}}));
  EXPECT_EQ(of({{1, 2, 3}, {4, 5}}), (Lengths{{}, {}}));
  EXPECT_EQ(of({{1, 2, 3, 4}, {1, 2, 5, 6}, {1, 2, 3, 9}}), (Lengths{{2, 3}, {}, {}}));
  EXPECT_EQ(of({{1, 2, 9, 9}, {1, 2, 3, 4}, {1, 2, 3, 5}}), (Lengths{{2}, {3}, {}}));
  EXPECT_EQ(of({{1, 2, 9, 9}, {1, 2, 3, 4}, {1, 2, 3, 5}}, 3), (Lengths{{}, {3}, {}}));
}

TEST(SharedPrefixes, LeaveATokenToProcess) {
  EXPECT_EQ(of({{1, 2, 3}, {1, 2, 3}}), (Lengths{{2}, {}}));
  EXPECT_EQ(of({{1, 2, 3, 4, 5}, {1, 2, 3}}), (Lengths{{2}, {}}));
  EXPECT_EQ(of({{1}, {1}, {}}), (Lengths{{}, {}, {}}));
}

/** In order, each prompt finds the longest beginning that it has in common with any before it. */
TEST(SharedPrefixes, NothingIsComputedTwice) {
  std::mt19937 random(5);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution(low, high)(random); };
  for (int round = 0; round < 300; ++round) {
    std::vector<Tokens> prompts(pick(1, 12));
    for (auto& p : prompts) {
      const int length = pick(0, 8);
      for (int i = 0; i < length; ++i) p.push_back(pick(0, 1));
    }
    const auto lengths = of(prompts);
    std::set<Tokens> kept;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      int best = 0, reused = 0;
      const auto& p = prompts[i];
      const int usable = static_cast<int>(p.size()) - 1;
      for (std::size_t j = 0; j < i; ++j) {
        int n = 0;
        while (n < usable && n + 1 < static_cast<int>(prompts[j].size()) && prompts[j][n] == p[n]) ++n;
        best = std::max(best, n);
      }
      for (int n = 1; n <= usable; ++n) {
        if (kept.contains(Tokens(p.begin(), p.begin() + n))) reused = n;
      }
      EXPECT_EQ(reused, best);
      for (const int n : lengths[i]) {
        EXPECT_GT(n, reused) << "it is kept already";
        EXPECT_LE(n, usable);
        kept.emplace(p.begin(), p.begin() + n);
      }
    }
  }
}

}  // namespace
}  // namespace mlxlm
