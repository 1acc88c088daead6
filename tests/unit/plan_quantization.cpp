// config["quantization"] in all its spellings.
#include <gtest/gtest.h>

#include "base/error.h"
#include "plan/plan.h"

namespace mlxlm::plan {
namespace {

QuantConfig parse(const char* text) {
  return parse_quantization(parse_json(text, "test"));
}

void expect_quant(const std::optional<Quant>& q, const std::string& mode, int bits, int group_size) {
  ASSERT_TRUE(q.has_value());
  EXPECT_EQ(q->mode, mode);
  EXPECT_EQ(q->bits, bits);
  EXPECT_EQ(q->group_size, group_size);
}

TEST(Quantization, Absent) {
  EXPECT_FALSE(parse("{}").global);
  EXPECT_FALSE(parse(R"({"quantization": null})").global);
}

TEST(Quantization, GlobalWithDefaultsOfTheMode) {
  expect_quant(parse(R"({"quantization": {"group_size": 32, "bits": 8}})").global, "affine", 8, 32);
  expect_quant(parse(R"({"quantization": {"group_size": null, "bits": null}})").global, "affine", 4, 64);
  expect_quant(parse(R"({"quantization": {"mode": "mxfp4"}})").global, "mxfp4", 4, 32);
  expect_quant(parse(R"({"quantization": {"mode": "nvfp4", "group_size": 16, "bits": 4}})").global, "nvfp4", 4, 16);
  expect_quant(parse(R"({"quantization": {"mode": "mxfp8", "group_size": null, "bits": 8}})").global, "mxfp8", 8, 32);
}

TEST(Quantization, EntriesByPath) {
  const auto q = parse(R"({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4", "quant_method": "x", "linear_class": 3,
    "model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}, "model.layers.1.mlp.gate": {"group_size": null, "bits": 6},
    "lm_head": false, "model.embed_tokens": true}})");
  EXPECT_EQ(q.by_path.size(), 4u);
  expect_quant(q.by_path.at("model.layers.0.mlp.gate"), "affine", 8, 64);  // an entry without a mode is affine, whatever the global one
  expect_quant(q.by_path.at("model.layers.1.mlp.gate"), "affine", 6, 64);
  expect_quant(q.by_path.at("model.embed_tokens"), "mxfp4", 4, 32);
  EXPECT_FALSE(q.by_path.at("lm_head").has_value());
}

TEST(Quantization, Bad) {
  for (const char* text : {R"({"quantization": 4})", R"({"quantization": {"bits": 7}})", R"({"quantization": {"bits": 1}})",
                           R"({"quantization": {"bits": "4"}})", R"({"quantization": {"bits": 4, "group_size": 48}})",
                           R"({"quantization": {"bits": 4, "group_size": -64}})", R"({"quantization": {"mode": "ternary"}})",
                           R"({"quantization": {"mode": "mxfp4", "bits": 8}})", R"({"quantization": {"bits": 9223372036854775807}})",
                           R"({"quantization": {"bits": 4, "lm_head": {"bits": 99}}})"}) {
    try {
      parse(text);
      ADD_FAILURE() << text;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::bad_config) << text;
      EXPECT_TRUE(std::string(e.what()).starts_with("config.json: quantization")) << e.what();
    }
  }
}

TEST(Quantization, ForeignFormatsAreNamed) {
  for (const char* text :
       {R"({"quantization_config": {"quant_method": "gptq"}})", R"({"text_config": {"quantization_config": {"quant_method": "awq"}}})"}) {
    try {
      parse(text);
      ADD_FAILURE() << text;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::unsupported) << text;
    }
  }
  EXPECT_FALSE(parse(R"({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})").global);
  EXPECT_TRUE(parse(R"({"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"quant_method": "gptq"}})").global);
}

}  // namespace
}  // namespace mlxlm::plan
