// What the engine promises whoever submits requests, whatever the runner does.
#include <gtest/gtest.h>
#include <algorithm>
#include <utility>

#include "contract/scripted_runner.h"

namespace mlxlm::tests {
namespace {

#define EXPECT_SOUND(b) EXPECT_TRUE((b).violations.empty()) << (b).violations.front()

TEST(Engine, AloneAndTogetherAreTheSame) {
  Bench b;
  std::vector<Request> requests;
  for (int i = 0; i < 20; ++i)
    requests.push_back({.tokens = prompt_of(1 + 37 * i, i), .max_tokens = 1 + i, .sampling = {.temperature = 1, .seed = 5u + i}});
  std::vector<SequenceId> ids;
  for (const auto& r : requests) ids.push_back(b.submit(r));
  b.drain();
  EXPECT_SOUND(b);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(b.answers[ids[i]], alone(requests[i])) << i;
    EXPECT_EQ(b.ends[ids[i]], 1);
    EXPECT_EQ(b.last.at(ids[i]).finish, Finish::length);
  }
  EXPECT_TRUE(b.runner.caches.empty());
}

TEST(Engine, NothingToDo) {
  Bench b;
  EXPECT_EQ(b.step().outcome, Outcome::no_work);
  EXPECT_TRUE(b.runner.plans.empty());
  b.submit({.tokens = {1}, .max_tokens = 1});
  EXPECT_EQ(b.step().outcome, Outcome::ran);
  EXPECT_EQ(b.step().outcome, Outcome::no_work);
}

TEST(Engine, StopsAtTokenSequences) {
  Bench b;
  Request r{.tokens = prompt_of(5), .max_tokens = 50};
  const auto whole = alone(r);
  r.stop = {{}, {whole[10], whole[11]}, {whole[3], whole[5]}};
  const auto id = b.submit(r);
  b.drain();
  EXPECT_EQ(b.answers[id], std::vector<int>(whole.begin(), whole.begin() + 12));
  EXPECT_EQ(b.last.at(id).finish, Finish::stop);
  // Tokens of the prompt do not count.
  Request edge{.tokens = {1, 2, whole[0]}, .max_tokens = 3, .stop = {{whole[0], alone({.tokens = {1, 2, whole[0]}, .max_tokens = 1})[0]}}};
  const auto other = b.submit(edge);
  b.drain();
  EXPECT_EQ(b.answers[other].size(), 3u);
}

TEST(Engine, RefusesWhatCannotBeRun) {
  Bench b({.max_context_tokens = 100, .memory_bytes = 1000});
  const auto refused = [&](Request r) {
    try {
      b.submit(std::move(r));
    } catch (const Error& e) {
      return std::string(code_name(e.code()));
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refused({}), "bad_request");
  EXPECT_EQ(refused({.tokens = {1}, .max_tokens = 0}), "bad_request");
  EXPECT_EQ(refused({.tokens = {1}, .max_tokens = -2}), "bad_request");
  EXPECT_EQ(refused({.tokens = {5000}}), "bad_request");
  EXPECT_EQ(refused({.tokens = {-1}}), "bad_request");
  EXPECT_EQ(refused({.tokens = {1}, .sampling = {.top_k = 5000}}), "bad_request");
  EXPECT_EQ(refused({.tokens = {1}, .max_kv_size_tokens = -1}), "bad_request");
  EXPECT_EQ(refused({.tokens = prompt_of(100)}), "bad_request");
  EXPECT_EQ(refused({.tokens = {1}, .cache_tokens = {1}}), "bad_request");
  EXPECT_EQ(refused({.tokens = {1}, .max_tokens = 500}), "out_of_memory");
  EXPECT_EQ(refused({.tokens = {1}, .max_tokens = 20}), "accepted");
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_THROW(Engine(b.runner, {.max_sequences = 0}), Error);
  EXPECT_THROW(Engine(b.runner, {.pace = 0.5}), Error);
}

TEST(Engine, ARefusalNamesBothFigures) {
  Bench b({.memory_bytes = 2'000'000});
  try {
    b.submit({.tokens = {1}, .max_tokens = 1'000'000});
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::out_of_memory);
    EXPECT_NE(std::string(e.what()).find("0.004 GB"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("0.002 GB"), std::string::npos) << e.what();
  }
}

TEST(Engine, DefersWhatDoesNotFitNow) {
  Bench b({.memory_bytes = 1000});  // (1000 - 10) / 4: two requests of 110 tokens
  std::vector<SequenceId> ids;
  for (int i = 0; i < 5; ++i) ids.push_back(b.submit({.tokens = prompt_of(60, i), .max_tokens = 50}));
  b.step();
  EXPECT_EQ(b.engine->running(), 2);
  EXPECT_EQ(b.engine->waiting(), 3);
  b.drain();
  EXPECT_SOUND(b);
  for (const auto id : ids) EXPECT_EQ(b.answers[id].size(), 50u);
}

TEST(Engine, NobodyOvertakesALargeRequest) {
  Bench b({.memory_bytes = 1000});
  b.submit({.tokens = prompt_of(10), .max_tokens = 100});
  b.step();
  const auto large = b.submit({.tokens = prompt_of(20), .max_tokens = 200});
  const auto small = b.submit({.tokens = prompt_of(5), .max_tokens = 5});
  while (!b.ends.contains(small)) b.step();
  EXPECT_FALSE(b.answers[large].empty());
  b.drain();
  EXPECT_SOUND(b);
}

TEST(Engine, DecodingRowsComeFirstAndPromptsFillTheBudget) {
  Bench b({.prefill_tokens = 64, .step_tokens = 20});
  for (int i = 0; i < 4; ++i) b.submit({.tokens = prompt_of(3, i), .max_tokens = 200});
  b.step();
  b.step();
  b.submit({.tokens = prompt_of(100), .max_tokens = 5});
  b.submit({.tokens = prompt_of(7, 9), .max_tokens = 5});
  const auto from = b.runner.plans.size();
  for (int i = 0; i < 7; ++i) b.step();
  for (std::size_t i = from; i < b.runner.plans.size(); ++i) {
    const auto& rows = b.runner.plans[i].rows;
    ASSERT_GE(rows.size(), 4u);
    for (int k = 0; k < 4; ++k) EXPECT_EQ(rows[k].tokens.size(), 1u) << "plan " << i;
    EXPECT_LE(b.runner.plans[i].tokens(), 20);
  }
  EXPECT_EQ(b.runner.plans[from].tokens(), 20);
  EXPECT_SOUND(b);
}

TEST(Engine, ThePromptBudgetFollowsTheTimeThatStepsTake) {
  Pacer pacer(2.0, 8, 512);
  EXPECT_EQ(pacer.prompt_tokens(0, 0), 512);
  EXPECT_EQ(pacer.prompt_tokens(16, 0), 32);  // nothing known: about the time of the rows once more
  for (int i = 0; i < 50; ++i) pacer.observe(16, 0, 0, 0.060);
  for (int i = 0; i < 50; ++i) pacer.observe(16, 32, 0, 0.060 + 32 * 0.001);
  EXPECT_NEAR(pacer.prompt_tokens(16, 0), 60, 2);
  EXPECT_NEAR(pacer.prompt_tokens(32, 0), 60, 2);  // at least what fewer rows take
  EXPECT_NEAR(pacer.prompt_tokens(8, 0), 30, 2);
  for (int i = 0; i < 50; ++i) pacer.observe(16, 60, 0, 0.060 + 60 * 0.1);
  EXPECT_EQ(pacer.prompt_tokens(16, 0), 8);
  pacer.observe(16, 0, 0, -1);
  pacer.observe(16, 5, 0, std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(pacer.prompt_tokens(16, 0), 8);
}

/** A machine whose prompt tokens take longer the more come before them. */
struct PacedMachine {
  Pacer pacer{2.0, 4, 512};
  double decode_s = 0.030, slower = 1;
  double step(int tokens, int held) const { return slower * (decode_s + tokens * 0.0009 * (1 + held / 1500.)); }
  /** The longest step of a prompt from `at` to `end`. */
  double prompt(int at, int end) {
    double longest_s = 0;
    for (int steps = 0; at < end; ++steps) {
      const int tokens = steps % 33 == 32 ? 0 : std::min(end - at, pacer.prompt_tokens(16, at));
      const double seconds = step(tokens, at + tokens / 2);
      pacer.observe(16, tokens, at + tokens / 2., seconds);
      longest_s = std::max(longest_s, seconds);
      at += tokens;
    }
    return longest_s;
  }
  void decode(int steps) {
    for (int i = 0; i < steps; ++i) pacer.observe(16, 0, 0, slower * decode_s);
  }
};

TEST(Pacer, APromptThatGoesOnFromALongPrefixTakesNoLongerSteps) {
  PacedMachine m;
  m.decode(20);
  for (int i = 0; i < 20; ++i) m.prompt(0, 300);
  EXPECT_LE(m.prompt(4000, 4096), 2.4 * m.decode_s) << "guessed before it was seen";
  m.decode(20);
  EXPECT_LE(m.prompt(0, 4096), 2.2 * m.decode_s);
  EXPECT_LE(m.prompt(0, 100), 2.2 * m.decode_s) << "back at the beginning";
  EXPECT_LE(m.prompt(4000, 4096), 2.2 * m.decode_s);
  EXPECT_GE(m.pacer.prompt_tokens(16, 0), 25) << "what there is, is used";
}

TEST(Pacer, StepsThatWereDisturbedMakeNoRoomForPrompts) {
  PacedMachine m;
  m.decode(20);
  m.prompt(0, 1000);
  const int before = m.pacer.prompt_tokens(16, 1000);
  for (int i = 0; i < 3; ++i) m.pacer.observe(16, 0, 0, 3 * m.decode_s);
  EXPECT_EQ(m.pacer.prompt_tokens(16, 1000), before);
  m.pacer.observe(16, before, 1000, 4 * m.decode_s);
  EXPECT_LT(m.pacer.prompt_tokens(16, 1000), before * 0.6) << "a slow machine is believed at once";
  m.slower = 1.5;  // for good: followed soon, on both sides
  m.decode(12);
  m.prompt(0, 1000);
  EXPECT_NEAR(m.pacer.prompt_tokens(16, 0), 33, 5);
}

TEST(Engine, DecodingHasAStepOfItsOwnNowAndThen) {
  Bench b({.prefill_tokens = 4, .least_prefill_tokens = 1});
  b.submit({.tokens = prompt_of(3), .max_tokens = 400});
  b.step();
  b.submit({.tokens = prompt_of(800, 1), .max_tokens = 1});
  int longest = 0, shared = 0;
  while (b.engine->has_work()) {
    const auto report = b.step();
    shared = report.prompt_tokens > 0 ? shared + 1 : 0;
    longest = std::max(longest, shared);
  }
  EXPECT_LE(longest, 32);
  EXPECT_GT(longest, 16);
}

TEST(Engine, CancelAnywhere) {
  // Waiting, in prefill, decoding, at the end, twice, while its step runs.
  for (int at = 0; at < 40; ++at) {
    for (const bool inside : {false, true}) {
      Bench b({.max_sequences = 3, .prefill_tokens = 8, .prefix_cache_bytes = 500});
      std::vector<Request> requests;
      std::vector<SequenceId> ids;
      for (int i = 0; i < 5; ++i) requests.push_back({.tokens = prompt_of(20, i), .max_tokens = 10});
      for (const auto& r : requests) ids.push_back(b.submit(r));
      const auto victim = ids[2];
      int step = 0;
      b.runner.before_run = [&](const StepPlan&) {
        if (inside && step == at) b.engine->cancel(victim);
      };
      while (b.engine->has_work()) {
        if (!inside && step == at) {
          b.engine->cancel(victim);
          b.engine->cancel(victim);
        }
        b.step();
        ++step;
      }
      b.step();  // an event of the last moment
      EXPECT_SOUND(b);
      EXPECT_FALSE(b.engine->cancel(victim));
      for (std::size_t i = 0; i < ids.size(); ++i) {
        EXPECT_EQ(b.ends[ids[i]], 1);
        if (ids[i] != victim) {
          EXPECT_EQ(b.answers[ids[i]], alone(requests[i]));
        }
      }
      const auto finish = b.last.at(victim).finish;
      EXPECT_TRUE(finish == Finish::cancelled || finish == Finish::length);
    }
  }
  Bench b;
  EXPECT_FALSE(b.engine->cancel(7));
}

TEST(Engine, OneRowsFailureEndsThatRequestOnly) {
  Bench b;
  std::vector<Request> requests;
  std::vector<SequenceId> ids;
  for (int i = 0; i < 4; ++i) ids.push_back(b.submit(requests.emplace_back(Request{.tokens = prompt_of(10, i), .max_tokens = 20})));
  b.runner.row_fails = [&](const PlannedRow& row) { return row.sequence == ids[1] && b.answers[ids[1]].size() == 7; };
  bool reported = false;
  while (b.engine->has_work()) reported |= b.step().outcome == Outcome::request_failed;
  EXPECT_TRUE(reported);
  EXPECT_SOUND(b);
  EXPECT_EQ(b.last.at(ids[1]).finish, Finish::failed);
  EXPECT_EQ(b.last.at(ids[1]).error->code(), Code::internal);
  for (const int i : {0, 2, 3}) EXPECT_EQ(b.answers[ids[i]], alone(requests[i]));
}

TEST(Engine, AStepThatFailsOnceCostsNobodyAnything) {
  for (int at = 0; at < 30; ++at) {
    Bench b({.prefill_tokens = 16});
    std::vector<Request> requests;
    std::vector<SequenceId> ids;
    for (int i = 0; i < 4; ++i) ids.push_back(b.submit(requests.emplace_back(Request{.tokens = prompt_of(10 + i, i), .max_tokens = 20})));
    int step = 0;
    b.runner.step_fails = [&](const StepPlan& plan) { return step++ == at && plan.rows.size() > 1; };
    b.drain();
    EXPECT_SOUND(b);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(b.answers[ids[i]], alone(requests[i])) << "step " << at;
  }
}

TEST(Engine, TheRequestThatBreaksStepsIsFoundAndTheOthersGoOn) {
  Bench b({.prefill_tokens = 16, .prefix_cache_bytes = 10000});
  std::vector<Request> requests;
  std::vector<SequenceId> ids;
  for (int i = 0; i < 6; ++i) ids.push_back(b.submit(requests.emplace_back(Request{.tokens = prompt_of(10, i), .max_tokens = 20})));
  b.runner.step_fails = [&](const StepPlan& plan) {
    return std::ranges::any_of(plan.rows, [&](const auto& row) { return row.sequence == ids[2] && b.answers[ids[2]].size() >= 5; });
  };
  bool whole = false;
  while (b.engine->has_work()) whole |= b.step().outcome == Outcome::engine_failed;
  EXPECT_TRUE(whole);
  EXPECT_SOUND(b);
  EXPECT_EQ(b.last.at(ids[2]).finish, Finish::failed);
  EXPECT_EQ(b.answers[ids[2]].size(), 5u);
  for (const int i : {0, 1, 3, 4, 5}) {
    EXPECT_EQ(b.answers[ids[i]], alone(requests[i]));
    EXPECT_EQ(b.ends[ids[i]], 1);
  }
}

TEST(Engine, ADeadDeviceFailsEveryRequestAndHangsNone) {
  Bench b;
  std::vector<SequenceId> ids;
  for (int i = 0; i < 10; ++i) ids.push_back(b.submit({.tokens = prompt_of(10, i), .max_tokens = 20}));
  b.runner.step_fails = [](const StepPlan&) { return true; };
  EXPECT_LT(b.drain(1000), 100);
  EXPECT_SOUND(b);
  for (const auto id : ids) EXPECT_EQ(b.last.at(id).finish, Finish::failed);
  b.runner.step_fails = nullptr;  // and comes back
  const auto id = b.submit({.tokens = prompt_of(10), .max_tokens = 5});
  b.drain();
  EXPECT_EQ(b.answers[id].size(), 5u);
}

TEST(Engine, AResultThatContradictsThePlanIsAFailedStep) {
  const std::vector<std::function<void(StepResult&)>> mangles{
      [](StepResult& r) { r.rows.pop_back(); },
      [](StepResult& r) { r.rows.push_back(r.rows.front()); },
      [](StepResult& r) { r.rows.front().sequence += 1000; },
      [](StepResult& r) { r.rows.back().chosen.clear(); },
      [](StepResult& r) { r.rows.back().chosen.push_back({.token = 1}); },
      [](StepResult& r) {
        for (auto& row : r.rows) row.chosen.assign(row.chosen.size(), {.token = -1});
      },
  };
  for (const auto& mangle : mangles) {
    Bench b;
    std::vector<Request> requests;
    std::vector<SequenceId> ids;
    for (int i = 0; i < 3; ++i) ids.push_back(b.submit(requests.emplace_back(Request{.tokens = prompt_of(4, i), .max_tokens = 6})));
    int step = 0;
    b.runner.mangle = [&](StepResult& r) {
      if (step++ == 3) mangle(r);
    };
    b.drain();
    EXPECT_SOUND(b);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(b.answers[ids[i]], alone(requests[i]));
  }
}

TEST(Engine, MemoryThatCannotBeHadAtAdmission) {
  Bench b({.prefix_cache_bytes = 10000});
  b.runner.reserve_fails = true;
  const auto id = b.submit({.tokens = prompt_of(10), .max_tokens = 5});
  EXPECT_EQ(b.step().outcome, Outcome::request_failed);
  EXPECT_EQ(b.last.at(id).error->code(), Code::out_of_memory);
  b.runner.reserve_fails = false;
  b.submit({.tokens = prompt_of(10), .max_tokens = 5});
  b.drain();
  b.runner.copy_fails = true;  // the hit cannot be copied
  const auto other = b.submit({.tokens = prompt_of(12), .max_tokens = 5});
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(b.last.at(other).finish, Finish::failed);
}

/** A store of one prefix that counts how often it is read. */
struct ScriptedStore final : PrefixStore {
  ScriptedStore(ScriptedRunner& runner, std::vector<int> tokens) : runner(runner), tokens(std::move(tokens)) {}
  Found find(std::span<const int> prompt, uint64_t) noexcept override {
    const auto usable = prompt.first(prompt.size() - 1);
    const auto shared = std::ranges::mismatch(tokens, usable).in1 - tokens.begin();
    return {static_cast<int>(shared), runner.cost_bytes(static_cast<int64_t>(tokens.size()), {})};
  }
  Loaded load(std::span<const int>, uint64_t) noexcept override {
    ++reads;
    if (gone) return {};
    runner.caches[++runner.last] = {tokens};
    return {runner.last, tokens};
  }
  void save(CacheId cache, std::span<const int>, uint64_t) noexcept override {
    ++saves;
    unwritten += runner.info(cache).bytes;
  }
  int64_t unwritten_bytes() noexcept override { return unwritten; }
  void shrink_unwritten(int64_t bytes) noexcept override {
    given_up += unwritten > bytes;
    unwritten = std::min(unwritten, bytes);
  }

  ScriptedRunner& runner;
  int saves = 0, given_up = 0;
  int64_t unwritten = 0;
  std::vector<int> tokens;
  bool gone = false;
  int reads = 0;
};

/** A prefix of 40 tokens takes 170 bytes, and as much again while it is on its way to a disk. */
TEST(Engine, WhatIsNotYetWrittenCounts) {
  const Request first{.tokens = prompt_of(41), .max_tokens = 1, .store_at_end = false, .boundaries = {40}};
  const auto reserved = 10 + 4 * 42, stored = 170;
  const auto run = [&](int64_t memory_bytes, auto&& check) {
    Bench b({.memory_bytes = memory_bytes, .prefix_cache_bytes = 400});
    ScriptedStore store(b.runner, {});
    b.engine->set_store(&store);
    b.submit(first);
    b.drain();
    check(b, store);
    EXPECT_SOUND(b);
    b.engine->set_store(nullptr);
  };
  run(reserved + 2 * stored, [&](Bench& b, ScriptedStore& store) {
    EXPECT_EQ(store.saves, 1);
    EXPECT_EQ(b.engine->memory().unwritten_bytes, stored);
    EXPECT_EQ(b.engine->memory().stored_bytes, stored);
    // Who comes next gets the room: what is not yet written gives way first.
    b.submit({.tokens = prompt_of(60, 7), .max_tokens = 20});
    b.step();
    EXPECT_EQ(b.engine->running(), 1);
    EXPECT_GT(store.given_up, 0);
    EXPECT_EQ(b.engine->memory().stored_bytes, stored);
    b.drain();
  });
  run(reserved + 2 * stored - 1, [&](Bench& b, ScriptedStore& store) {
    EXPECT_EQ(store.saves, 0) << "no room beside the prefix in memory";
    EXPECT_EQ(b.engine->memory().stored_bytes, stored);
  });
  run(0, [&](Bench& b, ScriptedStore& store) {  // a slow disk: never more than prefixes may take in memory
    for (int i = 1; i < 5; ++i) {
      auto next = first;
      next.tokens = prompt_of(41, i);
      b.submit(next);
      b.drain();
    }
    EXPECT_EQ(store.saves, 2);
    EXPECT_EQ(store.unwritten, 2 * stored);
  });
}

TEST(Engine, WhatTheDiskHasNotSeenIsSavedAtTheEnd) {
  Bench b({.memory_bytes = 400, .prefix_cache_bytes = 1000});
  ScriptedStore store(b.runner, {});
  b.engine->set_store(&store);
  b.submit({.tokens = prompt_of(41), .max_tokens = 1, .store_at_end = false, .boundaries = {40}});
  b.drain();
  EXPECT_EQ(store.saves, 0);
  b.engine.reset();
  EXPECT_EQ(store.saves, 1);
  EXPECT_TRUE(b.runner.caches.empty());
}

TEST(Engine, ADeferredPromptReadsTheStoreOnce) {
  for (const bool gone : {false, true}) {
    Bench b({.memory_bytes = 400, .prefix_cache_bytes = 10000});
    ScriptedStore store(b.runner, prompt_of(40, 1));
    store.gone = gone;
    const Request small{.tokens = prompt_of(10), .max_tokens = 20}, large{.tokens = prompt_of(50, 1), .max_tokens = 20};
    const auto first = b.submit(small);
    b.step();
    b.engine->set_store(&store);
    const auto second = b.submit(large);  // there is room for the stored prefix, and not for the prompt beside the first
    EXPECT_GT(b.drain(), 20);
    EXPECT_SOUND(b);
    EXPECT_EQ(store.reads, 1);
    EXPECT_EQ(b.answers[first], alone(small));
    EXPECT_EQ(b.answers[second], alone(large));
  }
}

TEST(Engine, AnswersWithoutALimitShareWhatThereIs) {
  Bench b({.memory_bytes = 2000});
  std::vector<Request> requests;
  std::vector<SequenceId> ids;
  for (int i = 0; i < 3; ++i) {
    Request r{.tokens = prompt_of(20, i), .max_tokens = 300 + i};
    const auto whole = alone(r);
    // Ends by a stop somewhere far: the only pair of tokens of its kind.
    r.max_tokens = -1;
    r.stop = {std::vector<int>(whole.end() - 6, whole.end())};
    requests.push_back(r);
    ids.push_back(b.submit(r));
  }
  const auto endless = b.submit({.tokens = prompt_of(20, 9), .max_tokens = -1});
  b.drain(20000);
  EXPECT_SOUND(b);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(b.answers[ids[i]], alone(requests[i]));
  EXPECT_EQ(b.last.at(endless).finish, Finish::failed);
  EXPECT_EQ(b.last.at(endless).error->code(), Code::out_of_memory);
}

TEST(Engine, TheContextEndsAnAnswer) {
  Bench b({.max_context_tokens = 30});
  const auto id = b.submit({.tokens = prompt_of(20), .max_tokens = -1});
  b.drain();
  EXPECT_EQ(b.answers[id].size(), 10u);
  EXPECT_EQ(b.last.at(id).finish, Finish::length);
}

TEST(Engine, TimeOfASharedStepIsDividedByTokens) {
  Bench b({.step_tokens = 11});
  b.submit({.tokens = prompt_of(4), .max_tokens = 3});
  b.step();  // a prompt
  const double one = b.engine->counters().prompt_s;
  EXPECT_GT(one, 0);
  EXPECT_EQ(b.engine->counters().decode_s, 0);
  b.submit({.tokens = prompt_of(10, 1), .max_tokens = 1});
  b.step();  // a decoding row and ten tokens of a prompt, in as much time
  EXPECT_NEAR(b.engine->counters().decode_s, one / 11, 1e-9);
  EXPECT_NEAR(b.engine->counters().prompt_s, one + one * 10 / 11, 1e-9);
  b.drain();
  EXPECT_EQ(b.engine->counters().generated_tokens, 4);
  EXPECT_EQ(b.engine->counters().decode_tokens, 2);
}

/** Caches that waiting requests have brought take memory, and give way before a request fails. */
TEST(Engine, MasksSeeEveryTokenOnceAndMayFail) {
  struct Counting : TokenMask {
    std::vector<int> seen;
    void accept(int token) override {
      if (seen.size() == 5) throw Error(Code::bad_request, "grammar", "no way on");
      seen.push_back(token);
    }
    std::span<const uint32_t> allowed() override { return {}; }
  };
  Bench b;
  auto mask = std::make_shared<Counting>();
  const auto id = b.submit({.tokens = prompt_of(3), .max_tokens = 20, .mask = mask});
  const Request other{.tokens = prompt_of(3, 1), .max_tokens = 20};
  const auto good = b.submit(other);
  int step = 0;
  b.runner.step_fails = [&](const StepPlan&) { return step++ == 3; };  // replayed tokens are not accepted again
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(mask->seen, std::vector<int>(b.answers[id].begin(), b.answers[id].begin() + 5));
  EXPECT_EQ(b.last.at(id).finish, Finish::failed);
  EXPECT_EQ(b.answers[good], alone(other));
}

TEST(Engine, ScheduleInsistsOnItsOtherHalf) {
  Bench b;
  b.submit({.tokens = prompt_of(3), .max_tokens = 3});
  const auto plan = b.engine->schedule();
  ASSERT_EQ(plan.rows.size(), 1u);
  EXPECT_THROW(b.engine->schedule(), Error);
  b.engine->commit(plan, b.runner.run(plan));
  EXPECT_EQ(b.engine->take_events().size(), 1u);
  b.drain();
  EXPECT_SOUND(b);
}

TEST(Engine, ProgressOfPrompts) {
  Bench b({.prefill_tokens = 10});
  const auto id = b.submit({.tokens = prompt_of(25), .max_tokens = 2});
  std::vector<int> processed;
  while (b.engine->has_work()) {
    for (const auto& e : b.step().events) {
      EXPECT_EQ(e.id, id);
      EXPECT_EQ(e.prompt_tokens, 25);
      processed.push_back(e.processed_tokens);
    }
  }
  EXPECT_EQ(processed, (std::vector<int>{10, 20, 25, 25}));
}

}  // namespace
}  // namespace mlxlm::tests
