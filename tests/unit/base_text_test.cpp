// UTF-8, globs, nearest names, files.
#include <gtest/gtest.h>

#include <unistd.h>
#include <filesystem>

#include "base/error.h"
#include "base/files.h"
#include "base/text_util.h"
#include "base/utf8.h"

namespace mlxlm {
namespace {

TEST(Utf8, HoldsBackIncompleteCharacters) {
  const std::string fish = "a\xF0\x9F\x90\x9F";
  EXPECT_EQ(complete_utf8_prefix(fish), 5u);
  for (std::size_t n = 2; n < 5; ++n) EXPECT_EQ(complete_utf8_prefix(fish.substr(0, n)), 1u);
  EXPECT_EQ(complete_utf8_prefix(""), 0u);
  EXPECT_EQ(complete_utf8_prefix("a\xff"), 2u);     // never valid: nothing to wait for
  EXPECT_EQ(complete_utf8_prefix("\xE0\x80"), 2u);  // overlong
  EXPECT_EQ(complete_utf8_prefix("\xED\xA0"), 2u);  // surrogate
}

TEST(Utf8, ReplacesLikePython) {
  EXPECT_EQ(to_valid_utf8("a\xff"
                          "b"),
            "a\xEF\xBF\xBD"
            "b");
  EXPECT_EQ(to_valid_utf8("\xF0\x9F\x90"), "\xEF\xBF\xBD");  // one maximal part
  EXPECT_EQ(to_valid_utf8("\xE2\x82"
                          "x"),
            "\xEF\xBF\xBD"
            "x");
  EXPECT_EQ(to_valid_utf8("\xC0\xAF"), "\xEF\xBF\xBD\xEF\xBF\xBD");
}

TEST(Utf8, CodePointsRoundTrip) {
  for (char32_t c : {U'a', U'é', U'日', U'🐟'}) {
    std::string text;
    append_utf8(text, c);
    std::size_t at = 0;
    EXPECT_EQ(next_code_point(text, at), c);
    EXPECT_EQ(at, text.size());
  }
}

TEST(TextUtil, Globs) {
  EXPECT_TRUE(glob_match("*.mlp.*_proj.weight", "model.layers.0.mlp.up_proj.weight"));
  EXPECT_FALSE(glob_match("*.mlp.*_proj.weight", "model.layers.0.mlp.up_proj.bias"));
  EXPECT_TRUE(glob_match("*", ""));
  EXPECT_FALSE(glob_match("", "a"));
  EXPECT_FALSE(glob_match(std::string(50, '*') + "b", std::string(2000, 'a')));
}

TEST(TextUtil, NearestNames) {
  const std::vector<std::string> names = {"llama", "qwen2", "gemma3_text"};
  EXPECT_EQ(nearest_names("lama", names), std::vector<std::string>{"llama"});
  EXPECT_TRUE(nearest_names("zzzzzzzz", names).empty());
  EXPECT_TRUE(nearest_names(std::string(1 << 20, 'a'), names).empty());
}

class Files : public testing::Test {
 protected:
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("mlxlm_files_" + std::to_string(::getpid()));
  void TearDown() override { std::filesystem::remove(path); }
};

TEST_F(Files, WriteAndRead) {
  write_file_atomically(path, "one");
  write_file_atomically(path, "two");
  EXPECT_EQ(read_text_file(path), "two");
  write_file_atomically(path, "");
  EXPECT_EQ(read_text_file(path), "");
}

TEST_F(Files, ErrorsNameTheFile) {
  try {
    read_text_file("/nonexistent/x");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::not_found);
    EXPECT_STREQ(e.what(), "/nonexistent/x: no such file");
  }
  EXPECT_THROW(read_text_file("/"), Error);
  EXPECT_THROW(write_file_atomically("/nonexistent/x", "a"), Error);
}

}  // namespace
}  // namespace mlxlm
