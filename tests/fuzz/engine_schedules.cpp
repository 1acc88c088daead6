// Random arrivals, lengths, cancels, failures and limits over the scripted runner: every answer is what the request gives alone.
#include <chrono>
#include <random>

#include <gtest/gtest.h>

#include "contract/scripted_runner.h"

namespace mlxlm::tests {
namespace {

class Story {
 public:
  explicit Story(uint32_t seed) : random_(seed), bench_(limits()) {
    bench_.runner.trimmable = pick(0, 2) > 0;
    bench_.runner.shares = pick(0, 1);
    const bool failing = pick(0, 2) == 0;
    bench_.runner.step_fails = [this, failing](const StepPlan&) { return failing && pick(0, 30) == 0; };
    // Right for some tokens, then not; sometimes none; sometimes more than was wanted.
    bench_.runner.guess = [this](const DraftWanted& w, const Sampling& sampling) {
      std::vector<int> tokens(w.tokens.begin(), w.tokens.end()), draft;
      const int right = pick(0, 6), length = pick(0, w.most + 1);
      for (int i = 0; i < length; ++i) {
        draft.push_back(i < right ? scripted_token(tokens, sampling) : pick(0, 96));
        tokens.push_back(draft.back());
      }
      return draft;
    };
    bench_.runner.row_fails = [this, failing](const PlannedRow&) { return failing && pick(0, 200) == 0; };
  }

  void run() {
    int left = 25;
    for (int i = 0; i < 3000 && (left > 0 || bench_.engine->has_work()); ++i) {
      while (left > 0 && pick(0, 4) == 0) {
        --left;
        arrive();
      }
      if (!requests_.empty() && pick(0, 40) == 0) bench_.engine->cancel(requests_.rbegin()->first - pick(0, 5));
      if (pick(0, 60) == 0) bench_.engine->shrink_prefix_cache(pick(0, 500));
      bench_.step();
    }
    bench_.step();
    EXPECT_FALSE(bench_.engine->has_work()) << "somebody waits forever";
    EXPECT_TRUE(bench_.violations.empty()) << bench_.violations.front();
    for (const auto& [id, request] : requests_) {
      ASSERT_EQ(bench_.ends[id], 1) << "request " << id;
      const auto wanted = alone(request);
      const auto& got = bench_.answers[id];
      const auto finish = bench_.last.at(id).finish;
      if (finish == Finish::stop || finish == Finish::length) {
        EXPECT_EQ(got, wanted);
      } else {
        ASSERT_LE(got.size(), wanted.size());
        EXPECT_TRUE(std::equal(got.begin(), got.end(), wanted.begin()));
      }
    }
    bench_.engine->shrink_prefix_cache(0);
    EXPECT_TRUE(bench_.runner.caches.empty());
  }

 private:
  int pick(int low, int high) { return std::uniform_int_distribution(low, high)(random_); }
  Limits limits() {
    Limits l{.max_sequences = pick(1, 8), .prefill_tokens = pick(1, 40), .least_prefill_tokens = pick(1, 8), .pace = 1.0 + pick(0, 3)};
    if (pick(0, 1)) l.step_tokens = pick(2, 30);
    l.draft_tokens = pick(0, 20);
    if (pick(0, 1)) l.memory_bytes = pick(900, 3000);
    if (pick(0, 2)) l.prefix_cache_bytes = pick(1, 2000);
    return l;
  }
  void arrive() {
    Request r{.tokens = prompt_of(pick(1, 90), pick(0, 2)), .max_tokens = pick(1, 40), .sampling = {.temperature = 1, .seed = pick(0, 3)}};
    if (pick(0, 3) == 0) r.boundaries = {pick(0, 40), pick(0, 90)};
    if (pick(0, 3) == 0) r.max_kv_size_tokens = pick(1, 60);
    if (pick(0, 1)) r.drafts.model_tokens = pick(1, 9);
    if (pick(0, 2) == 0) {
      r.kv_bits = 4;
      r.quantized_kv_start = pick(0, 60);
    }
    if (pick(0, 2) == 0) {
      const auto whole = alone(r);
      r.stop = {{whole[whole.size() / 2]}};
    }
    r.use_prefix_cache = pick(0, 4) > 0;
    requests_.emplace(bench_.submit(r), r);
  }

  std::mt19937 random_;
  Bench bench_;
  std::map<SequenceId, Request> requests_;
};

TEST(ScheduleFuzz, EveryAnswerIsTheOneGivenAlone) {
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t seed = 0; seed < 2000 && std::chrono::steady_clock::now() - start < std::chrono::seconds(15); ++seed) {
    SCOPED_TRACE(seed);
    Story(seed).run();
    if (testing::Test::HasFailure()) return;
  }
}

}  // namespace
}  // namespace mlxlm::tests
