// The prefix cache against a model of it that looks at every entry.
#include <algorithm>
#include <chrono>
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "engine/prefix_cache.h"

namespace mlxlm::engine {
namespace {

using Tokens = std::vector<int>;

int shared(const Tokens& a, const Tokens& b) {
  return static_cast<int>(std::ranges::mismatch(a, b).in1 - a.begin());
}

/** What the trie must do, by looking at all entries. */
struct Plain {
  struct One {
    Tokens key;
    uint64_t space;
    PrefixCache::Entry entry;
  };
  std::vector<One> list;  // least recently used first
  int64_t budget;

  /** The tokens that an entry spares. */
  static int usable(const One& one, const Tokens& prompt) {
    const Tokens usable(prompt.begin(), prompt.empty() ? prompt.end() : prompt.end() - 1);
    const int n = shared(one.key, usable);
    return one.entry.trimmable || n == static_cast<int>(one.key.size()) ? n : 0;
  }
  int best(const Tokens& prompt, uint64_t space) const {
    int most = 0;
    for (const auto& one : list) most = one.space == space ? std::max(most, usable(one, prompt)) : most;
    return most;
  }
  One* with(CacheId cache) {
    for (auto& one : list) {
      if (one.entry.cache == cache) return &one;
    }
    return nullptr;
  }
  void touch(CacheId cache) {
    const auto at = std::ranges::find_if(list, [&](const One& one) { return one.entry.cache == cache; });
    std::rotate(at, at + 1, list.end());
  }
  int64_t bytes() const {
    int64_t total = 0;
    for (const auto& one : list) total += one.entry.bytes;
    return total;
  }
};

class Fuzz {
 public:
  explicit Fuzz(uint32_t seed) : random_(seed), cache_(budget(seed)) { plain_.budget = cache_.budget_bytes(); }

  void step() {
    switch (pick(0, 9)) {
      case 0: {
        const auto bytes = pick(0, 300);
        gone(cache_.shrink_to(bytes), bytes);
        EXPECT_LE(cache_.bytes(), bytes);
        break;
      }
      case 1:
        plain_.budget = pick(0, 3) == 0 ? pick(0, 40) : pick(100, 600);
        gone(cache_.set_budget(plain_.budget), plain_.budget);
        break;
      case 2:
      case 3:
      case 4:
        insert();
        break;
      default:
        find();
    }
    same();
  }

 private:
  static int64_t budget(uint32_t seed) { return 50 + seed % 7 * 90; }
  int pick(int low, int high) { return std::uniform_int_distribution(low, high)(random_); }
  Tokens tokens() {
    Tokens t(pick(0, 14));
    for (auto& x : t) x = pick(0, 9) < 8 ? 1 : pick(2, 3);
    return t;
  }

  void find() {
    const auto prompt = tokens();
    const uint64_t space = pick(0, 1);
    const auto hit = cache_.find(prompt, space);
    const int best = plain_.best(prompt, space);
    ASSERT_EQ(hit.has_value(), best > 0);
    if (!hit) return;
    EXPECT_EQ(hit->usable_tokens, best);
    EXPECT_LT(hit->usable_tokens, static_cast<int>(prompt.size()));
    const auto* one = plain_.with(hit->entry.cache);
    ASSERT_NE(one, nullptr);
    EXPECT_EQ(one->space, space);
    EXPECT_EQ(Plain::usable(*one, prompt), best);
    plain_.touch(hit->entry.cache);
  }

  void insert() {
    const auto key = tokens();
    const uint64_t space = pick(0, 1);
    const PrefixCache::Entry entry{++last_, 0, pick(0, 5) == 0 ? pick(0, 700) : pick(1, 60), pick(0, 2) > 0};
    const auto back = cache_.insert(key, entry, space);
    const std::set<CacheId> out(back.begin(), back.end());
    EXPECT_EQ(out.size(), back.size());
    if (key.empty() || entry.bytes > plain_.budget) {
      EXPECT_EQ(back, std::vector<CacheId>{entry.cache});
      return;
    }
    const bool covered = std::ranges::any_of(plain_.list, [&](const auto& one) {
      return one.space == space && one.entry.trimmable && one.key.size() > key.size() &&
             shared(one.key, key) == static_cast<int>(key.size());
    });
    const bool equal =
        std::ranges::any_of(plain_.list, [&](const auto& one) { return one.space == space && one.key == key && one.entry.trimmable; });
    if (covered && !equal) {
      EXPECT_EQ(back, std::vector<CacheId>{entry.cache});
      // Some longer one was used: learn which from the order.
      const auto entries = cache_.entries();
      ASSERT_FALSE(entries.empty());
      const auto* used = plain_.with(entries.back().cache);
      ASSERT_NE(used, nullptr);
      EXPECT_TRUE(used->entry.trimmable && shared(used->key, key) == static_cast<int>(key.size()));
      plain_.touch(entries.back().cache);
      return;
    }
    std::erase_if(plain_.list, [&](const auto& one) {
      const bool above = one.space == space && one.key.size() <= key.size() && shared(one.key, key) == static_cast<int>(one.key.size());
      const bool goes = above && (one.key == key || entry.trimmable);
      if (goes) {
        EXPECT_TRUE(out.contains(one.entry.cache));
      }
      return goes;
    });
    auto held = entry;
    held.tokens = static_cast<int>(key.size());
    plain_.list.push_back({key, space, held});
    while (plain_.bytes() > plain_.budget) {
      EXPECT_TRUE(out.contains(plain_.list.front().entry.cache));
      plain_.list.erase(plain_.list.begin());
    }
  }

  /** The least recently used go first, and not one too many. */
  void gone(const std::vector<CacheId>& back, int64_t bytes) {
    for (const auto cache : back) {
      ASSERT_FALSE(plain_.list.empty());
      EXPECT_GT(plain_.bytes(), bytes);
      EXPECT_EQ(plain_.list.front().entry.cache, cache);
      plain_.list.erase(plain_.list.begin());
    }
    EXPECT_LE(plain_.bytes(), bytes);
  }

  void same() {
    EXPECT_LE(cache_.bytes(), cache_.budget_bytes());
    EXPECT_EQ(cache_.bytes(), plain_.bytes());
    const auto entries = cache_.entries();
    ASSERT_EQ(entries.size(), plain_.list.size());
    for (std::size_t i = 0; i < entries.size(); ++i) {
      EXPECT_EQ(entries[i].cache, plain_.list[i].entry.cache);
      EXPECT_EQ(entries[i].tokens, static_cast<int>(plain_.list[i].key.size()));
    }
  }

  std::mt19937 random_;
  PrefixCache cache_;
  Plain plain_;
  CacheId last_ = 0;
};

TEST(PrefixCacheFuzz, LikeAListOfAllEntries) {
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t seed = 0; seed < 400; ++seed) {
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(20)) break;
    SCOPED_TRACE(seed);
    Fuzz fuzz(seed);
    for (int i = 0; i < 300 && !testing::Test::HasFailure(); ++i) fuzz.step();
    if (testing::Test::HasFailure()) return;
  }
}

TEST(PrefixCacheFuzz, LongRunsAndManyEntries) {
  PrefixCache cache(1 << 20);
  Tokens base(20000, 7);
  for (int i = 0; i < 500; ++i) {
    auto key = base;
    key[i * 37 + 5] = 8;
    EXPECT_TRUE(cache.insert(key, {i + 1, 0, 1, true}).empty());
  }
  const auto hit = cache.find(base);
  ASSERT_TRUE(hit);
  EXPECT_EQ(hit->usable_tokens, 499 * 37 + 5);
  EXPECT_EQ(cache.shrink_to(0).size(), 500u);
  EXPECT_FALSE(cache.find(base));
}

}  // namespace
}  // namespace mlxlm::engine
