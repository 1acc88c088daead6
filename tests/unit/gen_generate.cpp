// The generation loop over a scripted model: what is delivered, when it ends, what is refused.
#include <cmath>
#include <cstdlib>

#include <gtest/gtest.h>
#include <mlx/ops.h>

#include "base/error.h"
#include "gen/generate.h"
#include "tiny_tokenizer.h"

namespace {

using namespace mlxlm;
using gen::Finish;
namespace mx = mlx::core;
constexpr int kVocab = 260, kEos = tests::byte_eos;

const text::Tokenizer& tokenizer() {
  static const text::Tokenizer shared = tests::byte_tokenizer();
  return shared;
}

/** After a prompt of `prompt` tokens it says `script`, whatever it reads; then 'x' for ever. */
class ScriptedModel final : public model::CausalModel {
 public:
  ScriptedModel(int prompt, std::string script, bool ends = true) : prompt_(prompt), script_(std::move(script)), ends_(ends) {
    description_.vocab = kVocab;
  }
  mx::array run(const mx::array& tokens, const std::vector<model::Segment>&) override {
    calls.push_back(tokens.shape(0));
    seen_ += tokens.shape(0);
    const int at = std::max(0, seen_ - prompt_);
    const int size = static_cast<int>(script_.size());
    const int next = at < size ? static_cast<unsigned char>(script_[at]) : at == size && ends_ ? kEos : 'x';
    return mx::expand_dims(mx::astype(mx::equal(mx::arange(kVocab), mx::array(next)), mx::float32) * mx::array(10.f), 0);
  }
  const arch::Model& description() const override { return description_; }
  int64_t weight_bytes() const override { return 0; }
  const char* executor() const override { return "graph"; }
  arch::Model description_;
  std::vector<int> calls;

 private:
  int prompt_, seen_ = 0;
  std::string script_;
  bool ends_;
};

struct Result {
  std::string text;
  std::vector<gen::Response> all;
  gen::Response last;
};

Result collect(ScriptedModel& model, const std::vector<int>& prompt, const gen::Options& options) {
  Result result;
  result.last = gen::stream_generate(model, tokenizer(), prompt, options, [&](const gen::Response& r) {
    result.text += r.text;
    result.all.push_back(r);
    return true;
  });
  return result;
}

TEST(Generate, OneResponseATokenUntilTheEnd) {
  ScriptedModel model(3, "hello, wörld");
  const auto r = collect(model, {1, 2, 3}, {});
  EXPECT_EQ(r.text, "hello, wörld");
  EXPECT_EQ(r.all.size(), 14u);  // 13 bytes and the end
  EXPECT_EQ(r.last.finish, Finish::stop);
  EXPECT_EQ(r.last.token, kEos);
  EXPECT_EQ(r.last.generation_tokens, 14);
  EXPECT_EQ(r.last.prompt_tokens, 3);
  for (size_t i = 0; i + 1 < r.all.size(); ++i) EXPECT_EQ(r.all[i].finish, Finish::none);
}

TEST(Generate, MaxTokens) {
  ScriptedModel model(1, "hello");
  auto r = collect(model, {1}, {.max_tokens = 3});
  EXPECT_EQ(r.text, "hel");
  EXPECT_EQ(r.all.size(), 3u);
  EXPECT_EQ(r.last.finish, Finish::length);
  EXPECT_EQ(model.calls.size(), 3u);  // nothing is computed ahead of the last token
}

TEST(Generate, IgnoreEos) {
  ScriptedModel model(1, "ab");
  EXPECT_EQ(collect(model, {1}, {.max_tokens = 6, .ignore_eos = true}).text.substr(0, 2), "ab");
}

TEST(Generate, StopStringsCutInsideAToken) {
  ScriptedModel model(1, "one two three", false);
  auto r = collect(model, {1}, {.max_tokens = 100, .stop = {"two", "never"}});
  EXPECT_EQ(r.text, "one ");
  EXPECT_EQ(r.last.finish, Finish::stop);
  EXPECT_EQ(r.last.generation_tokens, 7);
  ScriptedModel other(1, "one tw");
  EXPECT_EQ(collect(other, {1}, {.stop = {"two"}}).text, "one tw");  // what was held back comes at the end
}

TEST(Generate, PrefillInChunksAndItsCallback) {
  ScriptedModel model(10, "ab");
  std::vector<std::pair<int, int>> calls;
  gen::Options options{.prefill_step_tokens = 4, .on_prefill = [&](int done, int total) { calls.emplace_back(done, total); }};
  EXPECT_EQ(collect(model, std::vector<int>(10, 5), options).text, "ab");
  EXPECT_EQ(calls, (std::vector<std::pair<int, int>>{{0, 10}, {4, 10}, {8, 10}, {10, 10}}));
  EXPECT_EQ(std::vector<int>(model.calls.begin(), model.calls.begin() + 4), (std::vector<int>{4, 4, 2, 1}));
}

TEST(Generate, Cancel) {
  std::atomic<bool> cancel = false;
  ScriptedModel model(1, "", false);
  std::string text;
  const auto last = gen::stream_generate(model, tokenizer(), {1}, {.max_tokens = -1, .cancel = &cancel}, [&](const gen::Response& r) {
    text += r.text;
    cancel = text.size() >= 5;
    return true;
  });
  EXPECT_EQ(last.finish, Finish::cancelled);
  EXPECT_EQ(text, "xxxxxx");
  cancel = true;
  ScriptedModel early(1, "abc");
  EXPECT_EQ(collect(early, {1}, {.cancel = &cancel}).last.finish, Finish::cancelled);
  EXPECT_TRUE(early.calls.empty());
}

TEST(Generate, TheCallbackCanStop) {
  ScriptedModel model(1, "", false);
  int calls = 0;
  const auto last = gen::stream_generate(model, tokenizer(), {1}, {.max_tokens = -1}, [&](const gen::Response&) { return ++calls < 4; });
  EXPECT_EQ(calls, 4);
  EXPECT_EQ(last.finish, Finish::cancelled);
}

TEST(Generate, Logprobs) {
  ScriptedModel model(1, "a");
  const auto r = collect(model, {1}, {.want_logprob = true, .want_logprobs = true});
  const float expected = 10.f - std::log(std::exp(10.f) + kVocab - 1);
  EXPECT_NEAR(r.all[0].logprob, expected, 1e-4);
  ASSERT_EQ(r.all[0].logprobs.size(), static_cast<size_t>(kVocab));
  EXPECT_NEAR(r.all[0].logprobs['a'], expected, 1e-4);
}

TEST(Generate, ProcessorsSeePromptAndAnswer) {
  ScriptedModel model(1, "aaaa");
  gen::Options options{.max_tokens = 3};
  options.processors.presence_penalty = 20.f;
  options.processors.presence_context_size = 1;
  // 'a' is forbidden right after itself: the lowest token takes its place.
  EXPECT_EQ(collect(model, {'z'}, options).text, std::string("a\0a", 3));
}

TEST(Generate, RefusesWhatItCannotDo) {
  ScriptedModel model(1, "a");
  EXPECT_THROW(collect(model, {}, {}), Error);
  EXPECT_THROW(collect(model, {kVocab}, {}), Error);
  EXPECT_THROW(collect(model, {-1}, {}), Error);
  EXPECT_THROW(collect(model, {1}, {.max_tokens = 0}), Error);
  EXPECT_THROW(collect(model, {1}, {.max_tokens = -2}), Error);
  EXPECT_THROW(collect(model, {1}, {.prefill_step_tokens = 0}), Error);
  EXPECT_THROW(collect(model, {1}, {.sampler = {.top_k = kVocab}}), Error);
}

TEST(Generate, RefusesPromptsThatDoNotFit) {
  ScriptedModel model(1, "a");
  arch::Attention attention;
  attention.heads = attention.kv_heads = 8;
  attention.head_dim = 64;
  model.description_.layers.assign(4, arch::Layer{arch::Step{.ops = {attention}}});
  ::setenv("MLXLM_MEMORY_BYTES", "3000000", 1);  // 8 KiB a token, and a block has 256
  try {
    collect(model, std::vector<int>(400, 1), {});
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::out_of_memory);
    EXPECT_NE(std::string(e.what()).find("0.003 GB"), std::string::npos) << e.what();
  }
  EXPECT_NO_THROW(collect(model, std::vector<int>(100, 1), {}));
  ::unsetenv("MLXLM_MEMORY_BYTES");
}

}  // namespace
