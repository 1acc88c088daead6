// Faults that mlx_lm had or has, each as it would show here, and what a row may ask for: masks, log-probabilities, caches in and out.
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <future>
#include <limits>
#include <thread>

#include <gtest/gtest.h>
#include <mlx/ops.h>

#include "cache/quantized.h"
#include "engine/async_mask.h"
#include "gen/batch.h"
#include "parity/parity_case.h"
#include "tiny_tokenizer.h"

namespace mlxlm::tests {
namespace {

using namespace engine;
using Uid = gen::BatchGenerator::Uid;

const text::Tokenizer& tokenizer() {
  static const text::Tokenizer shared = byte_tokenizer(1000);  // no token of the tiny models ends the text
  return shared;
}

std::unique_ptr<model::CausalModel> tiny(const std::string& name) {
  const auto golden = load_golden(name);
  return make_model(make_checkpoint(golden.info.at("config"), golden.info));
}

std::vector<int> prompt(int length, int salt) {
  std::vector<int> tokens;
  for (int i = 0; i < length; ++i) tokens.push_back((i * i * 7 + i * 31 + salt * 13) % 100);
  return tokens;
}

std::vector<int> run_alone(model::CausalModel& model, const std::vector<int>& tokens, int max_tokens) {
  std::vector<int> answer;
  gen::stream_generate(model, tokenizer(), tokens, {.max_tokens = max_tokens}, [&](const gen::Response& r) {
    answer.push_back(r.token);
    return true;
  });
  return answer;
}

/** Steps until nothing is left; answers by id. */
std::map<SequenceId, std::vector<int>> drain(Engine& engine, std::map<SequenceId, Event>* last = nullptr) {
  std::map<SequenceId, std::vector<int>> answers;
  do {
    for (auto& e : engine.step().events) {
      if (e.chosen) answers[e.id].push_back(e.chosen->token);
      if (last && e.finish != Finish::none) last->insert_or_assign(e.id, e);
    }
    EXPECT_TRUE(check_invariants(engine.snapshot()).empty()) << check_invariants(engine.snapshot()).front();
  } while (engine.has_work());
  return answers;
}

class Faults : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { model_ = tiny(GetParam()); }
  std::unique_ptr<model::CausalModel> model_;
};

/** mlx-lm#965: with 16 prompts at once, answers were those of other prompts. */
TEST_P(Faults, SixteenAtOnceDoNotMixUp) {
  const Limits limits{.max_sequences = 16, .prefill_tokens = 24, .prefix_cache_bytes = 1 << 20};
  gen::ModelRunner runner(*model_, limits);
  Engine engine(runner, limits);
  for (int round = 0; round < 2; ++round) {
    std::map<SequenceId, std::vector<int>> prompts;
    for (int i = 0; i < 16; ++i) {
      const auto p = prompt(5 + i % 12 * 3, i % 12);  // some twice
      prompts[engine.submit({.tokens = p, .max_tokens = 12})] = p;
    }
    const auto answers = drain(engine);
    for (const auto& [id, p] : prompts) EXPECT_EQ(answers.at(id), run_alone(*model_, p, 12));
  }
}

/** mlx-lm#1129 (and #754, #983): a short and a long prompt join, first together and then beside one that decodes, with rotated windows and
 * with recurrent states. */
TEST_P(Faults, PromptsOfOtherLengthsJoinAtAnyTime) {
  const Limits limits{.prefill_tokens = 7, .step_tokens = 10};
  gen::ModelRunner runner(*model_, limits);
  Engine engine(runner, limits);
  std::map<SequenceId, std::vector<int>> prompts, answers;
  const auto submit = [&](int length, int salt) {
    const auto p = prompt(length, salt);
    prompts[engine.submit({.tokens = p, .max_tokens = 20})] = p;
  };
  const auto take = [&] {
    for (auto& e : engine.step().events) {
      if (e.chosen) answers[e.id].push_back(e.chosen->token);
    }
  };
  submit(10, 1);
  submit(26, 2);
  for (int i = 0; i < 9; ++i) take();
  submit(1, 3);
  submit(40, 4);
  take();
  submit(3, 5);
  while (engine.has_work()) take();
  for (const auto& [id, p] : prompts) EXPECT_EQ(answers.at(id), run_alone(*model_, p, 20)) << "prompt of " << p.size();
}

/** mlx-lm#1215: the same prompt again, and prompt and answer as they are stored. */
TEST_P(Faults, AnExactPromptCacheHit) {
  const Limits limits{.prefix_cache_bytes = 1 << 22};
  gen::ModelRunner runner(*model_, limits);
  Engine engine(runner, limits);
  const auto p = prompt(30, 1);
  const auto wanted = run_alone(*model_, p, 10);
  int reused = 0;
  for (int i = 0; i < 3; ++i) {
    std::map<SequenceId, Event> last;
    const auto id = engine.submit({.tokens = p, .max_tokens = 10, .boundaries = {29}});
    EXPECT_EQ(drain(engine, &last).at(id), wanted);
    reused = last.at(id).reused_tokens;
  }
  EXPECT_EQ(reused, 29);
  for (int less = 0; less < 3; ++less) {
    auto longer = p;
    longer.insert(longer.end(), wanted.begin(), wanted.end() - less);
    const auto id = engine.submit({.tokens = longer, .max_tokens = 5});
    EXPECT_EQ(drain(engine).at(id), run_alone(*model_, longer, 5));
  }
}

/** mlx-lm#1255, #1472, #1505: what one request asks for must not end the others, or the engine. */
TEST_P(Faults, ABadRequestEndsAlone) {
  const Limits limits{};
  gen::ModelRunner runner(*model_, limits);
  Engine engine(runner, limits);
  const int vocab = model_->description().vocab;
  const auto good = prompt(12, 1);
  const auto wanted = run_alone(*model_, good, 15);
  const auto first = engine.submit({.tokens = good, .max_tokens = 15});
  engine.step();
  const float infinite = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<Request> bad{
      {.tokens = {}},
      {.tokens = {vocab}},
      {.tokens = {-1}},
      {.tokens = good, .max_tokens = 0},
      {.tokens = good, .sampling = {.temperature = 1, .top_k = vocab}},
      {.tokens = good, .sampling = {.temperature = -1}},
      {.tokens = good, .sampling = {.temperature = nan}},
      {.tokens = good, .sampling = {.temperature = 1, .xtc_probability = 1, .xtc_threshold = 0.9f}},
      {.tokens = good, .sampling = {.temperature = 1, .top_p = 1.5f}},
      {.tokens = good, .sampling = {.temperature = 1, .min_tokens_to_keep = 0}},
      {.tokens = good, .sampling = {.logit_bias = {{vocab, 1.f}}}},
      {.tokens = good, .sampling = {.logit_bias = {{-1, 1.f}}}},
      {.tokens = good, .sampling = {.repetition_penalty = -1}},
      {.tokens = good, .sampling = {.repetition_penalty = infinite}},
      {.tokens = good, .sampling = {.top_logprobs = vocab + 1}},
  };
  for (const auto& r : bad) EXPECT_THROW(engine.submit(r), Error);
  // Nothing is wrong with these, however odd.
  engine.submit({.tokens = good, .max_tokens = 3, .stop = {{}, {-5}}});
  engine.submit({.tokens = good, .max_tokens = 3, .sampling = {.logit_bias = {{1, -infinite}}, .repetition_penalty = 1.5f}});
  const auto second = engine.submit({.tokens = good, .max_tokens = 15});
  std::vector<int> answer{wanted[0]};  // the first token came with the first step
  const auto answers = drain(engine);
  answer.insert(answer.end(), answers.at(first).begin(), answers.at(first).end());
  EXPECT_EQ(answer, wanted);
  EXPECT_EQ(answers.at(second), wanted);
  EXPECT_EQ(runner.count(), 0u);
}

/** Allows what another thread has found out meanwhile. */
struct SlowMask : TokenMask {
  explicit SlowMask(int vocab) : vocab_(vocab) { work(); }
  void accept(int token) override {
    last_ = token;
    ++accepted;
    work();
  }
  std::span<const uint32_t> allowed() override {
    bits_ = next_.get();
    return bits_;
  }
  void work() {
    next_ = std::async(std::launch::async, [this, last = last_] {
      std::vector<uint32_t> bits((vocab_ + 31) / 32);
      if (accepted >= fail_at) throw Error(Code::bad_request, "grammar", "no token fits");
      for (int t = (last + 1) % 2; t < vocab_; t += 2) bits[t / 32] |= 1u << t % 32;  // even and odd tokens by turns
      return bits;
    });
  }
  int vocab_, last_ = 0, accepted = 0, fail_at = 1000;
  std::vector<uint32_t> bits_;
  std::future<std::vector<uint32_t>> next_;
};

TEST_P(Faults, MasksAreEachRequestsOwn) {
  const Limits limits{};
  gen::ModelRunner runner(*model_, limits);
  Engine engine(runner, limits);
  const int vocab = model_->description().vocab;
  const auto p = prompt(9, 2);
  auto mask = std::make_shared<SlowMask>(vocab), failing = std::make_shared<SlowMask>(vocab);
  failing->fail_at = 4;
  const auto plain = engine.submit({.tokens = p, .max_tokens = 10});
  const auto odd = engine.submit({.tokens = p, .max_tokens = 10, .sampling = {.temperature = 1, .seed = 1}, .mask = mask});
  const auto ends = engine.submit({.tokens = p, .max_tokens = 10, .mask = failing});
  std::map<SequenceId, Event> last;
  const auto answers = drain(engine, &last);
  EXPECT_EQ(answers.at(plain), run_alone(*model_, p, 10));
  for (int i = 0; i < 10; ++i) EXPECT_EQ(answers.at(odd)[i] % 2, (i + 1) % 2);
  EXPECT_EQ(last.at(ends).finish, Finish::failed);
  EXPECT_EQ(last.at(ends).error->code(), Code::bad_request);
  EXPECT_EQ(answers.at(ends).size(), 4u);
}

/** A model that says when it is asked to run. */
struct Watched final : model::CausalModel {
  explicit Watched(model::CausalModel& m) : inner(m) {}
  mx::array run(const mx::array& tokens, const std::vector<model::Segment>& segments) override {
    ++runs;
    return inner.run(tokens, segments);
  }
  const arch::Model& description() const override { return inner.description(); }
  const char* executor() const override { return inner.executor(); }
  int64_t weight_bytes() const override { return inner.weight_bytes(); }
  model::CausalModel& inner;
  std::atomic<int> runs = 0;
};

TEST_P(Faults, AMaskIsWaitedForAfterTheModelHasBegun) {
  Watched watched(*model_);
  const Limits limits{};
  gen::ModelRunner runner(watched, limits);
  Engine engine(runner, limits);
  const int vocab = model_->description().vocab, before = watched.runs;
  std::atomic<int> late = 0;
  // Comes to an end only when the step that needs it has begun: an engine that waited first would wait for ever.
  const auto mask = std::make_shared<AsyncMask>([&](std::span<const int> answer) {
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (watched.runs.load() - before <= static_cast<int>(answer.size()) && std::chrono::steady_clock::now() < give_up)
      std::this_thread::yield();
    late += std::chrono::steady_clock::now() >= give_up;
    std::vector<uint32_t> bits((vocab + 31) / 32);
    bits[answer.size() / 32] = 1u << answer.size() % 32;  // the n-th token is n
    return bits;
  });
  const auto id = engine.submit({.tokens = prompt(9, 2), .max_tokens = 6, .mask = mask, .drafts = {.ngram_tokens = 4}});
  EXPECT_EQ(drain(engine).at(id), (std::vector<int>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(late, 0);
}

TEST_P(Faults, TextComesAsItIsWrittenAndOneAnswerCanBeEnded) {
  std::vector<gen::BatchItem> items;
  for (int i = 0; i < 4; ++i) items.push_back({.prompt = prompt(5 + 3 * i, i), .max_tokens = 20, .drafts = {.ngram_tokens = i % 2 * 4}});
  std::vector<std::string> told(4);
  std::vector<int> pieces(4);
  std::vector<bool> ended(4);
  gen::BatchRun run;
  run.on_text = [&](std::size_t i, const std::string& text) {
    EXPECT_FALSE(ended[i]);
    EXPECT_FALSE(text.empty());
    told[i] += text;
    return ++pieces[i] < 3 || i != 2;
  };
  run.on_answer = [&](std::size_t i, const gen::BatchAnswer& a) {
    EXPECT_EQ(a.text, told[i]);
    ended[i] = true;
  };
  const auto answers = gen::batch_generate(*model_, tokenizer(), items, run);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_TRUE(ended[i]);
    EXPECT_EQ(answers[i].finish, i == 2 ? gen::Finish::cancelled : gen::Finish::length);
    EXPECT_GE(pieces[i], 3);
    if (i == 2) continue;
    EXPECT_EQ(answers[i].tokens, run_alone(*model_, items[i].prompt, 20));
  }
}

TEST_P(Faults, BatchGeneratorQuantizesAndDrafts) {
  const auto other = tiny(GetParam());
  gen::BatchOptions options{.max_tokens = 16, .draft_model = other.get()};
  gen::BatchGenerator batch(*model_, options, /*keep_caches=*/true);
  bool can_quantize = true;
  try {
    cache::check_quantization(model_->description(), {8, 32, 0});
  } catch (const Error&) {
    can_quantize = false;
  }
  std::vector<gen::BatchGenerator::Insert> inserts(3);
  for (int i = 0; i < 3; ++i) inserts[i].segments = {prompt(9 + 5 * i, i)};
  if (can_quantize) inserts[0].kv_quantization = cache::Quantization{8, 32, 12};
  inserts[1].drafts = engine::Drafts{.model_tokens = 3};
  inserts[2].drafts = engine::Drafts{.ngram_tokens = 5};
  std::map<Uid, std::vector<int>> answers;
  const auto uids = batch.insert_segments(std::move(inserts));
  int from_drafts = 0;
  cache::Caches quantized;
  int64_t held = 0;
  while (batch.has_work()) {
    for (auto& r : batch.next().second) {
      answers[r.uid].push_back(r.chosen->token);
      from_drafts += r.from_draft;
      if (r.uid == uids[0] && r.finish != Finish::none) quantized = std::move(r.caches);
    }
    held = std::max(held, batch.memory().held_bytes);
  }
  EXPECT_GT(held, 0);
  EXPECT_EQ(batch.stats().accepted_tokens, from_drafts);
  EXPECT_GT(from_drafts, 8);  // the draft model is the model
  for (int i = 0; i < 3; ++i) {
    std::vector<int> wanted;
    gen::Options o{.max_tokens = 16};
    if (i == 0 && can_quantize) o.kv_quantization = {8, 32, 12};
    gen::stream_generate(*model_, tokenizer(), prompt(9 + 5 * i, i), o, [&](const gen::Response& r) {
      wanted.push_back(r.token);
      return true;
    });
    EXPECT_EQ(answers[uids[i]], wanted) << i;
  }
  const auto is_quantized = [](const auto& c) { return dynamic_cast<const cache::QuantizedCache*>(c.get()) != nullptr; };
  EXPECT_EQ(std::ranges::any_of(quantized, is_quantized), can_quantize);
  EXPECT_THROW(gen::BatchGenerator(*model_, {.drafts = {.model_tokens = 2}}).insert({prompt(3, 1)}), Error);
}

TEST_P(Faults, LogprobsSumToOne) {
  const Limits limits{};
  gen::ModelRunner runner(*model_, limits);
  Engine engine(runner, limits);
  engine.submit({.tokens = prompt(9, 2), .max_tokens = 3, .sampling = {.want_logprobs = true, .top_logprobs = 4}});
  while (engine.has_work()) {
    for (const auto& e : engine.step().events) {
      ASSERT_TRUE(e.chosen);
      double sum = 0;
      for (const float l : e.chosen->logprobs) sum += std::exp(double(l));
      EXPECT_NEAR(sum, 1, 1e-4);
      ASSERT_EQ(e.chosen->top.size(), 4u);
      EXPECT_EQ(e.chosen->top[0].token, e.chosen->token);
      EXPECT_EQ(e.chosen->logprob, e.chosen->logprobs[e.chosen->token]);
      for (int i = 1; i < 4; ++i) EXPECT_GE(e.chosen->top[i - 1].logprob, e.chosen->top[i].logprob);
    }
  }
}

TEST_P(Faults, BatchGeneratorHandsCachesOnAndTakesThemBack) {
  gen::BatchGenerator first(*model_, {}, /*keep_caches=*/true);
  const auto p = prompt(20, 1), q = prompt(7, 2);
  const auto whole = run_alone(*model_, p, 12);
  const auto uids = first.insert({p, q}, {5, 40});
  gen::BatchGenerator::Response kept;
  int prompts_done = 0;
  while (kept.finish == Finish::none) {
    auto [prompts, responses] = first.next();
    for (const auto& r : prompts) prompts_done += r.end_of_prompt;
    for (auto& r : responses) {
      if (r.uid == uids[0] && r.finish != Finish::none) kept = std::move(r);
    }
  }
  EXPECT_EQ(prompts_done, 2);
  EXPECT_EQ(kept.finish, Finish::length);
  EXPECT_EQ(kept.all_tokens.size(), p.size() + 4);
  const auto held = first.extract_cache({uids[0], uids[1], 77});
  ASSERT_EQ(held.size(), 1u);
  EXPECT_GT(first.prompt_cache_bytes(), 0);
  const auto removed = first.remove({uids[1]}, true);
  EXPECT_EQ(removed.at(uids[1]).second, held.at(uids[1]).second);
  EXPECT_TRUE(first.next_generated().empty());
  EXPECT_EQ(first.stats().generation_tokens, 10);

  gen::BatchGenerator second(*model_);
  std::vector<gen::BatchGenerator::Insert> inserts(1);
  inserts[0] = {.segments = {{whole[4]}}, .max_tokens = 7, .caches = std::move(kept.caches), .all_tokens = kept.all_tokens};
  second.insert_segments(std::move(inserts));
  std::vector<int> rest;
  while (second.has_work()) {
    for (const auto& r : second.next_generated()) rest.push_back(r.chosen->token);
  }
  EXPECT_EQ(rest, std::vector<int>(whole.begin() + 5, whole.end()));
}

TEST_P(Faults, SegmentsEndSteps) {
  gen::BatchGenerator batch(*model_);
  const auto p = prompt(25, 3);
  std::vector<gen::BatchGenerator::Insert> inserts(1);
  inserts[0].segments = {{p.begin(), p.begin() + 10}, {}, {p.begin() + 10, p.begin() + 13}, {p.begin() + 13, p.end()}};
  inserts[0].max_tokens = 4;
  batch.insert_segments(std::move(inserts));
  std::vector<int> ends, answer;
  while (batch.has_work()) {
    auto [prompts, responses] = batch.next();
    for (const auto& r : prompts) ends.push_back(r.end_of_segment ? r.processed_tokens : -1);
    for (const auto& r : responses) answer.push_back(r.chosen->token);
  }
  EXPECT_EQ(ends, (std::vector<int>{10, 13, 25}));
  EXPECT_EQ(answer, run_alone(*model_, p, 4));
  EXPECT_THROW(batch.insert({p, {}}), Error);
  EXPECT_THROW(batch.insert({p}, {1, 2}), Error);
  EXPECT_FALSE(batch.has_work());  // nothing of a refused call stays
}

TEST_P(Faults, BatchGenerateGivesTheTextsOfStreamGenerate) {
  std::vector<gen::BatchItem> items;
  for (int i = 0; i < 6; ++i) {
    items.push_back({.prompt = prompt(5 + 7 * i, i), .max_tokens = 10 + i, .sampling = {.temperature = i % 2 ? 0.8f : 0.f, .seed = 4}});
  }
  items[2].prompt = {};
  items.push_back({.prompt = prompt(5, 0), .max_tokens = 30, .sampling = {.seed = 4}, .stop = {"never"}});
  const auto text = [&](const gen::BatchItem& item, std::vector<std::string> stop) {
    std::string all;
    gen::stream_generate(*model_, tokenizer(), item.prompt,
                         {.max_tokens = item.max_tokens, .sampler = gen::sampler_options(item.sampling), .stop = std::move(stop)},
                         [&](const gen::Response& r) {
                           all += r.text;
                           return true;
                         });
    return all;
  };
  const auto whole = text(items.back(), {});
  items.back().stop = {whole.substr(whole.size() / 2, 2)};
  std::vector<std::size_t> ended;
  gen::BatchGenerator::Stats stats;
  const auto answers =
      gen::batch_generate(*model_, tokenizer(), items, {.on_answer = [&](std::size_t i, const auto&) { ended.push_back(i); }}, &stats);
  ASSERT_EQ(answers.size(), items.size());
  std::ranges::sort(ended);
  EXPECT_EQ(ended, (std::vector<std::size_t>{0, 1, 2, 3, 4, 5, 6}));
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i == 2) {
      EXPECT_EQ(answers[i].error->code(), Code::bad_request);
    } else {
      EXPECT_EQ(answers[i].text, text(items[i], items[i].stop));
      EXPECT_EQ(answers[i].finish, i == 6 ? gen::Finish::stop : gen::Finish::length);
    }
  }
  EXPECT_GT(stats.generation_tokens, 60);
}

/** What prompts have in common is computed once, also where caches cannot be cut; from a folder not even that. */
TEST_P(Faults, ABatchSharesItsPrefixes) {
  std::vector<gen::BatchItem> items;
  for (int i = 0; i < 8; ++i) {
    auto tokens = prompt(112, 3);
    tokens[100] = i;  // the first that differs
    items.push_back({.prompt = tokens, .max_tokens = 6});
  }
  const auto folder = std::filesystem::temp_directory_path() / ("mlxlm-batch-" + std::to_string(::getpid()));
  std::filesystem::remove_all(folder);
  for (const bool keeps : {false, true}) {
    for (int round = 0; round < 2; ++round) {
      SCOPED_TRACE(std::to_string(keeps) + " " + std::to_string(round));
      gen::BatchGenerator::Stats stats;
      gen::BatchRun run;
      if (keeps) run.prefixes.folder = folder;
      const auto answers = gen::batch_generate(*model_, tokenizer(), items, run, &stats);
      EXPECT_GE(stats.reused_tokens, keeps && round == 1 ? 800 : 700);
      for (std::size_t i = 0; i < items.size(); ++i) EXPECT_EQ(answers[i].tokens, run_alone(*model_, items[i].prompt, 6)) << i;
    }
  }
  std::filesystem::remove_all(folder);
}

TEST_P(Faults, CancelKeepsWhatIsDone) {
  std::atomic<bool> cancel = false;
  std::vector<gen::BatchItem> items{{.prompt = prompt(5, 1), .max_tokens = 3}, {.prompt = prompt(5, 2), .max_tokens = -1}};
  const auto answers = gen::batch_generate(*model_, tokenizer(), items,
                                           {.on_answer = [&](std::size_t i, const auto&) { cancel = i == 0; }, .cancel = &cancel});
  EXPECT_EQ(answers[0].finish, gen::Finish::length);
  EXPECT_EQ(answers[1].finish, gen::Finish::cancelled);
  EXPECT_FALSE(answers[1].tokens.empty());
}

INSTANTIATE_TEST_SUITE_P(Family, Faults,
                         testing::Values("llama.f32", "gemma3_text.q4", "nemotron_h.q4", "lfm2.q4", "qwen3_next.f32", "falcon_h1.f32",
                                         "llama4.q4"),
                         test_name);

}  // namespace
}  // namespace mlxlm::tests
