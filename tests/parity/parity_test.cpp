// Logits of tiny models against mlx_lm's. Bounds are parts of the spread of a row of logits.
#include <algorithm>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <mlx/ops.h>

#include "base/text_util.h"
#include "parity_case.h"

namespace mlxlm::tests {
namespace {

/** float32: another order of summation moves a logit by about 1e-6 of the spread; a wrong formula by 1e-2.
 *  float16 and bfloat16: the golden says how far its own rounding took the reference from float32 arithmetic. If ours went no further, the
 * two are at most twice that apart. */
double bound_of(const Golden& golden) {
  return golden.info.at("dtype") == "f32" ? 1e-4 : 2 * golden.info.at("rounding").get<double>();
}

/** The dynamic kind rotates each call by the length so far, so pieces are another computation than the whole, also in the reference. */
bool has_dynamic_rope(const arch::Model& model) {
  for (const auto& layer : model.layers) {
    for (const auto& step : layer) {
      const auto* a = std::get_if<arch::Attention>(&step.ops.at(0));
      if (a != nullptr && a->rope && a->rope->kind == arch::RopeKind::dynamic_ntk) return true;
    }
  }
  return false;
}

class Parity : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    golden_ = load_golden(GetParam());
    bound_ = bound_of(golden_);
    model_ = make_model(make_checkpoint(golden_.info.at("config"), golden_.info));
    caches_ = cache::make_caches(model_->description());
  }

  void near(const std::vector<float>& got, const std::vector<float>& wanted, const std::string& what) {
    const double d = difference(got, wanted);
    worst_ = std::max(worst_, d);
    EXPECT_LE(d, bound_) << what;
  }

  void TearDown() override { RecordProperty("worst", fmt::format("{:.2e}", worst_)); }

  mx::array run(const std::vector<int>& tokens) { return model_->forward(batch_of(tokens), caches_); }

  Golden golden_;
  double bound_ = 0, worst_ = 0;
  std::unique_ptr<model::CausalModel> model_;
  cache::Caches caches_, none_;
};

TEST_P(Parity, Weights) {
  const auto made = make_checkpoint(golden_.info.at("config"), golden_.info);
  EXPECT_EQ(checksum(made.tensors), golden_.info.at("crc32").get<uint32_t>())
      << "the parameters differ from the reference's, so logits must too";
}

TEST_P(Parity, Prompt) {
  const auto got = to_rows(model_->forward(batch_of(golden_.tokens("prompt")), none_));
  const auto rows = golden_.tokens("prompt_rows");
  const auto wanted = golden_.rows("prompt_logits");
  for (std::size_t i = 0; i < rows.size(); ++i) near(got.at(rows[i]), wanted[i], "row " + std::to_string(rows[i]));
}

/** Decodes the reference's own tokens, so that one near tie does not hide all that follows it. */
TEST_P(Parity, Decode) {
  const auto tokens = golden_.tokens("decode"), rows = golden_.tokens("decode_rows");
  const auto wanted = golden_.rows("decode_logits");
  auto row = last_row(run(golden_.tokens("prompt")));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const bool tie = lead(row) <= 2 * bound_;
    EXPECT_TRUE(argmax(row) == tokens[i] || tie) << "token " << i << ": got " << argmax(row) << ", wanted " << tokens[i];
    if (const auto at = std::ranges::find(rows, int(i)); at != rows.end())
      near(row, wanted[at - rows.begin()], "token " + std::to_string(i));
    row = last_row(run({tokens[i]}));
  }
}

TEST_P(Parity, Batch) {
  const auto prompt = golden_.tokens("prompt");
  auto both = prompt;
  both.insert(both.end(), prompt.rbegin(), prompt.rend());
  const int length = static_cast<int>(prompt.size());
  const auto got = model_->run(mx::flatten(batch_of(both)), {{length}, {length}});
  const auto wanted = golden_.rows("batch_logits");
  for (int b = 0; b < 2; ++b) near(row_of(got, b), wanted[b], "sequence " + std::to_string(b));
}

/** A prompt beyond every window, whole and in pieces of seven tokens, and one token after it. */
TEST_P(Parity, LongPrompt) {
  const auto prompt = golden_.tokens("long_prompt");
  const auto wanted = golden_.rows("long_logits");
  near(last_row(run(prompt)), wanted[0], "whole");
  near(last_row(run({prompt[0]})), wanted[1], "whole, and a token");
  if (has_dynamic_rope(model_->description())) return;
  caches_ = cache::make_caches(model_->description());
  std::vector<float> row;
  for (std::size_t at = 0; at < prompt.size(); at += 7) {
    row = last_row(run({prompt.begin() + at, prompt.begin() + std::min(at + 7, prompt.size())}));
  }
  near(row, wanted[0], "in pieces");
  near(last_row(run({prompt[0]})), wanted[1], "in pieces, and a token");
}

INSTANTIATE_TEST_SUITE_P(Golden, Parity, testing::ValuesIn(golden_names()), test_name);

/** Every config of tests/arch has goldens, and they were made from what stands there now. */
TEST(Goldens, CoverEveryConfig) {
  int configs = 0;
  for (const auto& entry : fs::directory_iterator(fs::path(MLXLM_TEST_DATA).parent_path() / "arch")) {
    if (entry.path().extension() != ".json") continue;
    ++configs;
    const auto config = read_json_file(entry.path());
    for (const std::string kind : {".f32", ".q4"}) {
      const auto name = entry.path().stem().string() + kind;
      ASSERT_TRUE(std::ranges::binary_search(golden_names(), name)) << "no golden " << name << ": run ./dev golden";
      auto made_from = load_golden(name).info.at("config");
      made_from.erase("quantization");
      EXPECT_EQ(made_from, config) << name << " was made from another config: run ./dev golden";
    }
  }
  EXPECT_GT(configs, 10);
}

}  // namespace
}  // namespace mlxlm::tests
