// A tiny checkpoint with a tokenizer of one token a byte, in a folder that goes with the test.
#pragma once

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <unordered_map>

#include <gtest/gtest.h>
#include <mlx/io.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <unistd.h>

#include "arch/registry.h"
#include "base/error.h"
#include "base/json.h"
#include "mlxlm/mlxlm.h"
#include "plan/plan.h"
#include "tiny_tokenizer.h"
#include "tiny_weights.h"

namespace mlxlm {

namespace fs = std::filesystem;
namespace mx = mlx::core;

constexpr int kVocab = 260, kEos = tests::byte_eos;

inline json tiny_config() {
  return {{"model_type", "llama"},          {"hidden_size", 32},        {"intermediate_size", 48},
          {"num_hidden_layers", 2},         {"num_attention_heads", 4}, {"num_key_value_heads", 2},
          {"rms_norm_eps", 1e-5},           {"vocab_size", kVocab},     {"tie_word_embeddings", false},
          {"max_position_embeddings", 512}, {"eos_token_id", kEos}};
}

inline void write(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline void write_weights(const fs::path& folder, const json& config) {
  std::unordered_map<std::string, mx::array> tensors;
  for (const auto& t : plan::tensors(arch::build(arch::Config(config)))) {
    const auto values = tests::tiny_weights(t.name(), t.shape);
    tensors.insert_or_assign(t.name(), mx::array(values.data(), mx::Shape(t.shape.begin(), t.shape.end()), mx::float32));
  }
  mx::save_safetensors((folder / "model.safetensors").string(), tensors);
}

class Api : public testing::Test {
 protected:
  Api() : folder(fs::temp_directory_path() / ("mlxlm-api-" + std::to_string(::getpid()))) {
    fs::remove_all(folder);
    fs::create_directories(folder);
    write(folder / "config.json", tiny_config().dump());
    tests::write_byte_tokenizer(folder);
    write_weights(folder, tiny_config());
  }
  ~Api() override { fs::remove_all(folder); }

  Model open() const { return load(folder.string(), {.offline = true}); }
  /** The message of load(), which must throw `code`. */
  std::string refusal(const fs::path& path, Code code) const {
    try {
      load(path.string(), {.offline = true});
    } catch (const Error& e) {
      EXPECT_EQ(code_name(e.code()), code_name(code)) << e.what();
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "loaded " << path;
    return "";
  }

  fs::path folder;
};

}  // namespace mlxlm
