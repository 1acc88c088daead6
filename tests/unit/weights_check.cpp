// Checkpoints against their description: what is missing, left over or of another form, and how each module is quantized.
#include <mlx/ops.h>

#include "unit/weights_support.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

using tests::expect_error;

/** One llama layer of width 64, not tied. */
arch::Model tiny() {
  arch::Model model;
  model.vocab = 96;
  model.width = 64;
  model.final_norm = {.at = "norm"};
  const arch::Attention attention{.heads = 2, .kv_heads = 1, .head_dim = 32};
  const arch::Glu glu{.hidden = 128};
  model.layers.push_back({arch::Step{.pre = arch::Norm{.at = "input_layernorm"}, .ops = {attention}},
                          arch::Step{.pre = arch::Norm{.at = "post_attention_layernorm"}, .ops = {glu}}});
  return model;
}

const std::string q_proj = "model.layers.0.self_attn.q_proj";
const std::string down_proj = "model.layers.0.mlp.down_proj";

Tensors plain_tensors(const arch::Model& model, mx::Dtype dtype = mx::float32) {
  Tensors tensors;
  for (const auto& t : plan::tensors(model)) tensors.emplace(t.name(), mx::zeros(mx::Shape(t.shape.begin(), t.shape.end()), dtype));
  return tensors;
}

void quantize(Tensors& tensors, const std::string& path, int group_size, int bits, const std::string& mode = "affine") {
  const auto parts = mx::quantize(tensors.at(path + ".weight"), group_size, bits, mode);
  tensors.insert_or_assign(path + ".weight", parts.at(0));
  tensors.insert_or_assign(path + ".scales", parts.at(1));
  if (parts.size() > 2) tensors.insert_or_assign(path + ".biases", parts.at(2));
}

const plan::QuantConfig global_4{.global = plan::Quant{}};

void refuse(const Tensors& tensors, const std::vector<std::string>& parts, const plan::QuantConfig& config = {}) {
  expect_error(Code::bad_weights, parts, [&] { check(tensors, tiny(), config, "here"); });
}

TEST(WeightCheck, AFittingCheckpoint) {
  for (const auto dtype : {mx::float32, mx::float16, mx::bfloat16})
    EXPECT_TRUE(check(plain_tensors(tiny(), dtype), tiny(), {}, "here").empty());
  EXPECT_TRUE(check(plain_tensors(tiny()), tiny(), global_4, "here").empty()) << "quantization is what the tensors say";
}

TEST(WeightCheck, Missing) {
  auto tensors = plain_tensors(tiny());
  tensors.erase(q_proj + ".weight");
  refuse(tensors, {"here: missing " + q_proj + ".weight"});
  tensors.emplace("model.layers.0.self_attn.q_prj.weight", mx::zeros({64, 64}));
  refuse(tensors, {"missing " + q_proj + ".weight; nearest to the first that is there: model.layers.0.self_attn.q_prj.weight"});
  refuse({}, {"missing lm_head.weight, model.embed_tokens.weight, ", " and 9 more"});
}

TEST(WeightCheck, LeftOver) {
  auto tensors = plain_tensors(tiny());
  tensors.emplace(q_proj + ".bias", mx::zeros({64}));
  refuse(tensors,
         {"here: got tensors that the model does not have: " + q_proj + ".bias; nearest to the first that is known: ", q_proj + ".weight"});
  for (int i = 0; i < 50; ++i) tensors.emplace("extra" + std::to_string(i), mx::zeros({1}));
  refuse(tensors, {"does not have: extra0, extra1, extra10 and 48 more"});
  auto hostile = plain_tensors(tiny());
  hostile.emplace("a\n" + std::string(100'000, 'x'), mx::zeros({1}));
  refuse(hostile, {"does not have: a?xxx"});
}

TEST(WeightCheck, TiedHeads) {
  auto model = tiny();
  model.tied_unless_stored = true;
  auto tensors = plain_tensors(tiny());
  EXPECT_NO_THROW(check(tensors, model, {}, "here"));
  tensors.erase("lm_head.weight");
  EXPECT_NO_THROW(check(tensors, model, {}, "here"));
  refuse(tensors, {"missing lm_head.weight"});
}

TEST(WeightCheck, WrongShape) {
  auto tensors = plain_tensors(tiny());
  for (const auto& shape : {mx::Shape{64, 63}, mx::Shape{64}, mx::Shape{}, mx::Shape{1, 64, 64}, mx::Shape{0, 64}}) {
    tensors.insert_or_assign(q_proj + ".weight", mx::zeros(shape));
    refuse(tensors, {"here: " + q_proj + ".weight: shape [", "], wanted [64, 64]"});
  }
}

TEST(WeightCheck, WrongDtype) {
  auto tensors = plain_tensors(tiny());
  tensors.insert_or_assign("model.norm.weight", mx::zeros({64}, mx::int32));
  refuse(tensors, {"here: model.norm.weight: dtype int32, wanted float32, float16 or bfloat16"});
  tensors.insert_or_assign("model.norm.weight", mx::zeros({64}, mx::float64));
  refuse(tensors, {"model.norm.weight: dtype float64"});
  auto quantized = plain_tensors(tiny());
  quantize(quantized, q_proj, 64, 4);
  const auto good = quantized;
  quantized.insert_or_assign(q_proj + ".weight", mx::zeros({64, 8}, mx::int32));
  refuse(quantized, {q_proj + ".weight: dtype int32, wanted uint32 (packed codes)"}, global_4);
  quantized = good;
  quantized.insert_or_assign(q_proj + ".biases", mx::zeros({64, 1}, mx::int32));
  refuse(quantized, {q_proj + ".biases: dtype int32, wanted float32"}, global_4);
}

TEST(WeightCheck, QuantizationFromShapes) {
  struct Case {
    int group_size, bits;
    std::string mode;
  };
  for (const auto& c : {Case{64, 4, "affine"}, Case{32, 8, "affine"}, Case{64, 2, "affine"}, Case{32, 3, "affine"}, Case{64, 5, "affine"},
                        Case{64, 6, "affine"}, Case{32, 4, "mxfp4"}, Case{32, 8, "mxfp8"}, Case{16, 4, "nvfp4"}}) {
    auto tensors = plain_tensors(tiny());
    quantize(tensors, q_proj, c.group_size, c.bits, c.mode);
    quantize(tensors, down_proj, 128, 4);
    const auto quant = check(tensors, tiny(), global_4, "here");
    ASSERT_EQ(quant.size(), 2u);
    EXPECT_EQ(quant.at(q_proj).bits, c.bits) << c.mode;
    EXPECT_EQ(quant.at(q_proj).group_size, c.group_size) << c.mode << c.bits;
    EXPECT_EQ(quant.at(q_proj).mode, c.mode);
    EXPECT_EQ(quant.at(down_proj).group_size, 128);
  }
}

TEST(WeightCheck, EmbeddingsAndHeadsToo) {
  auto tensors = plain_tensors(tiny());
  quantize(tensors, "model.embed_tokens", 64, 4);
  quantize(tensors, "lm_head", 32, 6);
  const auto quant = check(tensors, tiny(), global_4, "here");
  EXPECT_EQ(quant.at("model.embed_tokens").bits, 4);
  EXPECT_EQ(quant.at("lm_head").bits, 6);
}

TEST(WeightCheck, OverridesByPath) {
  auto tensors = plain_tensors(tiny());
  quantize(tensors, q_proj, 32, 8);
  auto config = global_4;
  config.by_path[q_proj] = plan::Quant{.mode = "affine", .bits = 8, .group_size = 32};
  EXPECT_EQ(check(tensors, tiny(), config, "here").at(q_proj).bits, 8);
  config.by_path[q_proj]->group_size = 64;
  refuse(tensors, {q_proj + ".scales: shape [64, 2], wanted [64, 1]"}, config);
  config.by_path[q_proj] = plan::Quant{.mode = "affine", .bits = 4, .group_size = 32};
  refuse(tensors, {q_proj + ".weight: shape [64, 16], wanted [64, 8]"}, config);
  config.by_path[q_proj] = plan::Quant{.mode = "affine", .bits = 4, .group_size = 128};
  refuse(tensors, {q_proj, "groups of 128 do not divide 64"}, config);
  config.by_path[q_proj] = plan::Quant{.mode = "mxfp8", .bits = 8, .group_size = 32};
  refuse(tensors, {q_proj + ".scales: dtype float32, wanted uint8 (scales)"}, config);
}

TEST(WeightCheck, OverrideFalse) {
  auto tensors = plain_tensors(tiny());
  auto config = global_4;
  config.by_path[q_proj] = std::nullopt;
  EXPECT_TRUE(check(tensors, tiny(), config, "here").empty());
  quantize(tensors, q_proj, 64, 4);
  refuse(tensors, {q_proj + ".weight: shape [64, 8], wanted [64, 64]"}, config);
}

TEST(WeightCheck, QuantizedWithoutConfig) {
  auto tensors = plain_tensors(tiny());
  quantize(tensors, q_proj, 64, 4);
  refuse(tensors, {q_proj + ".scales: got a quantized tensor, but config.json says nothing of quantization"});
}

TEST(WeightCheck, IncompleteQuantization) {
  auto tensors = plain_tensors(tiny());
  quantize(tensors, q_proj, 64, 4);
  const auto good = tensors;
  tensors.erase(q_proj + ".biases");
  refuse(tensors, {"missing " + q_proj + ".biases"}, global_4);
  tensors = good;
  tensors.erase(q_proj + ".scales");
  refuse(tensors, {q_proj + ".weight: shape [64, 8], wanted [64, 64]"}, global_4);
  tensors = good;
  tensors.erase(q_proj + ".weight");
  refuse(tensors, {"missing " + q_proj + ".weight"}, global_4);
}

TEST(WeightCheck, HostileScales) {
  for (const auto& shape : {mx::Shape{}, mx::Shape{64, 0}, mx::Shape{64, 3}, mx::Shape{64, 1000}, mx::Shape{1}}) {
    for (const auto dtype : {mx::float32, mx::uint8}) {
      auto tensors = plain_tensors(tiny());
      quantize(tensors, q_proj, 64, 4);
      tensors.insert_or_assign(q_proj + ".scales", mx::zeros(shape, dtype));
      refuse(tensors, {q_proj}, global_4);
    }
  }
  for (const auto& shape : {mx::Shape{}, mx::Shape{64, 0}, mx::Shape{64, 1 << 28}, mx::Shape{0, 8}}) {
    auto tensors = plain_tensors(tiny());
    quantize(tensors, q_proj, 64, 4);
    tensors.insert_or_assign(q_proj + ".weight", mx::zeros(shape, mx::uint32));
    refuse(tensors, {q_proj}, global_4);
  }
}

}  // namespace
}  // namespace mlxlm::weights
