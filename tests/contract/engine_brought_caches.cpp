// Caches that requests bring and take along: handed over, held while their request waits, given up, lost.
#include <gtest/gtest.h>
#include <algorithm>
#include <utility>

#include "contract/scripted_runner.h"

namespace mlxlm::tests {
namespace {

#define EXPECT_SOUND(b) EXPECT_TRUE((b).violations.empty()) << (b).violations.front()

TEST(Engine, CachesAreHandedOverAndTakenUp) {
  Bench b;
  Request r{.tokens = prompt_of(10), .max_tokens = 8, .keep_cache = true};
  const auto whole = alone(r);
  r.max_tokens = 4;
  const auto first = b.submit(r);
  while (b.engine->running() + b.engine->waiting() > 0) {
    b.handed_over = 1;  // of the step that ends it
    b.violations.clear();
    b.step();
  }
  EXPECT_SOUND(b);
  const auto last = b.last.at(first);
  ASSERT_NE(last.cache, 0);
  EXPECT_EQ(last.cache_tokens.size(), 13u);  // the last token is not in it
  EXPECT_EQ(b.runner.caches.at(last.cache).tokens, last.cache_tokens);
  b.handed_over = 0;
  const auto second =
      b.submit({.tokens = {b.answers[first].back()}, .max_tokens = 4, .cache = last.cache, .cache_tokens = last.cache_tokens});
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(b.answers[second], std::vector<int>(whole.begin() + 4, whole.end()));
  // A refused request frees what it was given.
  const auto given = b.runner.reserve(5, {});
  EXPECT_THROW(b.submit({.tokens = {1}, .cache = given, .cache_tokens = {1, 2}}), Error);
  EXPECT_FALSE(b.runner.caches.contains(given));
}

TEST(Engine, ACacheMayComeWithoutItsTokens) {
  Bench b({.prefix_cache_bytes = 100'000});
  const auto given = [&] {
    const auto cache = b.runner.reserve(20, {});
    b.runner.caches.at(cache).tokens = prompt_of(20);
    return cache;
  };
  b.runner.guess = [](const DraftWanted& w, const Sampling&) {
    EXPECT_EQ(w.tokens.front(), 5);
    return std::vector<int>{1, 2};
  };
  b.runner.before_run = [](const StepPlan& plan) {
    for (const auto& row : plan.rows) EXPECT_TRUE(row.history.empty() || row.history.front() == 5);
  };
  const Request wanted{.tokens = {5, 6}, .max_tokens = 6, .cache_tokens = prompt_of(20)};
  const Sampling penalty{.repetition_penalty = 1.1f};
  const auto id = b.submit({.tokens = {5, 6}, .max_tokens = 6, .sampling = penalty, .drafts = {.ngram_tokens = 3}, .cache = given()});
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(b.answers[id], alone(wanted));
  EXPECT_TRUE(b.engine->snapshot().stored.empty());  // under which tokens?
  // What is known comes back.
  const auto kept = b.submit({.tokens = {5, 6}, .max_tokens = 3, .cache = given(), .keep_cache = true});
  b.step();
  EXPECT_EQ(b.engine->cache_of(kept)->second, (std::vector<int>{5, 6}));
  b.drain();
  EXPECT_EQ(b.last.at(kept).cache_tokens, (std::vector<int>{5, 6, b.answers[kept][0], b.answers[kept][1]}));
  b.engine->submit({.tokens = {7}, .max_tokens = 1, .cache = b.last.at(kept).cache, .cache_tokens = b.last.at(kept).cache_tokens});
  b.violations.clear();
  b.drain();
  EXPECT_SOUND(b);
}

TEST(Engine, ACacheWithoutItsTokensIsNotComputedAgain) {
  Bench b;
  const auto cache = b.runner.reserve(20, {});
  b.runner.caches.at(cache).tokens = prompt_of(20);
  const auto id = b.submit({.tokens = {5, 6}, .max_tokens = 9, .cache = cache});
  const Request other{.tokens = prompt_of(3, 1), .max_tokens = 9};
  const auto good = b.submit(other);
  int step = 0;
  b.runner.step_fails = [&](const StepPlan&) { return step++ == 3; };
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(b.last.at(id).finish, Finish::failed);
  EXPECT_EQ(b.last.at(id).error->code(), Code::internal);  // of the step, not of memory
  EXPECT_EQ(b.answers[good], alone(other));
}

TEST(Engine, BroughtCachesCountWhileTheirRequestsWait) {
  Bench b({.max_sequences = 1, .memory_bytes = 1000});
  const auto bring = [&](int salt, int held) {
    Request r{.tokens = prompt_of(5, salt), .max_tokens = 5};
    r.cache_tokens = prompt_of(held, salt + 50);
    r.cache = b.runner.reserve(held, {});
    b.runner.caches.at(r.cache).tokens = r.cache_tokens;
    return r;
  };
  std::vector<Request> requests;
  std::vector<SequenceId> ids;
  ids.push_back(b.submit(requests.emplace_back(Request{.tokens = prompt_of(60), .max_tokens = 20})));  // 330 bytes
  b.step();
  for (int i = 1; i < 4; ++i) {  // 250 bytes each: the last one does not fit any more
    ids.push_back(b.submit(requests.emplace_back(bring(i, 60))));
    b.check();
  }
  EXPECT_EQ(b.engine->memory().reserved_bytes, 330 + 2 * 250);
  EXPECT_EQ(b.engine->memory().held_bytes, 250 + 2 * 250);
  b.drain();
  EXPECT_SOUND(b);
  for (std::size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(b.answers[ids[i]], alone(requests[i])) << i;
  // Nobody runs, and the first in the queue needs the room that the second one's cache takes.
  const auto large = b.submit(requests.emplace_back(Request{.tokens = prompt_of(100), .max_tokens = 100}));
  const auto second = b.submit(requests.emplace_back(bring(7, 60)));
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(b.answers[large].size(), 100u);
  EXPECT_EQ(b.answers[second], alone(requests.back()));
  EXPECT_TRUE(b.runner.caches.empty());
}

TEST(Engine, ABroughtCacheOfUnknownTokensKeepsItsRoomOrIsRefused) {
  Bench b({.max_sequences = 1, .memory_bytes = 1000});
  const auto given = [&] {
    const auto cache = b.runner.reserve(60, {});
    b.runner.caches.at(cache).tokens = prompt_of(60);
    return cache;
  };
  b.submit({.tokens = prompt_of(60), .max_tokens = 20});  // 330 bytes
  b.step();
  const auto bring = [&] { return Request{.tokens = {5}, .max_tokens = 3, .cache = given()}; };
  std::vector<SequenceId> ids;
  for (int i = 0; i < 2; ++i) ids.push_back(b.submit(bring()));  // 250 bytes each
  try {
    b.engine->submit(bring());
    ADD_FAILURE() << "there was no room";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::out_of_memory);
  }
  b.drain();
  EXPECT_SOUND(b);
  for (const auto id : ids) EXPECT_EQ(b.answers[id].size(), 3u);
  EXPECT_TRUE(b.runner.caches.empty());
}

/** Each has room to grow from the moment it is brought, so that the first of them never waits for what the others hold. */
TEST(Engine, BroughtCachesOfUnknownTokensAllEnd) {
  Bench b({.max_sequences = 1, .memory_bytes = 1000});
  std::vector<SequenceId> ids;
  int refused = 0;
  for (int i = 0; i < 5; ++i) {
    const auto cache = b.runner.reserve(60, {});
    b.runner.caches.at(cache).tokens = prompt_of(60);
    try {
      ids.push_back(b.submit({.tokens = {5}, .max_tokens = 3, .cache = cache}));
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::out_of_memory);
      ++refused;
    }
  }
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(ids.size(), 3u);
  EXPECT_EQ(refused, 2);
  for (const auto id : ids) EXPECT_EQ(b.answers[id].size(), 3u) << b.last.at(id).error->what();
}

/** A lone answer without a limit takes the room of what a waiting request has brought before it fails. */
TEST(Engine, ABroughtCacheGivesWayToAnAnswerThatGrows) {
  Bench b({.max_sequences = 1, .memory_bytes = 1000});
  const auto growing = b.submit({.tokens = prompt_of(20), .max_tokens = -1});
  b.step();
  Request r{.tokens = prompt_of(5, 1), .max_tokens = 5};
  r.cache_tokens = prompt_of(60, 2);
  r.cache = b.runner.reserve(60, {});
  b.runner.caches.at(r.cache).tokens = r.cache_tokens;
  const auto second = b.submit(r);
  while (b.answers[growing].size() < 200) {  // 220 tokens and more: with the other's 250 bytes they would not fit
    ASSERT_FALSE(b.last.contains(growing)) << b.answers[growing].size();
    b.step();
  }
  b.engine->cancel(growing);
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(b.answers[second], alone(r));
}

/** A request over a cache of `held` tokens that has a limit, so that what it holds depends on the chunks that they came in. */
Request limited(Bench& b, int held, int salt, int max_kv_size_tokens) {
  Request r{.tokens = prompt_of(2, salt), .max_tokens = 3, .max_kv_size_tokens = max_kv_size_tokens};
  r.cache_tokens = prompt_of(held, salt + 50);
  r.cache = b.runner.reserve(held, {.max_kv_size_tokens = max_kv_size_tokens});
  b.runner.caches.at(r.cache).tokens = r.cache_tokens;
  return r;
}

using Submitted = std::vector<std::pair<SequenceId, Request>>;

/** Three of them, with growth 270 bytes each. */
Submitted submit_limited(Bench& b) {
  Submitted all;
  for (int i = 1; i < 4; ++i) {
    auto request = limited(b, 60, i, 65);
    const auto id = b.submit(request);
    all.emplace_back(id, std::move(request));
  }
  return all;
}

void expect_as_alone(Bench& b, const Submitted& all) {
  for (const auto& [id, request] : all) EXPECT_EQ(b.answers[id], alone(request)) << id;
}

TEST(Engine, ABroughtCacheWhoseChunksShowIsNotComputedAgain) {
  Bench b({.prefill_tokens = 64, .limited_chunk_tokens = 8});
  const auto bad = b.submit(limited(b, 60, 1, 10));
  // Nor one that is to have a limit, nor one that is quantized, whatever the request says of it.
  const auto bring = [&](const CacheOptions& options, Request r) {
    r.tokens = prompt_of(5, 1);
    r.max_tokens = 4;
    r.cache_tokens = prompt_of(20, 2);
    r.cache = b.runner.reserve(20, options);
    b.runner.caches.at(r.cache).tokens = r.cache_tokens;
    return r;
  };
  const auto cut = b.submit(bring({}, {.max_kv_size_tokens = 10}));
  const auto quantized = b.submit(bring({.kv_bits = 4, .quantized_from_tokens = 20}, {}));
  const auto later = bring({.kv_bits = 4, .quantized_from_tokens = 21}, {.kv_bits = 4});  // still floats
  const auto floats = b.submit(later);
  const auto whole = bring({}, {});
  const auto good = b.submit(whole);
  b.runner.step_fails = [failed = false](const StepPlan&) mutable { return !std::exchange(failed, true); };
  b.drain();
  EXPECT_SOUND(b);
  for (const auto id : {bad, cut, quantized}) {
    ASSERT_EQ(b.last.at(id).finish, Finish::failed);
    EXPECT_EQ(b.last.at(id).error->code(), Code::internal);  // of the step
    EXPECT_EQ(std::string(b.last.at(id).error->what()),
              "cache: was lost in a step that failed, and cannot be computed again: what it holds depends on the chunks that its tokens "
              "came in; the step: step: scripted failure of a step");
  }
  EXPECT_EQ(b.answers[floats], alone(later));
  EXPECT_EQ(b.answers[good], alone(whole));
  EXPECT_TRUE(b.runner.caches.empty());
}

TEST(Engine, ABroughtCacheWhoseChunksShowKeepsItsRoomOrIsRefused) {
  Bench b({.max_sequences = 1, .memory_bytes = 1000});
  const Request first{.tokens = prompt_of(60), .max_tokens = 20};  // 330 bytes
  std::vector<SequenceId> ids{b.submit(first)};
  b.step();
  std::vector<Request> requests{first};
  for (int i = 1; i < 3; ++i) ids.push_back(b.submit(requests.emplace_back(limited(b, 60, i, 65))));  // 270 bytes each, growth included
  EXPECT_EQ(b.engine->memory().reserved_bytes, 330 + 2 * 270);
  try {
    b.submit(limited(b, 60, 3, 65));
    ADD_FAILURE() << "there was no room";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::out_of_memory);
    EXPECT_NE(std::string(error.what()).find("the chunks"), std::string::npos) << error.what();
  }
  b.drain();
  EXPECT_SOUND(b);
  for (std::size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(b.answers[ids[i]], alone(requests[i])) << i;
  for (const auto& plan : b.runner.plans) {
    for (const auto& row : plan.rows) EXPECT_TRUE(row.sequence == ids[0] || row.tokens.size() <= 2) << "computed again";
  }
  EXPECT_TRUE(b.runner.caches.empty());
}

/** Nobody runs, and the first in the queue does not fit beside a cache that cannot give way: its request comes first. */
TEST(Engine, ABroughtCacheThatCannotGiveWayPasses) {
  Bench b({.max_sequences = 2, .memory_bytes = 1000});
  const Request large{.tokens = prompt_of(100), .max_tokens = 100};  // 810 bytes
  const auto id = b.submit(large);
  const auto others = submit_limited(b);
  b.drain();
  EXPECT_SOUND(b);
  expect_as_alone(b, others);
  ASSERT_FALSE(b.last.at(id).error) << b.last.at(id).error->what();
  EXPECT_EQ(b.answers[id], alone(large));
}

/** Also where the first one is replayed after a step that failed. */
TEST(Engine, ABroughtCacheThatCannotGiveWayPassesWhoIsReplayed) {
  Bench b({.max_sequences = 2, .memory_bytes = 1000});
  const Request large{.tokens = prompt_of(100), .max_tokens = 60}, small{.tokens = prompt_of(5), .max_tokens = 4};  // 650 and 46 bytes
  const auto first = b.submit(large), second = b.submit(small);
  b.runner.step_fails = [&, failed = false](const StepPlan&) mutable {
    if (std::exchange(failed, true)) return false;
    return true;
  };
  b.step();
  EXPECT_EQ(b.engine->running(), 0);
  const auto others = submit_limited(b);
  b.drain();
  EXPECT_SOUND(b);
  expect_as_alone(b, others);
  ASSERT_FALSE(b.last.at(first).error) << b.last.at(first).error->what();
  EXPECT_EQ(b.answers[first], alone(large));
  EXPECT_EQ(b.answers[second], alone(small));
}

/** An answer without a limit over a cache that cannot be computed again: those give way that can. */
TEST(Engine, WhatCannotBeComputedAgainIsNotPreempted) {
  Bench b({.max_sequences = 3, .memory_bytes = 2400});
  const auto cache = b.runner.reserve(60, {});
  b.runner.caches.at(cache).tokens = prompt_of(60);
  const Request limitless{.tokens = prompt_of(20, 3), .max_tokens = -1}, short_one{.tokens = prompt_of(20, 4), .max_tokens = 90};
  const auto other = b.submit(limitless);
  const auto growing = b.submit({.tokens = {5}, .max_tokens = -1, .cache = cache});
  const auto third = b.submit(short_one);
  while (b.answers[growing].size() < 400) {
    ASSERT_FALSE(b.last.contains(growing)) << b.last.at(growing).error->what();
    b.step();
  }
  EXPECT_FALSE(b.last.contains(other));
  b.engine->cancel(growing);
  while (b.answers[other].size() < 150) b.step();
  b.engine->cancel(other);
  b.drain();
  EXPECT_SOUND(b);
  auto wanted = limitless;
  wanted.max_tokens = static_cast<int>(b.answers[other].size());
  EXPECT_EQ(b.answers[other], alone(wanted));
  EXPECT_EQ(b.answers[third], alone(short_one));
  wanted = {.tokens = {5}, .max_tokens = static_cast<int>(b.answers[growing].size()), .cache_tokens = prompt_of(60)};
  EXPECT_EQ(b.answers[growing], alone(wanted));
}

/** Alone, beside a cache that waits and cannot give way: it lets that one end, and goes on. */
TEST(Engine, AnAnswerThatGrowsGivesWayToACacheThatCannot) {
  Bench b({.max_sequences = 1, .memory_bytes = 1000});
  Request r{.tokens = prompt_of(20), .max_tokens = -1};
  const auto growing = b.submit(r);
  b.step();
  const auto waits = limited(b, 60, 1, 65);
  const auto second = b.submit(waits);
  while (b.answers[growing].size() < 200) {
    ASSERT_FALSE(b.last.contains(growing)) << b.last.at(growing).error->what();
    b.step();
  }
  EXPECT_EQ(b.answers[second], alone(waits));
  b.engine->cancel(growing);
  b.drain();
  EXPECT_SOUND(b);
  r.max_tokens = static_cast<int>(b.answers[growing].size());
  EXPECT_EQ(b.answers[growing], alone(r));
}

}  // namespace
}  // namespace mlxlm::tests
