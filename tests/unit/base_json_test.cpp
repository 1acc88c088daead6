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

TEST(Json, WritesInvalidUtf8AsReplacement) {
  EXPECT_EQ(to_text(json("a\xff")), "\"a\xEF\xBF\xBD\"");
}

}  // namespace
}  // namespace mlxlm
