// Which stored cache a prompt gets, and what the cache keeps.
#include <gtest/gtest.h>

#include "contract/scripted_runner.h"

namespace mlxlm::tests {
namespace {

using Ids = std::vector<CacheId>;

TEST(PrefixCache, LeavesOneTokenToProcess) {
  PrefixCache cache(100);
  EXPECT_EQ(cache.insert(std::vector<int>{1, 2, 3}, {7, 0, 10, true}), Ids{});
  EXPECT_EQ(cache.find(std::vector<int>{1, 2, 3})->usable_tokens, 2);
  EXPECT_EQ(cache.find(std::vector<int>{1, 2, 3, 4})->usable_tokens, 3);
  EXPECT_EQ(cache.find(std::vector<int>{1, 2, 9, 4})->usable_tokens, 2);
  EXPECT_FALSE(cache.find(std::vector<int>{1}));
  EXPECT_FALSE(cache.find(std::vector<int>{}));
  EXPECT_FALSE(cache.find(std::vector<int>{2, 1}));
  EXPECT_FALSE(cache.find(std::vector<int>{1, 2, 3, 4}, 5));
}

TEST(PrefixCache, WhatCannotBeTrimmedIsUsedWholeOrNotAtAll) {
  PrefixCache cache(100);
  cache.insert(std::vector<int>{1, 2, 3, 4}, {1, 0, 10, false});
  cache.insert(std::vector<int>{1, 2}, {2, 0, 10, false});
  EXPECT_EQ(cache.size(), 2u);
  EXPECT_EQ(cache.find(std::vector<int>{1, 2, 3, 4})->entry.cache, 2);  // one token has to be left
  EXPECT_EQ(cache.find(std::vector<int>{1, 2, 3, 4, 5})->entry.cache, 1);
  EXPECT_EQ(cache.find(std::vector<int>{1, 2, 3, 9, 5})->entry.cache, 2);
}

TEST(PrefixCache, ATrimmableOneTakesThePlaceOfShorterOnes) {
  PrefixCache cache(100);
  cache.insert(std::vector<int>{1, 2}, {1, 0, 10, true});
  EXPECT_EQ(cache.insert(std::vector<int>{1, 2, 3}, {2, 0, 10, true}), Ids{1});
  EXPECT_EQ(cache.insert(std::vector<int>{1, 2, 3}, {3, 0, 10, true}), Ids{2});
  EXPECT_EQ(cache.insert(std::vector<int>{1}, {4, 0, 10, true}), Ids{4});
  EXPECT_EQ(cache.bytes(), 10);
}

TEST(PrefixCache, ByUseNotByAge) {
  PrefixCache cache(30);
  cache.insert(std::vector<int>{1, 1}, {1, 0, 10, true});
  cache.insert(std::vector<int>{2, 2}, {2, 0, 10, true});
  cache.insert(std::vector<int>{3, 3}, {3, 0, 10, true});
  cache.find(std::vector<int>{1, 1, 1});
  EXPECT_EQ(cache.insert(std::vector<int>{4, 4}, {4, 0, 10, true}), Ids{2});
  EXPECT_EQ(cache.insert(std::vector<int>{5, 5}, {5, 0, 31, true}), Ids{5});
  EXPECT_EQ(cache.insert(std::vector<int>{6, 6}, {6, 0, 30, true}), (Ids{3, 1, 4}));
}

/** mlx-lm#1215: a prompt that is stored exactly, sent again, twice over and with its own answer. */
TEST(PrefixReuse, AnExactHit) {
  for (const bool trimmable : {true, false}) {
    Bench b({.prefill_tokens = 16, .prefix_cache_bytes = 100000});
    b.runner.trimmable = trimmable;
    Request r{.tokens = prompt_of(40), .max_tokens = 6};
    r.boundaries = {20, 39};
    const auto wanted = alone(r);
    for (int i = 0; i < 3; ++i) {
      const auto id = b.submit(r);
      b.drain();
      EXPECT_EQ(b.answers[id], wanted);
      EXPECT_EQ(b.last.at(id).reused_tokens, i == 0 ? 0 : 39);
    }
    // The stored sequence itself: prompt and answer but the last token, and the whole.
    for (const int less : {1, 0}) {
      Request again{.tokens = r.tokens, .max_tokens = 3};
      again.tokens.insert(again.tokens.end(), wanted.begin(), wanted.end() - less);
      const auto id = b.submit(again);
      b.drain();
      EXPECT_EQ(b.answers[id], alone(again));
    }
    EXPECT_TRUE(b.violations.empty()) << b.violations.front();
  }
}

TEST(PrefixReuse, RequestsThatRunAtOnceShareTheirBeginning) {
  for (const bool trimmable : {true, false}) {
    Bench b({.prefill_tokens = 16});
    b.runner.trimmable = trimmable;
    const auto first = b.submit({.tokens = prompt_of(50), .max_tokens = 30});
    for (int i = 0; i < 3; ++i) b.step();
    Request r{.tokens = prompt_of(60), .max_tokens = 5};
    r.tokens[44] = 1;
    const auto second = b.submit(r);
    Request apart = r;
    apart.use_prefix_cache = false;
    const auto third = b.submit(apart);
    b.drain();
    EXPECT_TRUE(b.violations.empty()) << b.violations.front();
    EXPECT_EQ(b.answers[first].size(), 30u);
    EXPECT_EQ(b.answers[second], alone(r));
    EXPECT_EQ(b.answers[third], alone(r));
    EXPECT_EQ(b.last.at(second).reused_tokens, trimmable ? 44 : 0);
    EXPECT_EQ(b.last.at(third).reused_tokens, 0);
  }
}

TEST(PrefixReuse, TheBudgetHoldsAndGivesWayToRequests) {
  Bench b({.prefill_tokens = 32, .memory_bytes = 3000, .prefix_cache_bytes = 1500});
  for (int i = 0; i < 60; ++i) {
    Request r{.tokens = prompt_of(30 + i % 5 * 40, i % 3), .max_tokens = 10 + i};
    if (i % 3 == 0) r.boundaries = {10, 25};
    const auto id = b.submit(r);
    if (i % 4 == 3) b.drain();
    b.step();
    EXPECT_LE(b.engine->prefixes().bytes(), 1500);
    if (i % 4 == 3) {
      EXPECT_EQ(b.answers[id], alone(r));
    }
  }
  b.drain();
  EXPECT_TRUE(b.violations.empty()) << b.violations.front();
  EXPECT_GT(b.engine->counters().reused_tokens, 0);
  b.engine->shrink_prefix_cache(0);
  EXPECT_TRUE(b.runner.caches.empty());
}

/** A copy holds all memory of what it shares with, and grows by what is its own: also when little is shared with something large. */
TEST(PrefixReuse, MemoryOfOthersIsReservedBesideWhatGrows) {
  for (const int max_tokens : {1, -1}) {
    Bench b({.memory_bytes = 100000, .prefix_cache_bytes = 50000});
    b.runner.shares = true;
    b.submit({.tokens = prompt_of(400), .max_tokens = 1});
    b.drain();
    Request r{.tokens = prompt_of(360), .max_tokens = max_tokens};
    for (std::size_t i = 64; i < r.tokens.size(); ++i) r.tokens[i] = 1 + static_cast<int>(i) % 5;
    const auto id = b.submit(r);
    for (int i = 0; i < 1200; ++i) b.step();  // an answer without a limit reserves more as it grows
    b.engine->cancel(id);
    b.drain();
    b.step();
    EXPECT_TRUE(b.violations.empty()) << b.violations.front();
    EXPECT_EQ(b.last.at(id).reused_tokens, 64);
  }
}

/** What is stored at a boundary never exceeds the budget, not even while it is copied, and is not copied in vain. */
TEST(PrefixReuse, RoomIsMadeBeforeACopyIsMade) {
  Bench b({.prefix_cache_bytes = 600});
  b.runner.trimmable = false;
  int64_t most = 0;
  b.runner.before_copy = [&](int64_t bytes) { most = std::max(most, b.engine->prefixes().bytes() + bytes); };
  for (int i = 0; i < 8; ++i) {
    b.submit({.tokens = prompt_of(60, i % 4), .max_tokens = 1, .boundaries = {50}});
    b.drain();
  }
  EXPECT_TRUE(b.violations.empty()) << b.violations.front();
  EXPECT_GT(most, 210);
  EXPECT_LE(most, 600);
}

/** Prompts that come at once with one that will store their beginning wait for it, be it snapshots or not, and nobody waits in vain. */
TEST(PrefixReuse, PromptsWaitForWhatIsAboutToBeStored) {
  for (const bool trimmable : {true, false}) {
    Bench b({.prefill_tokens = 30, .prefix_cache_bytes = 6000});
    b.runner.trimmable = trimmable;
    std::vector<SequenceId> ids;
    for (int i = 0; i < 8; ++i) {
      Request r{.tokens = prompt_of(60), .max_tokens = 4, .boundaries = {50}};
      r.tokens[55] = i;
      ids.push_back(b.submit(r));
    }
    b.drain();
    EXPECT_TRUE(b.violations.empty()) << b.violations.front();
    for (std::size_t i = 1; i < ids.size(); ++i) EXPECT_GE(b.last.at(ids[i]).reused_tokens, 50);
    EXPECT_LE(b.engine->counters().prompt_tokens, 60 + 7 * 10);
  }
  // What is not stored after all holds nobody up for longer than that takes.
  Bench b({.prefill_tokens = 30, .prefix_cache_bytes = 100});
  for (int i = 0; i < 3; ++i) b.submit({.tokens = prompt_of(60), .max_tokens = 4, .boundaries = {50}});
  EXPECT_LT(b.drain(), 20);
  // A request that is cancelled before it comes so far.
  Bench c({.prefill_tokens = 30, .prefix_cache_bytes = 6000});
  const auto first = c.submit({.tokens = prompt_of(60), .max_tokens = 4, .boundaries = {50}});
  const auto second = c.submit({.tokens = prompt_of(60), .max_tokens = 4});
  c.step();
  EXPECT_EQ(c.engine->running(), 1);
  c.engine->cancel(first);
  c.drain();
  EXPECT_EQ(c.answers[second].size(), 4u);
}

TEST(PrefixReuse, OnlyWhatIsWantedIsStored) {
  Bench b({.prefix_cache_bytes = 6000});
  b.submit({.tokens = prompt_of(60), .max_tokens = 4, .store_at_end = false, .boundaries = {50}});
  b.drain();
  ASSERT_EQ(b.engine->prefixes().contents().size(), 1u);
  EXPECT_EQ(b.engine->prefixes().contents()[0].tokens, prompt_of(50));
}

TEST(PrefixReuse, CachesOfOtherLimitsDoNotMix) {
  Bench b({.prefix_cache_bytes = 100000});
  Request r{.tokens = prompt_of(40), .max_tokens = 2};
  b.submit(r);
  b.drain();
  r.max_kv_size_tokens = 64;
  const auto id = b.submit(r);
  b.drain();
  EXPECT_EQ(b.last.at(id).reused_tokens, 0);
  const auto again = b.submit(r);
  b.drain();
  EXPECT_EQ(b.last.at(again).reused_tokens, 39);
  r.use_prefix_cache = false;
  const auto not_at_all = b.submit(r);
  b.drain();
  EXPECT_EQ(b.last.at(not_at_all).reused_tokens, 0);
}

}  // namespace
}  // namespace mlxlm::tests
