// What must hold of every architecture without a reference: pieces = whole, batched = alone, trim and replay, copies, lengths.
#include <algorithm>
#include <array>
#include <cstdlib>

#include <gtest/gtest.h>
#include <mlx/ops.h>

#include "cache/quantized.h"
#include "kernels/cpu/kernels.h"
#include "parity_case.h"

namespace mlxlm::tests {
namespace {

using Tokens = std::vector<int>;
using RowsOfLogits = std::vector<std::vector<float>>;

/** Another order of summation, never another formula. */
constexpr double bound = 2e-5;
constexpr int prompt_tokens = 40;  // beyond the windows of all configs

/** The float32 models of tests/arch, dense and in 4 bits. */
std::vector<std::string> float32_models() {
  std::vector<std::string> names;
  for (const auto& name : golden_names()) {
    if (!name.starts_with("llama_rope") && (name.ends_with(".f32") || name.ends_with(".q4")) && name.find("published") == std::string::npos)
      names.push_back(name);
  }
  return names;
}

/** The same sizes in fewer heads where those keep less than a group of 32. */
json with_wide_heads(json config) {
  auto& sizes = config.contains("text_config") ? config["text_config"] : config;
  if (sizes.contains("qk_rope_head_dim")) {
    sizes["qk_rope_head_dim"] = 32;
  } else if (sizes.contains("head_dim")) {
    sizes["head_dim"] = 32;
  } else if (sizes.contains("num_key_value_heads") && sizes.at("hidden_size") < 32 * sizes.at("num_attention_heads").get<int>()) {
    for (const char* key : {"num_attention_heads", "num_key_value_heads"}) sizes[key] = sizes.at(key).get<int>() / 2;
  }
  return config;
}

class Invariants : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const auto golden = load_golden(GetParam());
    tokens_ = golden.tokens("long_prompt");
    ASSERT_EQ(tokens_.size(), prompt_tokens);
    model_ = make_model(make_checkpoint(golden.info.at("config"), golden.info));
    // Its rotation depends on the length of the call from 32 tokens on: only within them are pieces the whole.
    if (GetParam().starts_with("llama_dynamic")) tokens_.resize(30);
  }

  cache::Caches fresh() const { return cache::make_caches(model_->description()); }
  RowsOfLogits run(const Tokens& tokens, cache::Caches& caches) { return to_rows(model_->forward(batch_of(tokens), caches)); }
  Tokens part(std::size_t from, std::size_t to) const { return {tokens_.begin() + from, tokens_.begin() + std::min(to, tokens_.size())}; }

  RowsOfLogits in_pieces(std::size_t size) {
    auto caches = fresh();
    RowsOfLogits rows;
    for (std::size_t at = 0; at < tokens_.size(); at += size) {
      for (auto& row : run(part(at, at + size), caches)) rows.push_back(std::move(row));
    }
    return rows;
  }

  static void expect_near(const RowsOfLogits& got, const RowsOfLogits& wanted, double within = bound) {
    ASSERT_EQ(got.size(), wanted.size());
    for (std::size_t i = 0; i < got.size(); ++i) EXPECT_LE(difference(got[i], wanted[i]), within) << "row " << i;
  }

  Tokens tokens_;
  std::unique_ptr<model::CausalModel> model_;
};

/** A model that silently ran as graph would pass all else. */
TEST_P(Invariants, EveryOpHasKernels) {
  const bool graph_wanted = !kernels::cpu::active() || std::getenv("MLXLM_TEST_EXECUTOR") != nullptr;
  const bool by_length = GetParam().starts_with("llama_dynamic"),
             adapted = GetParam().find("lora") != std::string::npos || GetParam().find("dora") != std::string::npos;
  EXPECT_EQ(model_->executor(), std::string(graph_wanted || by_length || adapted ? "graph" : "fused"));
}

TEST_P(Invariants, PiecesAreTheWhole) {
  cache::Caches none;
  const auto whole = run(tokens_, none);
  for (const std::size_t size : {1, 3, 8, 29}) {
    SCOPED_TRACE("pieces of " + std::to_string(size));
    expect_near(in_pieces(size), whole);
  }
}

TEST_P(Invariants, LastRowIsTheLastOfAll) {
  cache::Caches none;
  const auto whole = run(tokens_, none);
  const auto last = to_rows(model_->forward(batch_of(tokens_), none, model::Rows::last));
  ASSERT_EQ(last.size(), 1u);
  EXPECT_LE(difference(last[0], whole.back()), bound);
}

/** A long prompt, one token of another sequence, and a short prompt in one step, and again: bit for bit what each gives alone. */
TEST_P(Invariants, BatchedIsAlone) {
  const Tokens& a = tokens_;
  const Tokens b(tokens_.rbegin(), tokens_.rend()), c = part(3, 9);
  std::array<cache::Caches, 3> together{fresh(), fresh(), fresh()}, alone{fresh(), fresh(), fresh()};
  run(b, together[1]);
  run(b, alone[1]);
  const auto step = [&](const std::array<Tokens, 3>& next) {
    Tokens all;
    std::vector<model::Segment> segments;
    for (int i = 0; i < 3; ++i) {
      all.insert(all.end(), next[i].begin(), next[i].end());
      segments.push_back({static_cast<int>(next[i].size()), static_cast<int>(next[i].size()), &together[i]});
    }
    const auto logits = to_rows(mx::expand_dims(model_->run(mx::flatten(batch_of(all)), segments), 0));
    std::size_t at = 0;
    for (int i = 0; i < 3; ++i) {
      for (const auto& row : run(next[i], alone[i])) EXPECT_EQ(logits.at(at++), row) << "sequence " << i;
    }
  };
  step({a, {5}, c});
  step({Tokens{5}, {7}, {9}});
  step({Tokens{8}, {1, 2, 3}, {4}});
}

/** Quantized, plain and no caches beside each other. */
TEST_P(Invariants, QuantizedBesidePlainIsAlone) {
  constexpr cache::Quantization wanted{.bits = 8, .group_size = 32};
  const auto golden = load_golden(GetParam());
  model_ = make_model(make_checkpoint(with_wide_heads(golden.info.at("config")), golden.info));
  cache::check_quantization(model_->description(), wanted);
  const auto quantized = [&] {
    auto caches = fresh();
    run(part(0, 9), caches);
    cache::quantize_caches(caches, wanted);
    return caches;
  };
  auto together = quantized(), alone = quantized(), plain = fresh(), plain_alone = fresh();
  for (const auto& next : {part(9, 30), Tokens{7}}) {
    Tokens all = next;
    all.insert(all.end(), next.begin(), next.end());
    const int count = static_cast<int>(next.size());
    const auto rows =
        to_rows(mx::expand_dims(model_->run(mx::flatten(batch_of(all)), {{count, count, &together}, {count, count, &plain}}), 0));
    const auto first = run(next, alone), second = run(next, plain_alone);
    for (int i = 0; i < count; ++i) {
      EXPECT_EQ(rows[i], first[i]);
      EXPECT_EQ(rows[count + i], second[i]);
    }
  }
}

TEST_P(Invariants, OnlyWantedRowsComeBack) {
  auto first = fresh(), second = fresh(), alone = fresh();
  Tokens both = part(0, 5);
  both.insert(both.end(), tokens_.begin(), tokens_.begin() + 4);
  const auto logits = model_->run(mx::flatten(batch_of(both)), {{5, 0, &first}, {4, 2, &second}});
  ASSERT_EQ(logits.shape(0), 2);
  const auto wanted = run(part(0, 4), alone);
  const auto got = to_rows(mx::expand_dims(logits, 0));
  EXPECT_EQ(got[0], wanted[2]);
  EXPECT_EQ(got[1], wanted[3]);
  auto other = fresh();
  run(part(0, 5), other);
  EXPECT_EQ(run({3}, first), run({3}, other));
}

TEST_P(Invariants, EveryCacheAdvancesByTheTokensRun) {
  auto caches = fresh();
  const auto layout = plan::cache_layout(model_->description());
  ASSERT_EQ(caches.size(), layout.size());
  int seen = 0;
  for (const int count : {11, 1, 1, 5}) {
    run(part(seen, seen + count), caches);
    seen += count;
    for (std::size_t i = 0; i < caches.size(); ++i) {
      ASSERT_EQ(caches[i] != nullptr, layout[i].kind != plan::CacheKind::none) << "layer " << i;
      if (caches[i]) {
        EXPECT_EQ(caches[i]->offset(), seen) << "layer " << i;
      }
    }
  }
}

TEST_P(Invariants, TrimAndReplay) {
  auto caches = fresh();
  run(part(0, 6), caches);
  run({9}, caches);
  const auto layout = plan::cache_layout(model_->description());
  bool all_go_back = true;
  for (std::size_t i = 0; i < caches.size(); ++i) {
    if (!caches[i]) continue;
    const bool goes_back = layout[i].kind != plan::CacheKind::recurrent;
    EXPECT_EQ(caches[i]->trimmable(), goes_back) << "layer " << i;
    EXPECT_EQ(caches[i]->trim(3), goes_back ? 3 : 0) << "layer " << i;
    EXPECT_EQ(caches[i]->offset(), goes_back ? 4 : 7) << "layer " << i;
    all_go_back &= goes_back;
  }
  if (!all_go_back) return;  // a state knows no earlier one
  auto replayed = run(part(4, 7), caches);
  auto straight = fresh();
  run(part(0, 4), straight);
  expect_near(replayed, run(part(4, 7), straight));
  expect_near(run({3}, caches), run({3}, straight));
}

TEST_P(Invariants, ACopyIsIndependent) {
  auto caches = fresh();
  run(part(0, 13), caches);
  cache::Caches copies;
  for (const auto& c : caches) copies.push_back(c ? c->copy() : nullptr);
  run({2}, copies);  // must not show in `caches`
  run({4}, copies);
  cache::Caches again;
  for (const auto& c : caches) again.push_back(c ? c->copy() : nullptr);
  run({9}, caches);  // must not show in `again`
  auto straight = fresh();
  run(part(0, 13), straight);
  run({9}, straight);
  expect_near(run(part(14, 20), caches), run(part(14, 20), straight));
  auto other = fresh();
  run(part(0, 13), other);
  expect_near(run(part(13, 20), again), run(part(13, 20), other));
}

TEST_P(Invariants, WindowsAndStatesDoNotGrow) {
  auto caches = fresh();
  run(tokens_, caches);
  for (int i = 0; i < 3; ++i) run({i + 1}, caches);
  std::vector<int64_t> before;
  for (const auto& c : caches) before.push_back(c ? c->bytes() : 0);
  for (int i = 0; i < 12; ++i) run({i + 1}, caches);
  const auto layout = plan::cache_layout(model_->description());
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const bool bounded = layout[i].kind == plan::CacheKind::rotating || layout[i].kind == plan::CacheKind::recurrent;
    if (bounded) {
      EXPECT_LE(caches[i]->bytes(), before[i]) << "layer " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Model, Invariants, testing::ValuesIn(float32_models()), test_name);

}  // namespace
}  // namespace mlxlm::tests
