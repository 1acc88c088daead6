// Adapter folders: what fits is taken, what does not is named.
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <unistd.h>

#include "arch/registry.h"
#include "base/error.h"
#include "weights/adapter.h"

namespace mlxlm::weights {
namespace {

namespace fs = std::filesystem;

class Adapter : public testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(folder_);
    const auto config = read_json_file(fs::path(MLXLM_TEST_DATA).parent_path() / "arch" / "llama.json");
    model_ = arch::build(arch::Config(config));
    for (const auto& t : plan::tensors(model_)) {
      if (t.name() == module_ + ".weight") {
        out_ = t.shape[0];
        in_ = t.shape[1];
      }
      model_tensors_.insert_or_assign(t.name(), mx::zeros(mx::Shape(t.shape.begin(), t.shape.end())));
    }
    ASSERT_GT(out_, 0);
    config_(R"({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 3.0}})");
    weights_({{module_ + ".lora_a", mx::ones({in_, 2})}, {module_ + ".lora_b", mx::ones({2, out_})}});
  }
  void TearDown() override { fs::remove_all(folder_); }

  void config_(const std::string& text) { std::ofstream(folder_ / "adapter_config.json") << text; }
  void weights_(const Tensors& tensors) { save_safetensors(folder_ / "adapters.safetensors", tensors); }
  LowRanks apply() { return apply_adapter(folder_, model_tensors_, model_); }
  void fails(Code code, const std::string& says) {
    try {
      apply();
      ADD_FAILURE() << "wanted an error that says " << says;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code);
      EXPECT_NE(std::string(e.what()).find(says), std::string::npos) << e.what();
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    }
  }

  const std::string module_ = "model.layers.0.self_attn.q_proj";
  const fs::path folder_ = fs::path(testing::TempDir()) / ("adapter-unit-" + std::to_string(getpid()));
  arch::Model model_;
  Tensors model_tensors_;
  int in_ = 0, out_ = 0;
};

TEST_F(Adapter, IsReadByModule) {
  const auto adapters = apply();
  ASSERT_EQ(adapters.size(), 1u);
  EXPECT_EQ(adapters.begin()->first, module_);
  EXPECT_FLOAT_EQ(adapters.begin()->second.scale, 3.f);
  EXPECT_FALSE(adapters.begin()->second.m);
}

TEST_F(Adapter, FullReplacesTensors) {
  config_(R"({"fine_tune_type": "full"})");
  weights_({{"model.norm.weight", mx::full({model_.width}, 7.f)}});
  EXPECT_TRUE(apply().empty());
  EXPECT_FLOAT_EQ(mx::max(model_tensors_.at("model.norm.weight")).item<float>(), 7.f);
  weights_({{"model.norm.weight", mx::ones({3})}});
  fails(Code::bad_weights, "model.norm.weight");
  weights_({{"model.nrom.weight", mx::ones({3})}});
  fails(Code::bad_weights, "model.nrom.weight: the model has no such tensor");
}

TEST_F(Adapter, WhatIsMissingIsNamed) {
  fs::remove(folder_ / "adapters.safetensors");
  fails(Code::not_found, "adapters.safetensors");
  weights_({{module_ + ".lora_a", mx::ones({in_, 2})}});
  fails(Code::bad_weights, module_ + ".lora_b: missing");
  fs::remove(folder_ / "adapter_config.json");
  fails(Code::not_found, "adapter_config.json");
}

TEST_F(Adapter, BrokenConfigs) {
  config_("{");
  fails(Code::bad_config, "adapter_config.json");
  config_("[1]");
  fails(Code::bad_config, "wanted a JSON object");
  config_(R"({"fine_tune_type": "prefix"})");
  fails(Code::bad_config, "wanted lora, dora or full");
  config_(R"({"lora_parameters": {"rank": 2, "alpha": 16}})");
  fails(Code::bad_config, "wanted 'scale'");
  config_(R"({"lora_parameters": {"scale": "x"}})");
  fails(Code::bad_config, "wanted a number");
}

TEST_F(Adapter, TensorsThatDoNotFit) {
  weights_({{module_ + ".lora_a", mx::ones({in_ + 1, 2})}, {module_ + ".lora_b", mx::ones({2, out_})}});
  fails(Code::bad_weights, module_ + ".lora_a: shape");
  weights_({{module_ + ".lora_a", mx::ones({in_, 2})}, {module_ + ".lora_b", mx::ones({3, out_})}});
  fails(Code::bad_weights, module_ + ".lora_b: shape");
  weights_({{"model.layers.9.self_attn.q_proj.lora_a", mx::ones({in_, 2})}});
  fails(Code::bad_weights, "not an adapter of this model");
  weights_({{"lora_a", mx::ones({in_, 2})}});
  fails(Code::bad_weights, "not an adapter of this model");
}

}  // namespace
}  // namespace mlxlm::weights
