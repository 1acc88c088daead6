// The real engine while things fail: models, rows, copies, masks and drafts throw at random moments, and caches are handed on from one
// request to the next. Whoever is not hit gets the tokens that it gets alone.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <random>

#include <gtest/gtest.h>
#include <mlx/primitives.h>

#include "cache/prompt_file.h"
#include "engine/async_mask.h"
#include "fuzz/tiny_models.h"
#include "gen/runner.h"
#include "parity/parity_case.h"

namespace mlxlm::tests {
namespace {

using namespace engine;
using Tokens = std::vector<int>;

constexpr const char* kInjected = "injected";

/** Cannot be evaluated, as when memory for a result cannot be had. */
struct Unevaluable final : mx::UnaryPrimitive {
  explicit Unevaluable(mx::Stream stream) : UnaryPrimitive(stream) {}
  void eval_cpu(const std::vector<mx::array>&, mx::array&) override { throw std::runtime_error(kInjected); }
  void eval_gpu(const std::vector<mx::array>&, mx::array&) override { throw std::runtime_error(kInjected); }
  const char* name() const override { return "Unevaluable"; }
};

/** Throws where it is told to: before anything is done, when the caches have moved on, or when the logits are evaluated. */
struct FailingModel final : model::CausalModel {
  explicit FailingModel(model::CausalModel& m) : inner(m) {}
  mx::array run(const mx::array& tokens, const std::vector<model::Segment>& segments) override {
    const bool now = fails && fails();
    if (now && when == Moment::before) throw Error(Code::out_of_memory, "model", kInjected);
    const auto logits = inner.run(tokens, segments);
    if (now && when == Moment::after) throw std::runtime_error(kInjected);
    if (!now) return logits;
    const auto stream = mx::default_stream(mx::default_device());
    return mx::array(logits.shape(), logits.dtype(), std::make_shared<Unevaluable>(stream), {logits});
  }
  const arch::Model& description() const override { return inner.description(); }
  const char* executor() const override { return inner.executor(); }
  int64_t weight_bytes() const override { return inner.weight_bytes(); }
  model::CausalModel& inner;
  std::function<bool()> fails{};
  enum class Moment { before, after, evaluation } when = Moment::before;
};

/** Passes everything on, and fails where it is told to. */
struct FailingRunner final : Runner {
  explicit FailingRunner(gen::ModelRunner& r) : inner(r) {}
  void check(std::span<const int> tokens, const Sampling& s, const CacheOptions& c, const Drafts& d) const override {
    inner.check(tokens, s, c, d);
  }
  int64_t cost_bytes(int64_t tokens, const CacheOptions& o) const override { return inner.cost_bytes(tokens, o); }
  int64_t growth_bytes(CacheId cache, std::optional<int> copied, int64_t tokens, const CacheOptions& o) const override {
    return inner.growth_bytes(cache, copied, tokens, o);
  }
  bool is_replaceable(CacheId cache) const override { return inner.is_replaceable(cache); }
  bool chunks_show(const CacheOptions& o) const override { return inner.chunks_show(o); }
  CacheId reserve(int64_t tokens, const CacheOptions& o) override {
    maybe(reserve_fails);
    return inner.reserve(tokens, o);
  }
  void adapt(CacheId cache, const CacheOptions& o) override { inner.adapt(cache, o); }
  CacheId copy(CacheId cache, int tokens) override {
    maybe(copy_fails);
    return inner.copy(cache, tokens);
  }
  void trim(CacheId cache, int tokens) override { inner.trim(cache, tokens); }
  void free(CacheId cache) noexcept override { inner.free(cache); }
  CacheInfo info(CacheId cache) const override { return inner.info(cache); }
  void begin(SequenceId id, const Sampling& s, std::shared_ptr<TokenMask> mask, const Drafts& d) override {
    inner.begin(id, s, std::move(mask), d);
  }
  void end(SequenceId id) noexcept override { inner.end(id); }
  std::vector<Tokens> draft(const std::vector<DraftWanted>& wanted) override {
    maybe(draft_fails);
    return inner.draft(wanted);
  }
  void keep(CacheId cache, int tokens) override {
    inner.keep(cache, tokens);
    maybe(keep_fails);
  }
  StepResult run(const StepPlan& plan) override {
    auto result = inner.run(plan);
    for (auto& row : result.rows) {
      if (row_fails && row_fails()) row = {.sequence = row.sequence, .chosen = {}, .error = Error(Code::internal, "row", kInjected)};
    }
    return result;
  }
  static void maybe(const std::function<bool()>& fails) {
    if (fails && fails()) throw Error(Code::out_of_memory, "memory", kInjected);
  }
  gen::ModelRunner& inner;
  std::function<bool()> reserve_fails, copy_fails, draft_fails, keep_fails, row_fails;
};

/** Which tokens may come after a number of tokens: two thirds of them, others each time. */
std::vector<uint32_t> mask_bits(std::size_t answered, int salt, int vocab) {
  std::vector<uint32_t> bits((vocab + 31) / 32);
  for (int t = 0; t < vocab; ++t) {
    if ((t + static_cast<int>(answered) + salt) % 3 != 0) bits[t / 32] |= 1u << t % 32;
  }
  return bits;
}

/** A request and what belongs to it alone. */
struct Wish {
  Request request;
  int mask_salt = 0;         // 0 = without a mask
  int mask_fails_at = 1000;  // tokens of the answer
  Tokens wanted{};           // alone
  bool stops = false;
  int unknown = 0;  // of what the cache holds, the first tokens, which the request does not name
  bool limited() const { return request.max_kv_size_tokens > 0 || request.kv_bits > 0; }
};

/** The request as the engine gets it: a mask is used up by one run. */
Request ready(const Wish& wish, int vocab) {
  auto r = wish.request;
  if (wish.mask_salt > 0) {
    r.mask = std::make_shared<AsyncMask>([salt = wish.mask_salt, fails_at = wish.mask_fails_at, vocab](std::span<const int> answer) {
      if (static_cast<int>(answer.size()) >= fails_at) throw Error(Code::bad_request, "grammar", kInjected);
      return mask_bits(answer.size(), salt, vocab);
    });
  }
  return r;
}

class FailureFuzz : public TinyModels {
 protected:
  std::function<bool()> once_in(int count) {
    return [this, count] { return failing_ && pick(1, count) == 1; };
  }

  Tokens tokens(int length, int family, int same) {
    Tokens list;
    for (int i = 0; i < length; ++i) list.push_back(((i * 37 + family * 11 + i * i) ^ (i > same ? pick(0, 3) : 0)) % vocab_);
    return list;
  }

  Wish wish() {
    Wish w;
    auto& r = w.request;
    const bool is_long = pick(0, 5) == 0;
    r.tokens = tokens(is_long ? pick(130, 450) : pick(1, 50), pick(0, 1), pick(0, 1) ? 30 : 130);
    r.max_tokens = pick(1, 20);
    if (pick(0, 2) == 0) {
      r.sampling.temperature = 0.8f;
      r.sampling.seed = pick(0, 1000);
    }
    if (pick(0, 2) == 0) (pick(0, 1) ? r.drafts.ngram_tokens : r.drafts.model_tokens) = pick(1, 7);
    if (pick(0, 3) == 0) r.sampling.repetition_penalty = 1.3f;
    r.sampling.want_logprob = pick(0, 4) == 0;
    if (pick(0, 4) == 0) r.max_kv_size_tokens = pick(4, 40);
    if (quantizable_ && pick(0, 4) == 0) {
      r.kv_bits = pick(0, 1) ? 8 : 4;
      r.kv_group_size = 32;
      r.quantized_kv_start = pick(0, 1) ? 0 : pick(1, 70);
    }
    if (pick(0, 2) == 0) r.boundaries = {pick(1, 60), pick(1, 150)};
    r.use_prefix_cache = pick(0, 4) > 0;
    r.keep_cache = pick(0, 2) == 0;
    if (pick(0, 3) == 0) {
      w.mask_salt = pick(1, 50);
      r.drafts = {};
      if (pick(0, 3) == 0) w.mask_fails_at = pick(0, 20);
    }
    return w;
  }

  /** Goes on from a cache that was handed over, with what it does not hold yet and a few tokens more. */
  Wish continuation(const Wish& before, const Event& last) {
    Wish w = wish();
    auto& r = w.request;
    r.max_kv_size_tokens = before.request.max_kv_size_tokens;
    r.kv_bits = before.request.kv_bits;
    r.kv_group_size = before.request.kv_group_size;
    r.quantized_kv_start = before.request.quantized_kv_start;
    r.cache = last.cache;
    r.cache_tokens = last.cache_tokens;
    w.unknown = before.unknown;
    if (!r.cache_tokens.empty() && pick(0, 3) == 0) {  // some of its tokens, or all, are forgotten
      const int lost = pick(1, static_cast<int>(r.cache_tokens.size()));
      r.cache_tokens.erase(r.cache_tokens.begin(), r.cache_tokens.begin() + lost);
      w.unknown += lost;
    }
    r.boundaries.clear();
    r.tokens = tokens(pick(1, 30), 1, 0);
    return w;
  }

  /** The answer alone: nothing fails, nothing is shared or guessed. With a cache: from a copy of it, and from all tokens where chunks do
   * not show. */
  void run_alone(Wish& w, const Limits& limits, gen::ModelRunner& owner) {
    Limits quiet{.prefill_tokens = limits.prefill_tokens, .limited_chunk_tokens = limits.limited_chunk_tokens};
    gen::ModelRunner runner(*model_, quiet, draft_model_.get());
    Engine engine(runner, quiet);
    const auto answer = [&](Wish alone) {
      alone.request.keep_cache = alone.request.use_prefix_cache = false;
      alone.request.boundaries.clear();
      alone.request.stop.clear();
      alone.request.drafts = {};
      alone.mask_fails_at = 1000;
      engine.submit(ready(alone, vocab_));
      Tokens got;
      while (engine.has_work()) {
        for (const auto& e : engine.step().events) {
          if (e.chosen) got.push_back(e.chosen->token);
        }
      }
      return got;
    };
    Wish alone = w;
    if (w.request.cache != 0) {
      alone.request.cache = runner.adopt(cache::copy(owner.caches(w.request.cache)));
      w.wanted = answer(alone);
      if (w.limited() || w.unknown > 0) return;
      alone.request.cache = 0;
      alone.request.cache_tokens.clear();
      alone.request.tokens = w.request.cache_tokens;
      alone.request.tokens.insert(alone.request.tokens.end(), w.request.tokens.begin(), w.request.tokens.end());
      EXPECT_EQ(answer(alone), w.wanted) << "from a cache of " << w.request.cache_tokens.size() << " tokens, and from all tokens";
      return;
    }
    w.wanted = answer(alone);
  }

  /** A sequence of tokens out of the answer ends it. */
  void add_stop(Wish& w) {
    if (pick(0, 2) > 0) return;
    const int last = pick(0, static_cast<int>(w.wanted.size()) - 1), first = std::max(0, last - pick(0, 1));
    const Tokens stop(w.wanted.begin() + first, w.wanted.begin() + last + 1);
    w.request.stop = {{}, stop};
    w.stops = true;
    w.wanted.erase(std::ranges::search(w.wanted, stop).end(), w.wanted.end());
  }

  struct Told {
    std::map<SequenceId, Wish> wishes;
    std::map<SequenceId, Tokens> answers;
    std::map<SequenceId, Event> ends;
    std::vector<std::pair<SequenceId, Event>> handed_over;  // caches that nobody has taken yet
    std::map<SequenceId, Finish> ended;                     // by us
  };

  void submit(Engine& engine, gen::ModelRunner& runner, const Limits& limits, Told& told) {
    Wish w;
    if (!told.handed_over.empty() && pick(0, 1)) {
      const auto [id, last] = std::move(told.handed_over.back());
      told.handed_over.pop_back();
      w = continuation(told.wishes.at(id), last);
    } else {
      w = wish();
    }
    const auto cache = w.request.cache;
    if (pick(0, 15) == 0) {
      w.request.tokens.back() = vocab_;
      EXPECT_THROW(engine.submit(ready(w, vocab_)), Error);
      if (cache != 0) {
        EXPECT_THROW(runner.info(cache), Error) << "a refused request's cache lives on";
      }
      return;
    }
    run_alone(w, limits, runner);
    add_stop(w);
    try {
      told.wishes.emplace(engine.submit(ready(w, vocab_)), w);
    } catch (const Error& error) {
      const bool never_fits = std::string(error.what()).find("which all requests share") != std::string::npos;
      EXPECT_EQ(error.code(), Code::out_of_memory) << error.what();
      EXPECT_TRUE(limits.memory_bytes > 0 && (cache != 0 || never_fits)) << error.what();
      EXPECT_THROW(runner.info(cache), Error) << "a refused request's cache lives on";
    }
  }

  void take(Event& e, Told& told, gen::ModelRunner& runner) {
    EXPECT_FALSE(told.ends.contains(e.id)) << "an event after the last one";
    auto& answer = told.answers[e.id];
    if (e.chosen) answer.push_back(e.chosen->token);
    if (e.finish == Finish::none) return;
    told.ends.emplace(e.id, e);
    if (e.error) {
      EXPECT_NE(std::string(e.error->what()).find(kInjected), std::string::npos) << e.error->what();
    }
    const auto& r = told.wishes.at(e.id).request;
    EXPECT_TRUE(e.cache == 0 || r.keep_cache);
    if (r.keep_cache && e.finish == Finish::length) {
      EXPECT_NE(e.cache, 0);
    }
    if (e.cache == 0) return;
    auto all = r.cache_tokens;
    all.insert(all.end(), r.tokens.begin(), r.tokens.end());
    all.insert(all.end(), answer.begin(), answer.end());
    EXPECT_EQ(runner.info(e.cache).tokens, told.wishes.at(e.id).unknown + static_cast<int>(e.cache_tokens.size()));
    EXPECT_TRUE(e.cache_tokens.size() <= all.size() && std::equal(e.cache_tokens.begin(), e.cache_tokens.end(), all.begin()))
        << "request " << e.id << ": handed over " << testing::PrintToString(e.cache_tokens) << ", of " << testing::PrintToString(all);
    if (runner.info(e.cache).tokens == 0 || pick(0, 3) == 0) {
      runner.free(e.cache);
    } else {
      told.handed_over.emplace_back(e.id, e);
    }
  }

  static void check(const Engine& engine, const gen::ModelRunner& runner, const Told& told) {
    const auto snapshot = engine.snapshot();
    for (const auto& violation : check_invariants(snapshot)) ADD_FAILURE() << violation;
    int64_t known = snapshot.reserved_bytes + snapshot.stored_bytes;
    for (const auto& q : snapshot.sequences) known += q.running ? 0 : q.held.bytes;
    for (const auto& [id, e] : told.handed_over) known += runner.info(e.cache).bytes;
    EXPECT_LE(runner.held_bytes(), known) << "more memory is held than is counted";
  }

  void end_one(Engine& engine, Told& told) {
    const auto id = told.wishes.rbegin()->first - pick(0, 3);
    const auto reason = pick(0, 1) ? Finish::cancelled : Finish::stop;
    if (engine.end(id, reason)) told.ended[id] = reason;
  }

  void play(Engine& engine, gen::ModelRunner& runner, const Limits& limits, Told& told) {
    const bool abrupt = pick(0, 7) == 0;
    for (int left = 14; left > 0 || (engine.has_work() && !abrupt);) {
      while (left > 0 && pick(0, 2) == 0) {
        --left;
        submit(engine, runner, limits, told);
      }
      if (!told.wishes.empty() && pick(0, 25) == 0) end_one(engine, told);
      if (pick(0, 40) == 0) engine.shrink_prefix_cache(pick(0, 1 << 20));
      failing_ = true;
      auto report = engine.step();
      failing_ = false;
      for (auto& e : report.events) take(e, told, runner);
      check(engine, runner, told);
      if (HasFailure()) return;
    }
  }

  void story(uint32_t seed) {
    std::vector<uint32_t> parts(GetParam().begin(), GetParam().end());  // each family has stories of its own
    parts.push_back(seed);
    std::seed_seq mixed(parts.begin(), parts.end());
    random_.seed(mixed);
    Limits limits{.max_sequences = pick(2, 9),
                  .prefill_tokens = pick(1, 48),
                  .least_prefill_tokens = pick(1, 8),
                  .draft_tokens = pick(2, 64),
                  .prefix_cache_bytes = pick(0, 2) ? 1 << 22 : 0};
    if (pick(0, 1)) limits.step_tokens = pick(2, 40);
    if (pick(0, 2) == 0) limits.limited_chunk_tokens = pick(1, 50);
    FailingModel model(*model_), draft_model(*draft_model_);
    gen::ModelRunner runner(model, limits, &draft_model);
    if (pick(0, 1)) limits.memory_bytes = pick(2, 4) * runner.cost_bytes(430, {.with_drafts = true}) + limits.prefix_cache_bytes;
    FailingRunner failing(runner);
    model.when = static_cast<FailingModel::Moment>(pick(0, 2));
    if (pick(0, 1)) model.fails = once_in(20);
    if (pick(0, 2) == 0) draft_model.fails = once_in(15);
    if (pick(0, 1)) failing.row_fails = once_in(120);
    if (pick(0, 3) == 0) failing.copy_fails = failing.reserve_fails = once_in(12);
    if (pick(0, 3) == 0) failing.draft_fails = once_in(10);
    if (pick(0, 3) == 0) failing.keep_fails = once_in(30);
    Told told;
    {
      Engine engine(failing, limits, [this] { return now_s_ += 0.001 * pick(1, 20); });  // stories can be told again
      play(engine, runner, limits, told);
      if (HasFailure()) return;
      for (auto& e : engine.step().events) take(e, told, runner);
      for (const auto& [id, w] : told.wishes) compare(id, w, told, engine.has_work());
    }
    for (const auto& [id, e] : told.handed_over) runner.free(e.cache);
    EXPECT_EQ(runner.count(), 0u) << "caches have leaked";
  }

  void compare(SequenceId id, const Wish& w, Told& told, bool abrupt) {
    const auto end = told.ends.find(id);
    const auto finish = end == told.ends.end() ? Finish::none : end->second.finish;
    EXPECT_TRUE(abrupt || finish != Finish::none) << "request " << id << " never ended";
    const auto& got = told.answers[id];
    const auto& r = w.request;
    const auto ended = told.ended.find(id);
    const bool whole = (finish == Finish::stop && ended == told.ended.end()) || finish == Finish::length;
    const auto about = testing::Message() << "request " << id << " of " << told.wishes.size() << ": cache " << w.unknown << " + "
                                          << r.cache_tokens.size() << ", prompt " << r.tokens.size() << ", max_kv " << r.max_kv_size_tokens
                                          << ", bits " << r.kv_bits << " from " << r.quantized_kv_start << ", temperature "
                                          << r.sampling.temperature << ", mask " << w.mask_salt << ", drafts " << r.drafts.ngram_tokens
                                          << " " << r.drafts.model_tokens << ", finish " << static_cast<int>(finish);
    if (whole) {
      EXPECT_EQ(got, w.wanted) << about;
      EXPECT_EQ(finish, w.stops ? Finish::stop : Finish::length) << about;
    } else {
      EXPECT_TRUE(got.size() <= w.wanted.size() && std::equal(got.begin(), got.end(), w.wanted.begin()))
          << about << ", got " << testing::PrintToString(got) << ", wanted the beginning of " << testing::PrintToString(w.wanted);
      EXPECT_TRUE(finish != Finish::cancelled || ended != told.ended.end()) << about;
    }
  }

  bool failing_ = false;
  double now_s_ = 0;
};

/** FUZZ_LONG=1 goes on for longer, FUZZ_SEED=n begins at a story. */
TEST_P(FailureFuzz, WhoIsNotHitGetsWhatItGetsAlone) {
  const char *from = std::getenv("FUZZ_SEED"), *goes_on = std::getenv("FUZZ_LONG");
  const auto start = std::chrono::steady_clock::now();
  const uint32_t first = from ? std::atoi(from) : 1;
  for (uint32_t seed = first; seed < first + (goes_on ? 400 : 40); ++seed) {
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(goes_on ? 40 : 4)) break;
    SCOPED_TRACE(seed);
    story(seed);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Family, FailureFuzz,
                         testing::Values("llama.f32", "llama.q4", "gemma3_text.q4", "nemotron_h.q4", "lfm2_biased.q4", "deepseek_v3.q4",
                                         "qwen3_moe.q4", "falcon_h1.q4", "llama4.f32"),
                         test_name);

}  // namespace
}  // namespace mlxlm::tests
