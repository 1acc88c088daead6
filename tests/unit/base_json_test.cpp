// JSON: Python's numbers, positions in errors, hostile nesting.
#include "base/json.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"

namespace mlxlm {
namespace {

std::string failure(std::string_view text) {
  try {
    parse_json(text, "file.json");
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::bad_config);
    return e.what();
  }
  return "";
}

TEST(Json, KeepsKeyOrder) {
  EXPECT_EQ(to_text(parse_json(R"({"b":1,"a":2})", "x")), R"({"b":1,"a":2})");
}

TEST(Json, ReadsPythonNumbers) {
  const json value = parse_json(R"({"a": NaN, "b": [-Infinity, Infinity], "c": "NaN Infinity", "d": -1})", "x");
  EXPECT_TRUE(std::isnan(value["a"].get<double>()));
  EXPECT_EQ(value["b"][0].get<double>(), -INFINITY);
  EXPECT_EQ(value["b"][1].get<double>(), INFINITY);
  EXPECT_EQ(value["c"], "NaN Infinity");
  EXPECT_EQ(value["d"], -1);
}

TEST(Json, ReadsTaggedFloats) {
  EXPECT_EQ(parse_json(R"({"x": {"__float__": "Infinity"}})", "x")["x"].get<double>(), INFINITY);
}

TEST(Json, NamesThePlaceOfAnError) {
  EXPECT_EQ(failure("{\"a\": 1,\n  oops}"), "file.json: broken JSON at line 2, column 3");
  EXPECT_EQ(failure(" \n"), "file.json: empty, wanted JSON");
  EXPECT_NE(failure("{\"a\": 1"), "");
  EXPECT_NE(failure("1e999"), "");
  EXPECT_NE(failure("NaNa"), "");
}

TEST(Json, RefusesDeepNesting) {
  EXPECT_EQ(failure(std::string(100000, '[')), "file.json: nested deeper than 512 levels");
}

TEST(Json, ListsOfTextsInTwoForms) {
  const auto packed = [](const std::string& bytes) { return packed_texts(std::as_bytes(std::span(bytes))); };
  const std::string two("\2\0\0\0\0\0\0\0ab\0\0\0\0\0\0\0\0", 18);
  const auto one = packed(two), other = json({"ab", ""});
  EXPECT_EQ(texts_of(one, "x"), (std::vector<std::string_view>{"ab", ""}));
  EXPECT_EQ(texts_of(other, "x"), (std::vector<std::string_view>{"ab", ""}));
  EXPECT_TRUE(texts_of(packed(""), "x").empty());
  for (std::size_t size = 1; size < two.size(); ++size) {
    if (size == 10) continue;  // the end of the first
    EXPECT_THROW(texts_of(packed(two.substr(0, size)), "x"), Error) << size;
  }
  for (const auto& bad : {json(nullptr), json(1), json("ab"), json({"a", 1}), json::object()}) EXPECT_THROW(texts_of(bad, "x"), Error);
}

TEST(Json, WritesInvalidUtf8AsReplacement) {
  EXPECT_EQ(to_text(json("a\xff")), "\"a\xEF\xBF\xBD\"");
}

}  // namespace
}  // namespace mlxlm
