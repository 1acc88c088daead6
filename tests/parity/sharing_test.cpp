// Copies of a cache that share memory with it: what each goes on to say is what it would say with memory of its own, to the bit.
#include <algorithm>
#include <map>
#include <string>

#include <gtest/gtest.h>
#include <mlx/ops.h>

#include "parity_case.h"

namespace mlxlm::tests {
namespace {

using Tokens = std::vector<int>;

class Sharing : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const auto golden = load_golden(GetParam());
    model_ = make_model(make_checkpoint(golden.info.at("config"), golden.info));
  }

  /** A window goes back as long as it has not turned. */
  void widen_windows() {
    auto golden = load_golden(GetParam());
    auto& config = golden.info.at("config");
    if (!config.contains("sliding_window")) return;
    config["sliding_window"] = 4096;
    model_ = make_model(make_checkpoint(config, golden.info));
  }

  Tokens tokens(int count, int salt) const {
    Tokens out;
    for (int i = 0; i < count; ++i) out.push_back((i * 7 + salt * 31 + i * i % 11) % model_->description().vocab);
    return out;
  }
  std::vector<std::vector<float>> run(const Tokens& tokens, cache::Caches& caches) {
    return to_rows(model_->forward(batch_of(tokens), caches));
  }
  static cache::Caches copy(const cache::Caches& caches, bool sharing) {
    cache::Caches out;
    for (const auto& c : caches) out.push_back(c == nullptr ? nullptr : sharing ? c->copy() : c->separate_copy());
    return out;
  }
  static void trim(cache::Caches& caches, int count) {
    for (auto& c : caches) {
      if (c) {
        ASSERT_EQ(c->trim(count), count);
      }
    }
  }
  static int64_t bytes_of(const std::vector<cache::Caches*>& all) {
    std::map<const void*, int64_t> buffers;
    for (const auto* caches : all) {
      for (const auto& c : *caches) {
        if (c) c->add_buffers(buffers);
      }
    }
    int64_t total = 0;
    for (const auto& [where, bytes] : buffers) total += bytes;
    return total;
  }

  std::unique_ptr<model::CausalModel> model_;
};

TEST_P(Sharing, ChangesNothingOfEither) {
  for (const int prompt : {20, 63, 64, 65, 200, 300}) {
    auto source = cache::make_caches(model_->description());
    run(tokens(prompt, 1), source);
    auto apart = copy(source, false), shared = copy(source, true), source_apart = copy(source, false);
    EXPECT_EQ(run(tokens(70, 2), shared), run(tokens(70, 2), apart)) << prompt;
    EXPECT_EQ(run(tokens(5, 3), source), run(tokens(5, 3), source_apart)) << prompt;
    auto second = copy(shared, true), second_apart = copy(apart, false);
    source.clear();
    shared.clear();
    EXPECT_EQ(run(tokens(40, 4), second), run(tokens(40, 4), second_apart)) << prompt;
  }
}

TEST_P(Sharing, SurvivesForgetting) {
  widen_windows();
  for (const int forgotten : {1, 10, 64, 100, 137, 199, 200}) {
    auto source = cache::make_caches(model_->description());
    run(tokens(200, 1), source);
    auto apart = copy(source, false), shared = copy(source, true), watched = copy(source, true), watched_apart = copy(source, false);
    trim(shared, forgotten);
    trim(apart, forgotten);
    EXPECT_EQ(run(tokens(30, 2), shared), run(tokens(30, 2), apart)) << forgotten;
    // The lender itself goes back and writes where others look.
    auto lender_apart = copy(source, false);
    trim(source, forgotten);
    trim(lender_apart, forgotten);
    EXPECT_EQ(run(tokens(90, 3), source), run(tokens(90, 3), lender_apart)) << forgotten;
    EXPECT_EQ(run(tokens(3, 4), watched), run(tokens(3, 4), watched_apart)) << forgotten;
  }
}

TEST_P(Sharing, ALenderMayGoBackWhenItsBorrowersChange) {
  widen_windows();
  auto source = cache::make_caches(model_->description());
  run(tokens(260, 1), source);
  auto large = copy(source, true);
  trim(source, 60);
  auto small = copy(source, true), small_apart = copy(source, false);
  large.clear();
  trim(source, 100);
  run(tokens(50, 2), source);  // writes rows that only the small one still sees
  EXPECT_EQ(run(tokens(4, 3), small), run(tokens(4, 3), small_apart));
}

TEST_P(Sharing, FilesHoldEverything) {
  auto source = cache::make_caches(model_->description());
  run(tokens(150, 1), source);
  auto shared = copy(source, true), apart = copy(source, false);
  run(tokens(9, 2), shared);
  run(tokens(9, 2), apart);
  for (std::size_t i = 0; i < shared.size(); ++i) {
    if (!shared[i]) continue;
    const auto a = shared[i]->stored(), b = apart[i]->stored();
    ASSERT_EQ(a.arrays.size(), b.arrays.size());
    for (const auto& [name, value] : a.arrays) {
      if (value) {
        EXPECT_TRUE(mx::array_equal(*value, *b.arrays.at(name)).item<bool>()) << name;
      }
    }
  }
}

TEST_P(Sharing, CostsWhatIsNotShared) {
  auto source = cache::make_caches(model_->description());
  run(tokens(640, 1), source);
  std::vector<cache::Caches> copies(8);
  std::vector<cache::Caches*> all{&source};
  for (auto& c : copies) {
    c = copy(source, true);
    all.push_back(&c);
  }
  int64_t wanted = 0;
  for (const auto& c : source) {
    if (c) wanted += c->bytes() * (dynamic_cast<cache::KvCache*>(c.get()) != nullptr ? 1 : 9);
  }
  EXPECT_EQ(bytes_of(all), wanted);
}

INSTANTIATE_TEST_SUITE_P(Golden, Sharing, testing::Values("llama.f32", "llama.q4", "qwen3.f16", "gemma3_text.f32", "phi3.f32"), test_name);

}  // namespace
}  // namespace mlxlm::tests
