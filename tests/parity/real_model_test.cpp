// The default model against mlx_lm with the same weights: tokens of the prompt and greedy tokens (parity/make_real_goldens.py).
#include <cstdlib>
#include <filesystem>

#include <gtest/gtest.h>

#include "base/json.h"
#include "gen/generate.h"

namespace mlxlm {
namespace {

namespace fs = std::filesystem;

fs::path default_model() {
  if (const char* path = std::getenv("MLXLM_DEFAULT_MODEL")) return path;
  return fs::path(MLXLM_TEST_DATA).parent_path().parent_path() / "models" / "SmolLM2-135M-Instruct.gguf";
}

class RealModel : public testing::Test {
 protected:
  void SetUp() override {
    if (!fs::exists(default_model())) GTEST_SKIP() << "no default model at " << default_model() << ": run ./dev setup";
    goldens_ = read_json_file(fs::path(MLXLM_TEST_DATA) / "parity" / "smollm2_greedy.json");
    loaded_ = model::load(default_model());
    tokenizer_.emplace(text::Tokenizer::from_gguf(*loaded_.gguf_metadata, loaded_.config));
  }

  json goldens_;
  model::Loaded loaded_;
  std::optional<text::Tokenizer> tokenizer_;
};

TEST_F(RealModel, PromptTokensAreTheReferences) {
  ASSERT_EQ(goldens_.size(), 3u);
  for (const auto& golden : goldens_) {
    const json messages{{{"role", "user"}, {"content", golden.at("message")}}};
    EXPECT_EQ(tokenizer_->encode(tokenizer_->apply_chat_template(messages), false), golden.at("prompt").get<std::vector<int>>());
  }
}

TEST_F(RealModel, GreedyTokensAreTheReferences) {
  for (const auto& golden : goldens_) {
    const auto wanted = golden.at("tokens").get<std::vector<int>>();
    gen::Options options;
    options.max_tokens = static_cast<int>(wanted.size());
    std::vector<int> got;
    std::string text;
    gen::stream_generate(*loaded_.model, *tokenizer_, golden.at("prompt").get<std::vector<int>>(), options,
                         [&](const gen::Response& response) {
                           got.push_back(response.token);
                           text += response.text;
                           return true;
                         });
    EXPECT_EQ(got, wanted) << "got: " << text << "\nwanted: " << golden.at("text") << "\nleads of the best logit: " << golden.at("leads");
  }
}

}  // namespace
}  // namespace mlxlm
