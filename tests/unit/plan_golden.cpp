// Every config of tests/arch against what mlx_lm builds from it (tests/arch/make_goldens.py).
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>
#include <sstream>

#include <gtest/gtest.h>

#include "arch/registry.h"
#include "base/files.h"
#include "plan/plan.h"

namespace mlxlm {
namespace {

namespace fs = std::filesystem;

fs::path folder() {
  return fs::path(MLXLM_TEST_DATA).parent_path() / "arch";
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const auto& entry : fs::directory_iterator(folder())) {
    if (entry.path().extension() == ".json") found.push_back(entry.path().stem().string());
  }
  std::ranges::sort(found);
  return found;
}

const arch::Rope* rope_of(const arch::Layer& layer) {
  for (const auto& step : layer) {
    for (const auto& op : step.ops) {
      if (const auto* a = std::get_if<arch::Attention>(&op); a && a->rope) return &*a->rope;
      if (const auto* a = std::get_if<arch::Mla>(&op); a && a->rope) return &*a->rope;
    }
  }
  return nullptr;
}

std::string cache_text(const plan::LayerCache& cache) {
  switch (cache.kind) {
    case plan::CacheKind::none:
      return "none";
    case plan::CacheKind::full:
      return "full";
    case plan::CacheKind::rotating:
      return "rotating " + std::to_string(cache.window_tokens);
    case plan::CacheKind::chunked:
      return "chunked " + std::to_string(cache.window_tokens);
    case plan::CacheKind::recurrent:
      return "recurrent";
  }
  return "";
}

/** The lines of one kind ("tensor", "cache", "rope"), without that word. */
std::vector<std::string> lines_of(const std::string& name, const std::string& kind) {
  std::istringstream text(read_text_file(folder() / (name + ".txt")));
  std::vector<std::string> found;
  for (std::string line; std::getline(text, line);) {
    if (line.starts_with(kind + " ")) found.push_back(line.substr(kind.size() + 1));
  }
  return found;
}

class Golden : public testing::TestWithParam<std::string> {
 protected:
  Golden() : config(read_json_file(folder() / (GetParam() + ".json"))), model(arch::build(config)) {}
  arch::Config config;
  arch::Model model;
};

TEST_P(Golden, TensorNamesAndShapes) {
  std::vector<std::string> got;
  for (const auto& tensor : plan::tensors(model)) {
    std::string line = tensor.name();
    for (const int dim : tensor.shape) line += " " + std::to_string(dim);
    got.push_back(line);
  }
  std::ranges::sort(got);
  auto want = lines_of(GetParam(), "tensor");
  std::ranges::sort(want);
  EXPECT_FALSE(want.empty());
  EXPECT_EQ(got, want);
}

TEST_P(Golden, CacheLayout) {
  std::vector<std::string> got;
  for (const auto& cache : plan::cache_layout(model)) got.push_back(std::to_string(cache.layer) + " " + cache_text(cache));
  EXPECT_EQ(got, lines_of(GetParam(), "cache"));
}

TEST_P(Golden, RopeFrequencies) {
  constexpr int tokens = 100;  // as in the script
  std::set<int> rotated;
  for (const auto& line : lines_of(GetParam(), "rope")) {
    std::istringstream in(line);
    int layer = 0;
    double scale = 0;
    in >> layer >> scale;
    rotated.insert(layer);
    const auto* rope = rope_of(model.layers.at(layer));
    ASSERT_NE(rope, nullptr) << "layer " << layer;
    EXPECT_NEAR(rope->input_scale, scale, 1e-6);
    std::vector<double> want;
    for (double f = 0; in >> f;) want.push_back(f);
    const auto got = plan::rope_frequencies(*rope, tokens);
    ASSERT_EQ(got.size(), want.size()) << "layer " << layer;
    for (std::size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i] / want[i], 1.0, 2e-6) << "layer " << layer << " pair " << i;
  }
  for (int i = 0; i < static_cast<int>(model.layers.size()); ++i) {
    EXPECT_EQ(rotated.contains(i), rope_of(model.layers[i]) != nullptr) << "layer " << i;
  }
}

TEST_P(Golden, UnreadKeysAreThoseNobodyKnows) {
  EXPECT_EQ(config.unread_keys(), std::vector<std::string>{"unknown_knob"});
}

INSTANTIATE_TEST_SUITE_P(Arch, Golden, testing::ValuesIn(names()), [](const auto& info) { return info.param; });

}  // namespace
}  // namespace mlxlm
