// Streams of text: detokenizers against decode(), and the stop matcher.
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>

#include "base/json.h"
#include "base/utf8.h"
#include "text/stop_matcher.h"
#include "text/tokenizer.h"

namespace {

using namespace mlxlm;
using namespace mlxlm::text;

const char* const kTexts[] = {
    "Hello, the capital of France is Paris.",
    "日本語のテキストです。東京",
    "👨‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇯🇵",
    "∀x∈ℝ: √(x²) = |x| ≤ ∞",
    "a ,b , c .  don't",
    "{\"a\": [1, {\"b\": null}]}",
    "one\ntwo\r\n\n\n  three\t four",
    "    ",
    "",
    "e\u0301 é a\u0300\u0316",
    "مرحبا بالعالم",
    "x\xEF\xBF\xBDy",
};

struct Streamed {
  std::string text;
  bool whole_characters = true;
};

Streamed stream(const Tokenizer& t, const std::vector<int>& ids) {
  Streamed out;
  const auto add = [&](const std::string& segment) {
    out.whole_characters = out.whole_characters && to_valid_utf8(segment) == segment;
    out.text += segment;
  };
  const auto d = t.make_detokenizer();
  d->reset();
  for (int id : ids) {
    d->add_token(id);
    add(d->take_segment());
  }
  d->finalize();
  add(d->take_segment());
  return out;
}

TEST(Detokenizer, StreamsWhatDecodeGives) {
  for (const char* name : {"byte_level", "spm", "spm_no_trim", "wordpiece"}) {
    const Tokenizer t = Tokenizer::from_folder(std::filesystem::path(MLXLM_TEST_DATA) / "text" / name, json::object());
    for (const std::string text : kTexts) {
      const auto ids = t.encode(text, false);
      std::string wanted = t.decode(ids);
      if (t.detokenizer_kind() == "bpe" && wanted.starts_with(' ')) wanted.erase(0, 1);  // as the reference
      const auto got = stream(t, ids);
      EXPECT_EQ(got.text, wanted) << name;
      EXPECT_TRUE(got.whole_characters) << name << ": " << text;
      EXPECT_EQ(got.text.find("\xEF\xBF\xBD") != std::string::npos, wanted.find("\xEF\xBF\xBD") != std::string::npos);
    }
  }
}

TEST(Detokenizer, SegmentsArriveAsSoonAsCertain) {
  const Tokenizer t = Tokenizer::from_folder(std::filesystem::path(MLXLM_TEST_DATA) / "text/byte_level", json::object());
  const auto d = t.make_detokenizer();
  const auto ids = t.encode("é👍", false);  // é: one merged token or two; the thumb: four bytes
  std::string text;
  for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
    d->add_token(ids[i]);
    text += d->take_segment();
  }
  EXPECT_EQ(text, "é");
  d->add_token(ids.back());
  EXPECT_EQ(d->take_segment(), "👍");
}

TEST(Detokenizer, UnfinishedCharacterAndForeignIds) {
  for (const char* name : {"byte_level", "spm", "spm_no_trim", "wordpiece"}) {
    const Tokenizer t = Tokenizer::from_folder(std::filesystem::path(MLXLM_TEST_DATA) / "text" / name, json::object());
    auto ids = t.encode("a👍", false);
    if (ids.size() > 2) ids.pop_back();
    EXPECT_TRUE(stream(t, ids).whole_characters);
    EXPECT_NO_THROW(stream(t, {-1, 1 << 30, 5, t.vocab_size()}));
    std::vector<int> all(static_cast<std::size_t>(t.vocab_size()));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
    EXPECT_TRUE(stream(t, all).whole_characters);
  }
}

TEST(Detokenizer, CostIsLinearWithoutNewlines) {
  const Tokenizer t = Tokenizer::from_folder(std::filesystem::path(MLXLM_TEST_DATA) / "text/wordpiece", json::object());
  const auto ids = t.encode(std::string(20000, 'a') + std::string(20000, ' '), false);
  std::vector<int> many;
  for (int i = 0; i < 20000; ++i) many.push_back(t.encode("the", false).front());
  const auto start = std::chrono::steady_clock::now();
  stream(t, many);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

std::string fed(StopMatcher matcher, const std::vector<std::string>& segments) {
  std::string out;
  for (const auto& segment : segments) out += matcher.feed(segment);
  return out + "|" + matcher.flush();
}

TEST(StopMatcher, CutsAtTheFirstStop) {
  EXPECT_EQ(fed(StopMatcher({"END"}), {"abcENDdef", "more"}), "abc|");
  EXPECT_EQ(fed(StopMatcher({"END"}), {"abcE", "N", "Dx"}), "abc|");
  EXPECT_EQ(fed(StopMatcher({"END"}), {"abcE", "Nx"}), "abcENx|");
  EXPECT_EQ(fed(StopMatcher({"END"}), {"abcE", "N"}), "abc|EN");
  EXPECT_EQ(fed(StopMatcher({"aab"}), {"a", "a", "a", "b"}), "a|");
  EXPECT_EQ(fed(StopMatcher({"yy", "x"}), {"axyy"}), "a|");
  EXPECT_EQ(fed(StopMatcher({"", "\n\n"}), {"a\n", "\nb"}), "a|");
  EXPECT_EQ(fed(StopMatcher({""}), {"abc"}), "abc|");
  EXPECT_EQ(fed(StopMatcher({}), {"abc"}), "abc|");
}

TEST(StopMatcher, AnyCuttingOfTheStreamGivesTheSame) {
  const std::string text = "one STOP two";
  for (std::size_t i = 0; i <= text.size(); ++i)
    for (std::size_t j = i; j <= text.size(); ++j)
      EXPECT_EQ(fed(StopMatcher({"STOP", "wo"}), {text.substr(0, i), text.substr(i, j - i), text.substr(j)}), "one |");
}

}  // namespace
