// Caches that share memory on the real engine: what they hold is never more than what was reserved for them.
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "gen/runner.h"
#include "parity/parity_case.h"

namespace mlxlm::tests {
namespace {

using namespace engine;

std::unique_ptr<model::CausalModel> tiny(const std::string& name) {
  const auto golden = load_golden(name);
  return make_model(make_checkpoint(golden.info.at("config"), golden.info));
}

/** `shared` tokens that all have, then others. */
std::vector<int> prompt(int length, int shared, int salt, int vocab) {
  std::vector<int> tokens;
  for (int i = 0; i < length; ++i) tokens.push_back((i * i * 7 + i * 31 + (i < shared ? 0 : salt * 13 + 1)) % vocab);
  return tokens;
}

class Sharing : public testing::TestWithParam<std::string> {};

/** A few tokens of a long prompt are used again, which keeps all memory of that prompt alive. */
TEST_P(Sharing, HoldsNoMoreThanWasReserved) {
  const auto model = tiny(GetParam());
  const int vocab = model->description().vocab;
  const Limits limits{.prefix_cache_bytes = int64_t{1} << 30};
  gen::ModelRunner runner(*model, limits);
  Engine engine(runner, limits);
  const auto drain = [&](int most) {
    for (int i = 0; i < most && engine.has_work(); ++i) {
      for (const auto& e : engine.step().events) EXPECT_FALSE(e.error);
      for (const auto& violation : check_invariants(engine.snapshot())) ADD_FAILURE() << violation;
      if (testing::Test::HasFailure()) return;
    }
  };
  engine.submit({.tokens = prompt(2000, 2000, 0, vocab), .max_tokens = 1});
  drain(100);
  engine.submit({.tokens = prompt(1564, 64, 1, vocab), .max_tokens = 1});
  drain(100);
  engine.submit({.tokens = prompt(100, 70, 2, vocab), .max_tokens = -1});  // reserves as it grows
  drain(1200);
}

INSTANTIATE_TEST_SUITE_P(Family, Sharing, testing::Values("llama.f32", "qwen3.f32", "falcon_h1.f32", "llama4.f32", "gemma3_text.f32"),
                         test_name);

}  // namespace
}  // namespace mlxlm::tests
