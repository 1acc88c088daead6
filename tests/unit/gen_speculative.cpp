// Speculative decoding: greedy answers are the model's own over every family and cache, sampled ones have its distribution.
#include <algorithm>
#include <cmath>

#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/random.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "gen/generate.h"
#include "gen/speculative.h"
#include "parity/parity_case.h"
#include "tiny_tokenizer.h"

namespace mlxlm {
namespace {

namespace mx = mlx::core;
using gen::Finish;
using gen::Options;
using Tokens = std::vector<int>;
using tests::byte_tokenizer;

const text::Tokenizer& tokenizer() {
  static const text::Tokenizer shared = byte_tokenizer();
  return shared;
}

struct Result {
  Tokens tokens;
  std::string text;
  int from_drafts = 0;
  gen::Response last;
};

/** `stop_after` > 0: the callback ends it after so many tokens. */
Result generate(model::CausalModel& model, const Tokens& prompt, const Options& options, cache::Caches* caches = nullptr,
                int stop_after = 0, const text::Tokenizer& words = tokenizer()) {
  Result result;
  result.last = gen::stream_generate(
      model, words, prompt, options,
      [&](const gen::Response& r) {
        result.tokens.push_back(r.token);
        result.text += r.text;
        result.from_drafts += r.from_draft;
        return static_cast<int>(result.tokens.size()) != stop_after;
      },
      caches);
  EXPECT_EQ(result.last.generation_tokens, static_cast<int>(result.tokens.size()));
  EXPECT_EQ(result.last.accepted_tokens, result.from_drafts);
  EXPECT_LE(result.last.accepted_tokens, result.last.drafted_tokens);
  return result;
}

std::vector<std::string> tiny_models() {
  std::vector<std::string> names;
  for (const auto& name : tests::golden_names()) {
    const bool plain = !name.starts_with("llama_rope") && name.find("published") == std::string::npos;
    if (plain && (name.ends_with(".f32") || name.ends_with(".bf16_q4"))) names.push_back(name);
  }
  return names;
}

std::unique_ptr<model::CausalModel> tiny_model(const std::string& name, int more_seed = 0, bool graph = false) {
  auto info = tests::load_golden(name).info;
  info["seed"] = info.at("seed").get<int>() + more_seed;
  auto made = tests::make_checkpoint(info.at("config"), info);
  return model::make_model(
      std::move(made.description), std::move(made.tensors), made.quant,
      {.executor = graph ? model::Executor::graph : model::Executor::best, .adapters = {}, .quantize_activations = false});
}

/** Drafts of the same model, of another one, and of the text itself. */
enum class Source { same, other, text };
constexpr Source sources[] = {Source::same, Source::other, Source::text};

class Family : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    model_ = tiny_model(GetParam());
    other_ = tiny_model(GetParam(), 1);
    same_ = tiny_model(GetParam());
  }
  Options with(Options options, Source source) const {
    if (source == Source::text)
      options.ngram_draft_tokens = 6;
    else
      options.draft_model = source == Source::same ? same_.get() : other_.get();
    return options;
  }
  void expect_equal(const Tokens& prompt, const Options& options) {
    const auto plain = generate(*model_, prompt, options);
    for (const auto source : sources) {
      SCOPED_TRACE("source " + std::to_string(static_cast<int>(source)));
      const auto got = generate(*model_, prompt, with(options, source));
      EXPECT_EQ(got.tokens, plain.tokens);
      EXPECT_EQ(got.text, plain.text);
      EXPECT_EQ(got.last.finish, plain.last.finish);
    }
  }
  /** The caches remember the same text: what comes next is the same. */
  void expect_same_caches(cache::Caches& a, cache::Caches& b) {
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (a[i]) {
        EXPECT_EQ(a[i]->offset(), b[i]->offset()) << "layer " << i;
      }
    }
    for (const int token : {3, 4, 5}) {
      const auto x = tests::last_row(model_->forward(tests::batch_of({token}), a));
      const auto y = tests::last_row(model_->forward(tests::batch_of({token}), b));
      EXPECT_LE(tests::difference(x, y), GetParam().ends_with("bf16_q4") ? 2e-2 : 2e-5);
    }
  }

  const Tokens prompt_{5, 9, 2, 7, 5, 9, 2, 11, 30, 5, 9, 2};
  std::unique_ptr<model::CausalModel> model_, other_, same_;
};

TEST_P(Family, GreedyIsTheModelsOwn) {
  expect_equal(prompt_, {.max_tokens = 40});
  expect_equal({5}, {.max_tokens = 1});
  expect_equal({5, 6}, {.max_tokens = 2});
}

TEST_P(Family, ItsOwnDraftsAreAllAccepted) {
  const auto got = generate(*model_, prompt_, with({.max_tokens = 18}, Source::same));
  EXPECT_GT(got.last.drafted_tokens, 0);
  EXPECT_EQ(got.last.accepted_tokens, got.last.drafted_tokens);
}

TEST_P(Family, ProcessorsSeeEachPositionsHistory) {
  Options options{.max_tokens = 24};
  options.processors = {
      .logit_bias = {{3, 0.5f}, {9, -1.f}}, .repetition_penalty = 1.4f, .presence_penalty = 0.3f, .frequency_penalty = 0.2f};
  options.want_logprobs = true;
  expect_equal(prompt_, options);
}

TEST_P(Family, CachesHoldWhatWasDelivered) {
  for (const int count : {1, 7, 8, 9}) {
    for (const bool by_callback : {false, true}) {
      if (by_callback && count == 1) continue;
      const Options options{.max_tokens = by_callback ? 100 : count};
      cache::Caches plain;
      const auto wanted = generate(*model_, prompt_, options, &plain, by_callback ? count : 0);
      for (const auto source : sources) {
        SCOPED_TRACE(std::to_string(count) + " tokens, source " + std::to_string(static_cast<int>(source)));
        cache::Caches caches, copies;
        const auto got = generate(*model_, prompt_, with(options, source), &caches, by_callback ? count : 0);
        EXPECT_EQ(got.tokens, wanted.tokens);
        EXPECT_EQ(got.last.finish, wanted.last.finish);
        for (const auto& c : plain) copies.push_back(c ? c->copy() : nullptr);
        expect_same_caches(caches, copies);
      }
    }
  }
}

TEST_P(Family, BoundedCaches) {
  expect_equal(prompt_, {.max_tokens = 24, .prefill_step_tokens = 5, .max_kv_size_tokens = 20});
}

TEST_P(Family, Continues) {
  cache::Caches plain;
  generate(*model_, prompt_, {.max_tokens = 9}, &plain);
  const auto wanted = generate(*model_, {8, 9}, {.max_tokens = 12}, &plain);
  for (const auto source : sources) {
    cache::Caches caches;
    generate(*model_, prompt_, with({.max_tokens = 9}, source), &caches);
    EXPECT_EQ(generate(*model_, {8, 9}, with({.max_tokens = 12}, source), &caches).tokens, wanted.tokens);
  }
}

TEST_P(Family, TheGraphDoesTheSame) {
  model_ = tiny_model(GetParam(), 0, true);
  EXPECT_STREQ(model_->executor(), "graph");
  expect_equal(prompt_, {.max_tokens = 24});
}

/** With a seed the tokens are those without drafts, whatever is drafted. */
TEST_P(Family, SeededDrawsAreThoseWithoutDrafts) {
  expect_equal(prompt_, {.max_tokens = 24, .sampler = {.temperature = 1.f, .seed = 7}});
  expect_equal(prompt_, {.max_tokens = 16, .sampler = {.temperature = 0.7f, .top_p = 0.9f, .xtc_probability = 0.5f, .seed = 8}});
}

INSTANTIATE_TEST_SUITE_P(Model, Family, testing::ValuesIn(tiny_models()), tests::test_name);

TEST(Speculative, EndsInsideADraft) {
  const auto model = tiny_model("llama.f32"), same = tiny_model("llama.f32");
  const Tokens prompt{5, 9, 2, 7};
  const auto whole = generate(*model, prompt, {.max_tokens = 24});
  for (const int at : {0, 1, 2, 3, 4, 9}) {
    auto words = byte_tokenizer();
    words.add_eos_token(std::to_string(whole.tokens[at]));
    const auto plain = generate(*model, prompt, {.max_tokens = 24}, nullptr, 0, words);
    EXPECT_LE(static_cast<int>(plain.tokens.size()), at + 1);
    cache::Caches caches;
    const auto got = generate(*model, prompt, {.max_tokens = 24, .draft_model = same.get()}, &caches, 0, words);
    EXPECT_EQ(got.tokens, plain.tokens);
    EXPECT_EQ(got.text, plain.text);
    EXPECT_EQ(got.last.finish, Finish::stop);
    for (const auto& c : caches) EXPECT_EQ(c->offset(), static_cast<int>(prompt.size() + got.tokens.size()));

    const Options stops{.max_tokens = 24, .stop = {std::string(1, static_cast<char>(whole.tokens[at]))}};
    auto drafting = stops;
    drafting.draft_model = same.get();
    EXPECT_EQ(generate(*model, prompt, drafting).text, generate(*model, prompt, stops).text);
    EXPECT_EQ(generate(*model, prompt, drafting).tokens, generate(*model, prompt, stops).tokens);
  }
  const auto ignoring = generate(*model, prompt, {.max_tokens = 10, .ignore_eos = true, .draft_model = same.get()});
  EXPECT_EQ(ignoring.tokens.size(), 10u);
}

TEST(Speculative, Cancel) {
  const auto model = tiny_model("llama.f32"), same = tiny_model("llama.f32");
  std::atomic<bool> cancel = false;
  int calls = 0;
  cache::Caches caches;
  const Options options{.max_tokens = -1, .cancel = &cancel, .draft_model = same.get()};
  const auto last = gen::stream_generate(
      *model, tokenizer(), {5, 9}, options,
      [&](const gen::Response&) {
        cancel = ++calls == 6;
        return true;
      },
      &caches);
  EXPECT_EQ(last.finish, Finish::cancelled);
  EXPECT_EQ(calls, 7);
  for (const auto& c : caches) EXPECT_EQ(c->offset(), 9);
  cancel = true;
  EXPECT_EQ(gen::stream_generate(*model, tokenizer(), {5, 9}, options, [](const gen::Response&) { return true; }).finish,
            Finish::cancelled);
}

TEST(Speculative, LogprobsAreTheModelsOwn) {
  const auto model = tiny_model("qwen3.f32"), other = tiny_model("qwen3.f32", 1);
  const auto logprobs = [&](model::CausalModel* draft) {
    std::vector<float> all;
    gen::stream_generate(*model, tokenizer(), {5, 9, 2},
                         {.max_tokens = 12, .want_logprob = true, .want_logprobs = true, .draft_model = draft},
                         [&](const gen::Response& r) {
                           EXPECT_EQ(r.logprobs.at(r.token), r.logprob);
                           all.push_back(r.logprob);
                           return true;
                         });
    return all;
  };
  EXPECT_EQ(logprobs(other.get()), logprobs(nullptr));
}

TEST(Speculative, VocabulariesOfDifferentWidthThatShareATokenizer) {
  const auto narrow = tiny_model("llama.f32");
  auto info = tests::load_golden("llama.f32").info;
  info["config"]["vocab_size"] = 136;
  auto made = tests::make_checkpoint(info.at("config"), info);
  const auto wide = model::make_model(std::move(made.description), std::move(made.tensors), made.quant);
  for (const float temperature : {0.f, 1.f}) {
    for (auto* target : {narrow.get(), wide.get()}) {
      auto* draft = target == narrow.get() ? wide.get() : narrow.get();
      Options options{.max_tokens = 20, .sampler = {.temperature = temperature, .seed = 5}};
      const auto plain = generate(*target, {5, 9}, options);
      options.draft_model = draft;
      const auto got = generate(*target, {5, 9}, options);
      EXPECT_EQ(got.tokens.size(), 20u);
      if (temperature == 0.f) {
        EXPECT_EQ(got.tokens, plain.tokens);
      }
      for (const int token : got.tokens) EXPECT_LT(token, target->description().vocab);
    }
  }
}

TEST(Speculative, RefusesWhatItCannotDo) {
  const auto model = tiny_model("llama.f32");
  EXPECT_THROW(generate(*model, {5}, {.draft_model = model.get(), .draft_tokens = 0}), Error);
  EXPECT_THROW(generate(*model, {5}, {.draft_model = model.get(), .draft_tokens = 257}), Error);
  EXPECT_THROW(generate(*model, {5}, {.ngram_draft_tokens = -1}), Error);
  EXPECT_THROW(generate(*model, {5}, {.ngram_draft_tokens = 257}), Error);
  EXPECT_THROW(generate(*model, {5}, {.draft_model = model.get(), .ngram_draft_tokens = 3}), Error);
  EXPECT_NO_THROW(gen::check_same_vocabulary(tokenizer(), byte_tokenizer()));
}

// ---- several calls over one cache ----------------------------------------------------------------------------------------

/** Counts the tokens that it reads. */
class Counting final : public model::CausalModel {
 public:
  explicit Counting(model::CausalModel& model) : model_(model) {}
  mx::array run(const mx::array& tokens, const std::vector<model::Segment>& segments) override {
    read += tokens.shape(0);
    return model_.run(tokens, segments);
  }
  const arch::Model& description() const override { return model_.description(); }
  const char* executor() const override { return model_.executor(); }
  int64_t weight_bytes() const override { return 0; }
  int cache_value_bytes() const override { return model_.cache_value_bytes(); }
  int read = 0;

 private:
  model::CausalModel& model_;
};

TEST(SeveralCalls, NgramsAreFoundInWhatTheCachesHold) {
  const auto model = tiny_model("llama.f32");
  const Tokens context{1, 2, 3, 9, 50, 50, 4, 5}, prompt{6, 9};
  Options options{.max_tokens = 3, .ignore_eos = true, .ngram_draft_tokens = 8};
  options.processors.logit_bias = {{50, 1000.f}};  // says nothing else
  const auto ask = [&](const Tokens& known) {
    cache::Caches caches;
    EXPECT_TRUE(gen::prefill(*model, context, {}, caches));
    options.context = known;
    const auto got = generate(*model, prompt, options, &caches);
    EXPECT_EQ(got.tokens, Tokens({50, 50, 50}));
    return got.last.accepted_tokens;
  };
  EXPECT_EQ(ask({}), 0);
  EXPECT_EQ(ask(context), 1);
}

TEST(SeveralCalls, ADraftModelTakesOnlyItsOwnCaches) {
  const auto model = tiny_model("llama.f32"), draft = tiny_model("llama.f32", 1), other = tiny_model("qwen3.f32");
  gen::DraftMemory memory;
  Options options{.max_tokens = 5, .ignore_eos = true, .draft_model = other.get(), .draft_memory = &memory};
  const Tokens prompt{1, 2, 3};
  generate(*model, prompt, options);
  const auto held = memory.held;
  ASSERT_FALSE(held.empty());
  options.draft_model = draft.get();
  EXPECT_THROW(generate(*model, prompt, options), Error);
  EXPECT_EQ(memory.held, held);  // and of the right one they still are
  options.draft_model = other.get();
  memory.held.pop_back();
  EXPECT_THROW(generate(*model, prompt, options), Error);
  memory.held = held;
  const auto wanted = generate(*model, prompt, {.max_tokens = 5, .ignore_eos = true}).tokens;
  EXPECT_EQ(generate(*model, prompt, options).tokens, wanted);
}

TEST(SeveralCalls, ADraftModelReadsOnlyWhatIsNew) {
  for (const std::string name : {"llama.f32", "nemotron_h.f32", "gemma3_text.f32"}) {
    SCOPED_TRACE(name);
    const auto model = tiny_model(name), other = tiny_model(name, 1);
    Counting draft(*other);
    gen::DraftMemory memory;
    cache::Caches caches, plain_caches;
    Options options{.max_tokens = 10, .ignore_eos = true, .draft_model = &draft, .draft_tokens = 3, .draft_memory = &memory};
    Tokens held;
    for (int turn = 0; turn < 4; ++turn) {
      Tokens prompt;
      for (int i = 0; i < 40; ++i) prompt.push_back((i * 13 + turn * 29 + i * i) % 100);
      draft.read = 0;
      options.context = held;
      const auto got = generate(*model, prompt, options, &caches);
      EXPECT_EQ(got.tokens, generate(*model, prompt, {.max_tokens = 10, .ignore_eos = true}, &plain_caches).tokens);
      EXPECT_LE(draft.read, 10 + 40 + 10 * 5 + 10 * 5);
      held.insert(held.end(), prompt.begin(), prompt.end());
      held.insert(held.end(), got.tokens.begin(), got.tokens.end());
      EXPECT_LE(memory.held.size(), held.size());
      EXPECT_GE(memory.held.size() + 4, held.size());
      EXPECT_TRUE(std::equal(memory.held.begin(), memory.held.end(), held.begin()));
    }
    // Another beginning: nothing of it may stay.
    cache::Caches fresh, plain;
    options.context.clear();
    EXPECT_EQ(generate(*model, {7, 8, 9, 10}, options, &fresh).tokens,
              generate(*model, {7, 8, 9, 10}, {.max_tokens = 10, .ignore_eos = true}, &plain).tokens);
    EXPECT_EQ(memory.held.front(), 7);
  }
}

// ---- the distribution ----------------------------------------------------------------------------------------------------

constexpr int kSmall = 6;

/** The next token depends on the last one alone, by a table: what is sampled can be counted. */
class TableModel final : public model::CausalModel {
 public:
  explicit TableModel(uint64_t seed) : table_(mx::multiply(mx::random::normal({kSmall, kSmall}, mx::random::key(seed)), mx::array(1.2f))) {
    description_.vocab = kSmall;
    mx::eval(table_);
  }
  mx::array run(const mx::array& tokens, const std::vector<model::Segment>& segments) override {
    const int count = tokens.shape(0), wanted = segments.at(0).wanted_rows;
    return mx::take(table_, mx::slice(tokens, {count - wanted}, {count}), 0);
  }
  const arch::Model& description() const override { return description_; }
  int64_t weight_bytes() const override { return 0; }
  const char* executor() const override { return "graph"; }
  mx::array row(int token) const { return mx::slice(table_, {token, 0}, {token + 1, kSmall}); }

 private:
  arch::Model description_;
  mx::array table_;
};

using Table = std::vector<std::vector<double>>;

/** What follows each token, by the sampler alone; XTC takes its part of the draws. */
Table wanted_table(const TableModel& model, const Options& options) {
  const float xtc = options.sampler.xtc_probability;
  Table table;
  for (int last = 0; last < kSmall; ++last) {
    std::vector<double> sum(kSmall, 0.);
    for (const bool with_xtc : {false, true}) {
      auto sampling = options.sampler;
      // At probability 1 no draw is above it; the smallest one leaves XTC out but for a draw of 0.
      sampling.xtc_probability = with_xtc ? 1.f : 0.f;
      if (with_xtc && xtc == 0.f) continue;
      const auto logits = sample::process(model.row(last), {last}, options.processors);
      auto p = sample::Sampler(sampling).probabilities(logits - mx::logsumexp(logits, -1, true));
      mx::eval(p);
      for (int i = 0; i < kSmall; ++i) sum[i] += (with_xtc ? xtc : 1 - xtc) * p.data<float>()[i];
    }
    table.push_back(sum);
  }
  return table;
}

/** Chi-square of the counted pairs, and its degrees of freedom; infinite when something came that cannot. */
std::pair<double, int> chi_square(const Tokens& tokens, const Table& wanted) {
  Table counts(kSmall, std::vector<double>(kSmall, 0.));
  for (std::size_t i = 1; i < tokens.size(); ++i) ++counts[tokens[i - 1]][tokens[i]];
  double sum = 0;
  int freedom = 0;
  for (int a = 0; a < kSmall; ++a) {
    double total = 0;
    for (const double n : counts[a]) total += n;
    int cells = 0;
    for (int b = 0; b < kSmall; ++b) {
      const double expected = total * wanted[a][b];
      if (wanted[a][b] == 0. && counts[a][b] > 0) return {INFINITY, 1};
      if (expected < 3) continue;
      sum += (counts[a][b] - expected) * (counts[a][b] - expected) / expected;
      ++cells;
    }
    freedom += std::max(0, cells - 1);
  }
  return {sum, freedom};
}

/** About the 99.9th percentile (Wilson and Hilferty). */
double limit_of(int freedom) {
  const double part = 2. / (9. * freedom);
  return freedom * std::pow(1 - part + 3.09 * std::sqrt(part), 3);
}

class Distribution : public testing::TestWithParam<int> {};

TEST_P(Distribution, IsTheTargets) {
  TableModel target(3), draft(4);
  Options options{.max_tokens = 2500, .ignore_eos = true};
  options.sampler.seed = 11;
  options.sampler.temperature = 1.f;
  switch (GetParam()) {
    case 1:
      options.sampler.temperature = 0.6f;
      break;
    case 2:
      options.sampler.top_p = 0.8f;
      break;
    case 3:
      options.sampler.top_k = 3;
      options.sampler.temperature = 1.5f;
      break;
    case 4:
      options.sampler.min_p = 0.15f;
      break;
    case 5:
      options.sampler.xtc_probability = 0.5f;
      break;
    case 6:
      options.processors = {.logit_bias = {{2, 1.f}}, .presence_penalty = 2.f, .presence_context_size = 1};
      break;
    default:
      break;
  }
  const auto wanted = wanted_table(target, options);
  const auto others = wanted_table(draft, options);
  enum class Drafted { by_rejection, ahead, from_text };
  for (const auto drafted : {Drafted::by_rejection, Drafted::ahead, Drafted::from_text}) {
    auto speculative = options;
    if (drafted == Drafted::from_text) {
      speculative.ngram_draft_tokens = 4;
      speculative.max_tokens = 4000;  // they are rarely right
    } else {
      speculative.draft_model = &draft;
      speculative.sampler.rejects_drafts = drafted == Drafted::by_rejection;
    }
    const auto got = generate(target, {1}, speculative);
    if (drafted != Drafted::by_rejection) {
      auto plain = options;
      plain.max_tokens = speculative.max_tokens;
      EXPECT_EQ(got.tokens, generate(target, {1}, plain).tokens);
    }
    const auto [distance, freedom] = chi_square(got.tokens, wanted);
    EXPECT_LT(distance, limit_of(freedom)) << "degrees of freedom " << freedom;
    EXPECT_GT(chi_square(got.tokens, others).first, 2 * limit_of(freedom));  // the test can fail
    EXPECT_GT(got.last.accepted_tokens, 200);
    EXPECT_GT(got.last.drafted_tokens - got.last.accepted_tokens, 200);
  }
}

INSTANTIATE_TEST_SUITE_P(Sampling, Distribution, testing::Range(0, 7));

// ---- drafts out of the text ------------------------------------------------------------------------------------------------

TEST(NgramDrafter, ContinuesTheLongestThenTheLatestPlace) {
  gen::NgramDrafter drafter;
  EXPECT_TRUE(gen::NgramDrafter().propose({1, 2}, 4).tokens.empty());
  EXPECT_TRUE(gen::NgramDrafter().propose({1, 2, 3, 4, 9, 3, 5, 6}, 4).tokens.empty());
  Tokens history{1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3};
  EXPECT_EQ(drafter.propose(history, 3).tokens, (Tokens{5, 6, 2}));
  history.insert(history.end(), {8, 1, 2, 3});
  EXPECT_EQ(drafter.propose(history, 2).tokens, (Tokens{4, 9}));
}

TEST(NgramDrafter, GoesOnBeyondTheEnd) {
  EXPECT_EQ(gen::NgramDrafter().propose({7, 7, 7}, 4).tokens, (Tokens{7, 7, 7, 7}));
  EXPECT_EQ(gen::NgramDrafter().propose({1, 2, 3, 1, 2}, 4).tokens, (Tokens{3, 1, 2, 3}));
}

TEST(NgramDrafter, DraftsGrowWithSuccess) {
  gen::NgramDrafter drafter;
  Tokens history;
  for (int i = 0; i < 40; ++i) history.push_back(i % 20);
  std::size_t most = 0;
  for (int i = 0; i < 6; ++i) {
    const auto tokens = drafter.propose(history, 64).tokens;
    EXPECT_GE(tokens.size(), most);
    most = tokens.size();
    history.insert(history.end(), tokens.begin(), tokens.end());
    history.push_back((history.back() + 1) % 20);
  }
  EXPECT_EQ(most, 64u);
  // Wrong again and again: shorter, then rarer.
  int pauses = 0;
  for (int i = 0; i < 60; ++i) {
    const auto tokens = drafter.propose(history, 64).tokens;
    if (i < 4 || !tokens.empty()) most = tokens.size();
    pauses += tokens.empty();
    history.insert(history.end(), {100 + i, 0, 1});
  }
  EXPECT_EQ(most, 2u);
  EXPECT_GT(pauses, 40);
  // Right once, and they are back.
  Tokens tokens;
  for (int i = 0; i < 20 && tokens.empty(); ++i) {
    history.push_back(i % 2);
    tokens = drafter.propose(history, 64).tokens;
  }
  ASSERT_FALSE(tokens.empty());
  for (int i = 0; i < 3; ++i) {
    history.insert(history.end(), tokens.begin(), tokens.end());
    tokens = drafter.propose(history, 64).tokens;
    EXPECT_FALSE(tokens.empty());
  }
}

}  // namespace
}  // namespace mlxlm
