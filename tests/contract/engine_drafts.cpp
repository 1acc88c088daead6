// Drafts as part of steps: counts, ends in the middle of what was right, failures, and caches that are quantized at the same token as
// alone.
#include <algorithm>
#include <atomic>
#include <thread>

#include <gtest/gtest.h>

#include "contract/scripted_runner.h"
#include "engine/async_mask.h"

namespace mlxlm::tests {
namespace {

#define EXPECT_SOUND(b) EXPECT_TRUE((b).violations.empty()) << (b).violations.front()

/** Guesses of which the first `right` are what the sequence will say. */
auto guesses(int count, int right) {
  return [=](const DraftWanted& w, const Sampling& sampling) {
    std::vector<int> tokens(w.tokens.begin(), w.tokens.end()), draft;
    for (int i = 0; i < std::min(count, w.most); ++i) {
      const int token = scripted_token(tokens, sampling);
      draft.push_back(i < right ? token : (token + 1) % 97);
      tokens.push_back(draft.back());
    }
    return draft;
  };
}

Request drafting(int prompt, int answer, int most = 4) {
  return {.tokens = prompt_of(prompt), .max_tokens = answer, .drafts = {.model_tokens = most}};
}

TEST(Drafts, AreTokensOfTheRow) {
  for (const int right : {0, 1, 3, 4}) {
    Bench b;
    b.runner.guess = guesses(4, right);
    const auto r = drafting(10, 21);
    const auto id = b.submit(r);
    const int steps = b.drain();
    EXPECT_SOUND(b);
    EXPECT_EQ(b.answers[id], alone(r));
    EXPECT_EQ(b.last.at(id).finish, Finish::length);
    EXPECT_EQ(steps, 1 + (20 + right) / (right + 1)) << right;
    const auto& row = b.runner.plans[1].rows[0];
    EXPECT_EQ(row.tokens.size(), 1u);
    EXPECT_EQ(row.draft.size(), 4u);
    EXPECT_EQ(row.wanted_rows, 5);
    EXPECT_EQ(b.runner.plans[1].tokens(), 5);
    EXPECT_EQ(b.engine->counters().generated_tokens, 21);
    EXPECT_EQ(b.engine->counters().accepted_tokens, 21 - steps);
    EXPECT_TRUE(b.runner.caches.empty());
  }
}

TEST(Drafts, AreNeverLongerThanWhatMayCome) {
  Bench b({.max_context_tokens = 30});
  b.runner.guess = guesses(100, 100);
  const auto a = b.submit(drafting(10, 7, 50)), full = b.submit(drafting(10, 100, 50)), one = b.submit(drafting(10, 1, 50));
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(b.answers[a].size(), 7u);
  EXPECT_EQ(b.answers[full].size(), 20u);
  EXPECT_EQ(b.answers[one].size(), 1u);
  for (const auto& plan : b.runner.plans) {
    for (const auto& row : plan.rows) EXPECT_LE(row.draft.size(), row.sequence == a ? 5u : 18u);
  }
}

TEST(Drafts, AStopInsideWhatWasRight) {
  for (int at = 1; at < 9; ++at) {
    Bench b;
    b.runner.guess = guesses(4, 4);
    auto r = drafting(10, 50);
    const auto whole = alone(r);
    r.stop = {{whole[at - 1], whole[at]}};
    const auto wanted = alone(r);
    r.keep_cache = true;
    const auto id = b.submit(r);
    b.handed_over = 0;
    while (b.engine->has_work()) {
      const auto report = b.engine->step();
      for (const auto& e : report.events) {
        b.answers[id].push_back(e.chosen->token);
        if (e.finish != Finish::none) b.last.insert_or_assign(id, e);
      }
    }
    EXPECT_EQ(b.answers[id], wanted);
    const auto& last = b.last.at(id);
    EXPECT_EQ(last.finish, Finish::stop);
    // The cache holds what was told and nothing else, with or without the last token.
    auto told = r.tokens;
    told.insert(told.end(), wanted.begin(), wanted.end());
    ASSERT_LE(last.cache_tokens.size(), told.size());
    EXPECT_GE(last.cache_tokens.size() + 1, told.size());
    EXPECT_TRUE(std::equal(last.cache_tokens.begin(), last.cache_tokens.end(), told.begin()));
    EXPECT_EQ(b.runner.caches.at(last.cache).tokens, last.cache_tokens);
    EXPECT_EQ(b.runner.bad_keeps, 0);
    b.runner.free(last.cache);
  }
}

TEST(Drafts, CancelBeforeWithinAndAfterAStep) {
  for (const bool within : {false, true}) {
    for (int at = 1; at < 6; ++at) {
      Bench b({.prefix_cache_bytes = 1000});
      b.runner.guess = guesses(4, 2);
      const auto r = drafting(10, 50);
      const auto id = b.submit(r), other = b.submit(drafting(3, 20));
      int step = 0;
      b.runner.before_run = [&](const StepPlan&) {
        if (within && step == at) b.engine->cancel(id);
      };
      for (; step < at + 1; ++step) {
        if (!within && step == at) b.engine->cancel(id);
        b.step();
      }
      b.drain();
      EXPECT_SOUND(b);
      EXPECT_EQ(b.last.at(id).finish, Finish::cancelled);
      EXPECT_EQ(b.ends[id], 1);
      const auto wanted = alone(r);
      EXPECT_TRUE(std::equal(b.answers[id].begin(), b.answers[id].end(), wanted.begin()));
      EXPECT_EQ(b.answers[other], alone(drafting(3, 20)));
    }
  }
}

TEST(Drafts, FailuresCostTheRequestAtMost) {
  Bench b;
  b.runner.guess = guesses(4, 2);
  b.runner.keep_fails = true;
  const auto id = b.submit(drafting(10, 50)), plain = b.submit({.tokens = prompt_of(5), .max_tokens = 9});
  b.drain();
  EXPECT_SOUND(b);
  EXPECT_EQ(b.last.at(id).finish, Finish::failed);
  EXPECT_EQ(b.last.at(id).error->code(), Code::out_of_memory);
  EXPECT_EQ(b.answers[plain].size(), 9u);

  // No draft can be had: the answer comes without.
  Bench c;
  c.runner.guess = [](const DraftWanted&, const Sampling&) -> std::vector<int> { throw std::runtime_error("scripted"); };
  const auto slow = c.submit(drafting(10, 9));
  c.drain();
  EXPECT_EQ(c.answers[slow], alone(drafting(10, 9)));

  // A step that fails once is computed again.
  Bench d;
  d.runner.guess = guesses(4, 3);
  int steps = 0;
  d.runner.step_fails = [&](const StepPlan&) { return ++steps == 3; };
  const auto first = d.submit(drafting(10, 30)), second = d.submit(drafting(7, 30));
  d.drain();
  EXPECT_SOUND(d);
  EXPECT_EQ(d.answers[first], alone(drafting(10, 30)));
  EXPECT_EQ(d.answers[second], alone(drafting(7, 30)));
}

TEST(Drafts, AResultThatContradictsTheDraftIsAFailedStep) {
  const auto with = [](const std::function<void(StepResult&)>& mangle) {
    Bench b;
    b.runner.guess = guesses(4, 4);
    b.runner.mangle = [&](StepResult& result) {
      if (!result.rows.empty() && result.rows[0].chosen.size() == 5) mangle(result);
    };
    const auto id = b.submit(drafting(10, 30));
    b.drain();
    EXPECT_SOUND(b);
    EXPECT_EQ(b.engine->counters().failed_steps, 1);
    return b.last.at(id).finish;
  };
  EXPECT_EQ(with([](StepResult& r) { r.rows[0].chosen.clear(); }), Finish::failed);
  EXPECT_EQ(with([](StepResult& r) { r.rows[0].chosen.push_back({.token = 1}); }), Finish::failed);
  EXPECT_EQ(with([](StepResult& r) { r.rows[0].chosen[1].token += 1; }), Finish::failed);
  EXPECT_EQ(with([](StepResult& r) { r.rows[0].chosen[4].token = -1; }), Finish::failed);
}

TEST(Drafts, ShareWhatAStepMayCheck) {
  Bench b({.step_tokens = 16, .draft_tokens = 12});
  b.runner.guess = guesses(50, 1);
  for (int i = 0; i < 4; ++i) b.submit({.tokens = prompt_of(3, i), .max_tokens = 40, .drafts = {.model_tokens = 50}});
  b.drain();
  EXPECT_SOUND(b);
  bool any = false;
  for (const auto& plan : b.runner.plans) {
    int drafts = 0;
    for (const auto& row : plan.rows) drafts += static_cast<int>(row.draft.size());
    EXPECT_LE(drafts, 12);
    EXPECT_TRUE(plan.rows.size() < 4 || plan.tokens() <= 16);
    any = any || drafts > 0;
  }
  EXPECT_TRUE(any);
  Bench none({.draft_tokens = 0});
  none.runner.guess = guesses(4, 4);
  none.submit(drafting(4, 9));
  none.drain();
  EXPECT_EQ(none.engine->counters().drafted_tokens, 0);
}

TEST(Drafts, RefusesWhatCannotBe) {
  Bench b;
  const Request r{.tokens = {1}};
  const auto refused = [&](Drafts drafts, int kv_bits = 0, int start = 0) {
    auto one = r;
    one.drafts = drafts;
    one.kv_bits = kv_bits;
    one.quantized_kv_start = start;
    EXPECT_THROW(b.submit(one), Error);
  };
  refused({.model_tokens = 3});  // without a draft model
  b.runner.guess = guesses(4, 4);
  refused({.ngram_tokens = -1});
  refused({.ngram_tokens = 257});
  refused({.model_tokens = 257});
  refused({.ngram_tokens = 2, .model_tokens = 2});
  refused({}, 99);
  refused({}, 4, -1);
  EXPECT_THROW(Engine(b.runner, {.draft_tokens = -1}), Error);
  EXPECT_FALSE(b.engine->has_work());
}

TEST(QuantizedCaches, NoStepCrossesTheTokenWhereTheyAreConverted) {
  struct Case {
    int prompt, start, wanted;
  };
  // Chunks of 16 alone, the last token of the prompt by itself.
  for (const auto& [prompt, start, wanted] :
       {Case{10, 0, 9}, {10, 9, 9}, {10, 10, 10}, {10, 15, 15}, {40, 0, 16}, {40, 17, 32}, {40, 33, 39}, {1, 0, 1}}) {
    Bench b({.prefill_tokens = 7, .limited_chunk_tokens = 16});
    b.runner.guess = guesses(6, 6);
    auto r = drafting(prompt, 20, 6);
    r.kv_bits = 4;
    r.quantized_kv_start = start;
    const auto id = b.submit(r);
    bool reached = false;
    b.runner.before_run = [&](const StepPlan& plan) {
      for (const auto& row : plan.rows) {
        const auto& c = b.runner.caches.at(row.cache);
        EXPECT_EQ(c.options.quantized_from_tokens, wanted);
        const int before = static_cast<int>(c.tokens.size()), after = before + static_cast<int>(row.tokens.size() + row.draft.size());
        EXPECT_TRUE(before >= wanted || after <= wanted) << before << " to " << after;
        reached = reached || after == wanted;
      }
    };
    b.drain();
    EXPECT_SOUND(b);
    EXPECT_TRUE(reached);
    EXPECT_EQ(b.answers[id], alone(r));
  }
}

TEST(QuantizedCaches, ServeOnlyPromptsThatWouldHaveTheSame) {
  Bench b({.limited_chunk_tokens = 16, .prefix_cache_bytes = 10000});
  const auto ask = [&](int length, int bits, int start) {
    Request r{.tokens = prompt_of(length), .max_tokens = 3, .kv_bits = bits, .quantized_kv_start = start};
    const auto id = b.submit(r);
    b.drain();
    EXPECT_EQ(b.answers[id], alone(r));
    return b.last.at(id).reused_tokens;
  };
  EXPECT_EQ(ask(40, 4, 0), 0);
  EXPECT_GT(ask(60, 4, 0), 30);  // both converted at 16
  EXPECT_EQ(ask(60, 0, 0), 0);
  EXPECT_EQ(ask(60, 8, 0), 0);
  EXPECT_EQ(ask(10, 4, 0), 0);   // at 9
  EXPECT_EQ(ask(60, 4, 20), 0);  // at 32
  EXPECT_SOUND(b);
}

TEST(MemoryReport, AddsUp) {
  Bench b({.max_sequences = 2, .memory_bytes = 100000, .prefix_cache_bytes = 5000});
  b.submit({.tokens = prompt_of(30), .max_tokens = 2});
  b.drain();
  for (int i = 0; i < 3; ++i) b.submit({.tokens = prompt_of(20, i + 1), .max_tokens = 10});
  b.step();
  b.step();
  const auto m = b.engine->memory();
  const auto s = b.engine->snapshot();
  EXPECT_EQ(m.stored_bytes, s.stored_bytes);
  EXPECT_GT(m.stored_bytes, 0);
  EXPECT_EQ(m.stored_budget_bytes, 5000);
  EXPECT_EQ(m.limit_bytes, 100000);
  EXPECT_EQ(m.reserved_bytes, s.reserved_bytes);
  ASSERT_EQ(m.requests.size(), 3u);
  int64_t held = 0, reserved = 0;
  int running = 0;
  for (const auto& r : m.requests) {
    held += r.held_bytes;
    reserved += r.reserved_bytes;
    running += r.running;
    EXPECT_LE(r.held_bytes, r.reserved_bytes);
    EXPECT_EQ(r.tokens, r.running ? 21 : 0);
  }
  EXPECT_EQ(running, 2);
  EXPECT_EQ(held, m.held_bytes);
  EXPECT_EQ(reserved, m.reserved_bytes);
  b.drain();
  EXPECT_EQ(b.engine->memory().held_bytes + b.engine->memory().reserved_bytes, 0);
}

TEST(AsyncMask, IsAskedForEachTokenOnAnotherThread) {
  std::vector<std::size_t> lengths;
  std::vector<std::thread::id> threads;
  std::atomic<int> at_once = 0;
  {
    AsyncMask mask([&](std::span<const int> answer) {
      EXPECT_EQ(++at_once, 1);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      lengths.push_back(answer.size());
      threads.push_back(std::this_thread::get_id());
      if (answer.size() == 4) throw Error(Code::bad_request, "grammar", "no token fits");
      --at_once;
      return std::vector<uint32_t>{static_cast<uint32_t>(answer.size())};
    });
    for (uint32_t i = 0; i < 4; ++i) {
      EXPECT_EQ(mask.allowed()[0], i);
      EXPECT_EQ(mask.allowed()[0], i);  // the same until a token comes
      mask.accept(static_cast<int>(i));
    }
    EXPECT_THROW(mask.allowed(), Error);
  }
  EXPECT_EQ(lengths, (std::vector<std::size_t>{0, 1, 2, 3, 4}));
  for (const auto& t : threads) EXPECT_NE(t, std::this_thread::get_id());
  // Whoever leaves early waits for the provider.
  std::atomic<bool> done = false;
  {
    AsyncMask early([&](auto) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      done = true;
      return std::vector<uint32_t>{};
    });
  }
  EXPECT_TRUE(done);
}

}  // namespace
}  // namespace mlxlm::tests
