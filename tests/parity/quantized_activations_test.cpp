// Activations rounded to the format of the weights. The reference cannot run it on a CPU, so the formula itself is the witness.
#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "nn/nn.h"
#include "parity_case.h"

namespace mlxlm::tests {
namespace {

class QuantizedActivations : public testing::TestWithParam<const char*> {};

TEST_P(QuantizedActivations, AreRoundedBeforeTheProduct) {
  const std::string mode = GetParam();
  const plan::Quant quant = plan::mode_default(mode);
  const auto x = mx::sin(mx::reshape(mx::arange(3 * 64, mx::float32), {1, 3, 64})) * mx::array(3.f);
  const auto w = mx::quantize(mx::cos(mx::reshape(mx::arange(32 * 64, mx::float32), {32, 64})), quant.group_size, quant.bits, mode);
  nn::Linear::Weights weights{.weight = w[0], .scales = w[1]};
  mx::eval({weights.weight, *weights.scales});
  weights.quant = quant;
  const auto plain = nn::Linear({weights})(x);
  weights.quantize_input = true;
  const auto rounded = nn::Linear({weights})(x);
  const auto parts = mx::quantize(mx::reshape(x, {3, 64}), quant.group_size, quant.bits, mode);
  const auto x_rounded = mx::dequantize(parts[0], parts[1], std::nullopt, quant.group_size, quant.bits, mode, std::nullopt, mx::float32);
  const auto dense = mx::dequantize(w[0], w[1], std::nullopt, quant.group_size, quant.bits, mode, std::nullopt, mx::float32);
  const auto wanted = mx::matmul(x_rounded, mx::transpose(dense));
  EXPECT_LT(mx::max(mx::abs(mx::squeeze(rounded, 0) - wanted)).item<float>(), 1e-4f);
  EXPECT_GT(mx::max(mx::abs(plain - rounded)).item<float>(), 1e-3f) << "nothing was rounded";
}

INSTANTIATE_TEST_SUITE_P(Mode, QuantizedActivations, testing::Values("mxfp8", "nvfp4"));

TEST(QuantizedActivationsOfModels, MoveLogitsALittle) {
  const auto golden = load_golden("qwen3.f32");
  auto config = golden.info.at("config");
  config["quantization"] = {{"mode", "mxfp8"}, {"bits", 8}, {"group_size", 32}};
  std::vector<std::vector<float>> rows;
  for (const bool quantize : {false, true}) {
    auto checkpoint = make_checkpoint(config, golden.info);
    checkpoint.quantize_activations = quantize;
    cache::Caches none;
    rows.push_back(last_row(make_model(std::move(checkpoint))->forward(batch_of(golden.tokens("prompt")), none)));
  }
  EXPECT_GT(difference(rows[1], rows[0]), 1e-4);
  EXPECT_LT(difference(rows[1], rows[0]), 0.2);
}

TEST(QuantizedActivationsOfModels, OtherFormatsAreRefused) {
  for (const char* name : {"llama.q4", "llama.f32"}) {
    const auto golden = load_golden(name);
    auto checkpoint = make_checkpoint(golden.info.at("config"), golden.info);
    checkpoint.quantize_activations = true;
    EXPECT_THROW(make_model(std::move(checkpoint)), Error) << name;
  }
}

}  // namespace
}  // namespace mlxlm::tests
