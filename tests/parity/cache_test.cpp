// Quantized caches and prompt-cache files against mlx_lm's: tests/data/caches, made by make_golden_caches.py.
#include <filesystem>

#include <gtest/gtest.h>
#include <mlx/io.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <unistd.h>

#include "cache/prompt_file.h"
#include "parity_case.h"

namespace mlxlm::tests {
namespace {

struct CacheGoldens {
  json cases;
  weights::Tensors answers;
};

fs::path folder() {
  return fs::path(MLXLM_TEST_DATA) / "caches";
}

const CacheGoldens& goldens() {
  static const CacheGoldens loaded = [] {
    auto [tensors, metadata] = mx::load_safetensors((folder() / "answers.safetensors").string(), mx::Device::cpu);
    CacheGoldens g{.cases = parse_json(metadata.at("cases"), "answers"), .answers = {}};
    for (auto& [name, value] : tensors) {
      mx::eval(value);
      g.answers.insert_or_assign(name, value);
    }
    return g;
  }();
  return loaded;
}

std::vector<std::string> names(bool with_file = false) {
  std::vector<std::string> list;
  for (const auto& [name, info] : goldens().cases.items()) {
    if (!with_file || info.at("file").get<bool>()) list.push_back(name);
  }
  return list;
}

class Caches : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    info_ = goldens().cases.at(GetParam());
    model_ = make_model(make_checkpoint(info_.at("config"), info_));
    const auto& steps = goldens().answers.at(GetParam() + ".steps");
    steps_.assign(steps.data<int>(), steps.data<int>() + steps.size());
  }

  /** The steps' calls: one token each, the last three together. */
  std::vector<std::vector<float>> follow(cache::Caches& caches) {
    std::vector<std::vector<float>> rows;
    for (std::size_t i = 0; i + 3 < steps_.size(); ++i) rows.push_back(last_row(model_->forward(batch_of({steps_[i]}), caches)));
    rows.push_back(last_row(model_->forward(batch_of({steps_.end() - 3, steps_.end()}), caches)));
    return rows;
  }

  void expect_golden(const std::vector<std::vector<float>>& rows, double bound) {
    const auto& wanted = goldens().answers.at(GetParam() + ".logits");
    ASSERT_EQ(static_cast<int>(rows.size()), wanted.shape(0));
    double worst = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      worst = std::max(worst, difference(rows[i], row_of(wanted, static_cast<int>(i))));
      EXPECT_LE(difference(rows[i], row_of(wanted, static_cast<int>(i))), bound) << "step " << i;
    }
    RecordProperty("worst", std::to_string(worst));
  }

  cache::Caches after_prompt() {
    const auto bound = info_.at("max_kv_size");
    auto caches = cache::make_caches(model_->description(), bound.is_null() ? 0 : bound.get<int>());
    model_->forward(batch_of(info_.at("prompt").get<std::vector<int>>()), caches, model::Rows::last);
    if (!info_.at("kv").is_null()) cache::quantize_caches(caches, {.bits = info_.at("kv")[0], .group_size = info_.at("kv")[1]});
    return caches;
  }

  json info_;
  std::unique_ptr<model::CausalModel> model_;
  std::vector<int> steps_;
};

/** The same float32 keys in another order of summation; a code that is rounded the other way moves a logit by less than the second bound.
 */
TEST_P(Caches, StepsFollowFromThePrompt) {
  auto caches = after_prompt();
  expect_golden(follow(caches), info_.at("kv").is_null() ? 1e-4 : 2e-3);
}

class PythonsFiles : public Caches {};

TEST_P(PythonsFiles, StepsFollow) {
  for (const char* suffix : {".safetensors", "_older.safetensors"}) {
    SCOPED_TRACE(suffix);
    if (std::string_view(suffix) == "_older.safetensors" && !info_.at("older").get<bool>()) continue;
    const auto file = folder() / (GetParam() + suffix);
    auto caches = cache::load_prompt_file(file, model_->description());
    EXPECT_EQ(cache::prompt_tokens(caches), static_cast<int>(info_.at("prompt").size()));
    const auto metadata = cache::read_prompt_metadata(file);
    EXPECT_EQ(metadata.at("model"), "org/" + GetParam());
    EXPECT_TRUE(parse_json(metadata.at("tokenizer_config"), "").contains("trust_remote_code"));
    expect_golden(follow(caches), 1e-4);
  }
}

/** What a prompt-cache file holds: tensors, and metadata by key; which scalar has which number is the writer's affair. */
struct Content {
  std::map<std::string, mx::array> tensors{};
  std::map<std::string, std::string> metadata{}, kinds{};
};

Content content_of(const fs::path& file) {
  auto [tensors, metadata] = mx::load_safetensors(file.string(), mx::Device::cpu);
  Content content;
  for (auto& [name, value] : tensors) {
    mx::eval(value);
    content.tensors.emplace(name, value);
  }
  for (const auto& [key, value] : metadata) {
    if (!key.starts_with("2.")) {
      content.metadata[key] = value;
    } else if (key.ends_with(".0") && key != "2.0") {
      content.kinds[value] = metadata.at(key.substr(0, key.size() - 1) + "1");
    }
  }
  return content;
}

/** Rows of the chunks before are never looked at again: the reference keeps some of them, we none. */
void drop_earlier_chunks(Content& content) {
  for (const auto& [key, kind] : std::map(content.metadata)) {
    if (kind != "ChunkedKVCache") continue;
    const auto layer = key.substr(2) + ".";
    const auto number = [&](const char* path) { return content.tensors.at(layer + path).item<int>(); };
    const int offset = number("2"), used = offset % number("3");
    content.tensors.insert_or_assign(layer + "4", mx::array(offset - used));
    for (const char* path : {"0", "1"}) {
      auto rows = content.tensors.at(layer + path);
      const int held = rows.shape(2);
      rows = used == 0 ? mx::zeros({0}, mx::float32)
                       : mx::contiguous(mx::slice(rows, {0, 0, held - used, 0}, {1, rows.shape(1), held, rows.shape(3)}));
      mx::eval(rows);
      content.tensors.insert_or_assign(layer + path, rows);
      if (used == 0) content.kinds[layer + path] = "none";
    }
  }
}

/** What the reference reads of its own file it reads of ours: the same names, dtypes, shapes, bytes and metadata. */
TEST_P(PythonsFiles, AreWrittenAsTheyWere) {
  const auto theirs = folder() / (GetParam() + ".safetensors");
  const auto ours = fs::temp_directory_path() / ("mlxlm-again-" + std::to_string(::getpid()) + GetParam() + ".safetensors");
  const auto caches = cache::load_prompt_file(theirs, model_->description());
  cache::save_prompt_file(ours, caches, model_->description(), cache::read_prompt_metadata(theirs));
  auto wanted = content_of(theirs);
  const auto got = content_of(ours);
  fs::remove(ours);
  drop_earlier_chunks(wanted);
  wanted.metadata["0.tokens"] = std::to_string(info_.at("prompt").size());  // ours alone
  EXPECT_EQ(got.metadata, wanted.metadata);
  EXPECT_EQ(got.kinds, wanted.kinds);
  ASSERT_EQ(got.tensors.size(), wanted.tensors.size());
  for (const auto& [name, value] : wanted.tensors) {
    SCOPED_TRACE(name);
    ASSERT_TRUE(got.tensors.contains(name));
    const auto& mine = got.tensors.at(name);
    EXPECT_TRUE(mine.dtype() == value.dtype());
    ASSERT_EQ(mine.shape(), value.shape());
    EXPECT_EQ(std::string(mine.data<char>(), mine.nbytes()), std::string(value.data<char>(), value.nbytes()));
  }
}

TEST_P(Caches, StepsFollowFromOurFileBitForBit) {
  auto caches = after_prompt();
  const auto file = fs::temp_directory_path() / ("mlxlm-" + std::to_string(::getpid()) + GetParam() + ".safetensors");
  cache::save_prompt_file(file, caches, model_->description(), {{"model", "m"}});
  auto loaded = cache::load_prompt_file(file, model_->description());
  fs::remove(file);
  EXPECT_EQ(follow(loaded), follow(caches));
}

/** A cache under way is copied with what the fused executor wrote into it. */
TEST_P(Caches, CopiesGoTheirOwnWay) {
  auto caches = after_prompt();
  auto copied = cache::copy(caches);
  const auto rows = follow(caches);
  EXPECT_EQ(follow(copied), rows);
}

/** What the reference cannot quantize: latent attention and windows. Eight bits move its logits a little, and only a little. */
TEST(QuantizedKinds, BeyondTheReference) {
  for (const char* name : {"deepseek_v3", "gemma3_text", "llama_long", "falcon_h1", "llama4", "llama4_next_chunk", "llama4_end_of_chunk"}) {
    SCOPED_TRACE(name);
    auto info = goldens().cases.at(name);
    if (info.at("config").contains("qk_rope_head_dim")) info["config"]["qk_rope_head_dim"] = 32;
    info["config"]["head_dim"] = 32;
    const auto model = make_model(make_checkpoint(info.at("config"), info));
    auto plain = cache::make_caches(model->description()), quantized = cache::make_caches(model->description());
    const auto prompt = info.at("prompt").get<std::vector<int>>();
    model->forward(batch_of(prompt), plain, model::Rows::last);
    model->forward(batch_of(prompt), quantized, model::Rows::last);
    cache::check_quantization(model->description(), {.bits = 8, .group_size = 32});
    cache::quantize_caches(quantized, {.bits = 8, .group_size = 32});
    for (const std::vector<int>& call : std::vector<std::vector<int>>{{3}, {5}, {7, 9, 11}, {2}, {4}, {6}}) {
      EXPECT_LE(difference(last_row(model->forward(batch_of(call), quantized)), last_row(model->forward(batch_of(call), plain))), 0.1);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, Caches, testing::ValuesIn(names()), test_name);
INSTANTIATE_TEST_SUITE_P(Golden, PythonsFiles, testing::ValuesIn(names(true)), test_name);

}  // namespace
}  // namespace mlxlm::tests
