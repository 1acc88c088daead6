// Prefixes in a folder: found after a restart, whatever else lies there.
#include <chrono>
#include <csignal>
#include <fstream>
#include <functional>
#include <thread>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <mlx/transforms.h>
#include <unistd.h>

#include "base/files.h"
#include "cache/prompt_file.h"
#include "engine/engine.h"
#include "gen/prefix_files.h"
#include "parity/parity_case.h"

namespace mlxlm::tests {
namespace {

using Tokens = std::vector<int>;

std::unique_ptr<model::CausalModel> model_named(const std::string& name, int seed_change = 0) {
  auto golden = load_golden(name);
  if (seed_change != 0) golden.info["seed"] = golden.info.at("seed").get<int>() + seed_change;
  return make_model(make_checkpoint(golden.info.at("config"), golden.info));
}

class PrefixFolderTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("mlxlm-prefixes-" + std::to_string(::getpid()));
    fs::remove_all(folder_);
    model_ = model_named("qwen3.f32");
  }
  void TearDown() override { fs::remove_all(folder_); }

  Tokens tokens(int count, int salt = 0) const {
    Tokens list;
    for (int i = 0; i < count; ++i) list.push_back((i * 37 + i * i * 5 + salt * 101) % model_->description().vocab);
    return list;
  }

  struct Result {
    std::vector<Tokens> answers;
    int64_t reused = 0;
    std::size_t found = 0;
  };
  /** As a process of its own would: nothing but the folder stays. */
  Result run(model::CausalModel& model, const std::vector<Tokens>& prompts, int64_t bytes = 1 << 30,
             const std::vector<int>& boundaries = {}, const std::function<void(engine::Request&)>& change = {}) {
    const engine::Limits limits{.prefix_cache_bytes = 1 << 28};
    gen::ModelRunner runner(model, limits);
    gen::PrefixFiles store({folder_, bytes, [&](const std::string& text) { warnings_.push_back(text); }}, model, runner);
    Result result{.answers = std::vector<Tokens>(prompts.size()), .found = store.size()};
    engine::Engine engine(runner, limits);
    engine.set_store(&store);
    std::map<engine::SequenceId, std::size_t> index;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      engine::Request r;
      r.tokens = prompts[i];
      r.max_tokens = 12;
      r.boundaries = boundaries;
      if (change) change(r);
      index[engine.submit(std::move(r))] = i;
    }
    while (engine.has_work()) {
      for (const auto& e : engine.step().events) {
        if (e.chosen) result.answers[index.at(e.id)].push_back(e.chosen->token);
      }
      EXPECT_LE(folder_bytes(), bytes);
    }
    result.reused = engine.counters().reused_tokens;
    return result;
  }
  Result run(const std::vector<Tokens>& prompts, int64_t bytes = 1 << 30) { return run(*model_, prompts, bytes); }

  std::vector<fs::path> files() const {
    std::vector<fs::path> list;
    for (const auto& item : fs::directory_iterator(folder_)) {
      if (item.path().filename() != ".lock") list.push_back(item.path());
    }
    return list;
  }
  int64_t folder_bytes() const {
    int64_t total = 0;
    for (const auto& f : files()) {
      std::error_code gone;  // another thread writes and renames
      const auto bytes = fs::file_size(f, gone);
      if (!gone) total += static_cast<int64_t>(bytes);
    }
    return total;
  }

  fs::path folder_;
  std::unique_ptr<model::CausalModel> model_;
  std::vector<std::string> warnings_;
};

TEST_F(PrefixFolderTest, OutlivesTheEngine) {
  auto a = tokens(150), b = tokens(150);
  b.push_back(3);
  b.push_back(5);
  const auto first = run({a});
  EXPECT_EQ(first.reused, 0);
  ASSERT_EQ(files().size(), 1u);
  const auto again = run({a, b});
  EXPECT_EQ(again.found, 1u);
  EXPECT_GE(again.reused, 149 + 150);
  EXPECT_EQ(again.answers[0], first.answers[0]);
  fs::remove_all(folder_);
  EXPECT_EQ(run({b}).answers[0], again.answers[1]);
  EXPECT_TRUE(warnings_.empty());
}

/** Windows and recurrent states cannot be cut: what was stored at a boundary is used as it is. */
TEST_F(PrefixFolderTest, KeepsSnapshots) {
  for (const char* name : {"llama.f32", "nemotron_h.f32", "lfm2.f32", "falcon_h1.f32", "llama4.f32"}) {
    SCOPED_TRACE(name);
    fs::remove_all(folder_);
    const auto model = model_named(name);
    const auto prompt = [&](int salt) {
      Tokens list;
      for (int i = 0; i < 130; ++i) list.push_back((i * 37 + (i < 100 ? 0 : salt)) % model->description().vocab);
      return list;
    };
    run(*model, {prompt(1)}, 1 << 30, {100});
    const auto again = run(*model, {prompt(2)}, 1 << 30, {100});
    EXPECT_EQ(again.reused, 100);
    fs::remove_all(folder_);
    EXPECT_EQ(run(*model, {prompt(2)}, 1 << 30, {100}).answers, again.answers);
  }
  EXPECT_TRUE(warnings_.empty());
}

/** Caches with a limit and quantized ones are kept, too, each for its like. */
TEST_F(PrefixFolderTest, CachesOfOtherKindsAreKeptApart) {
  const std::vector<std::function<void(engine::Request&)>> kinds{
      [](auto&) {},
      [](auto& r) { r.max_kv_size_tokens = 400; },
      [](auto& r) { r.kv_bits = 8, r.kv_group_size = 32, r.quantized_kv_start = 20; },
      [](auto& r) { r.kv_bits = 4, r.kv_group_size = 32, r.quantized_kv_start = 20; },
  };
  const auto model = model_named("mistral.q4");
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    SCOPED_TRACE(i);
    const auto first = run(*model, {tokens(150)}, 1 << 30, {}, kinds[i]);
    EXPECT_EQ(first.found, i);
    EXPECT_EQ(first.reused, 0) << "of another kind";
    EXPECT_EQ(files().size(), i + 1);
    const auto again = run(*model, {tokens(150)}, 1 << 30, {}, kinds[i]);
    EXPECT_EQ(again.reused, 149);
    EXPECT_EQ(again.answers, first.answers);
  }
  EXPECT_TRUE(warnings_.empty());
}

/** Another process has the folder: no step waits for it, and what was to be written is, once it is free. */
TEST_F(PrefixFolderTest, NoStepWaitsForTheDisk) {
  fs::create_directories(folder_);
  auto other = std::make_unique<engine::FolderLock>(folder_);
  ASSERT_TRUE(other->held());
  const engine::Limits limits{.prefix_cache_bytes = 1 << 28};
  gen::ModelRunner runner(*model_, limits);
  other.reset();
  gen::PrefixFiles store({folder_, 1 << 30, [&](const std::string& text) { warnings_.push_back(text); }}, *model_, runner);
  other = std::make_unique<engine::FolderLock>(folder_);
  {
    engine::Engine engine(runner, limits);
    engine.set_store(&store);
    engine::Request r;
    r.tokens = tokens(150);
    r.max_tokens = 4;
    r.boundaries = {100};
    engine.submit(std::move(r));
    double longest_s = 0;
    while (engine.has_work()) longest_s = std::max(longest_s, engine.step().seconds);
    EXPECT_LT(longest_s, 1.) << "the lock is waited for for two seconds";
    EXPECT_TRUE(files().empty());
    other.reset();
  }
  for (int i = 0; i < 200 && files().empty(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(files().empty());
  EXPECT_TRUE(warnings_.empty());
}

/** What is stored is written later, while its request goes on, and after the prefix has left the memory: the file holds what was computed
 * when it was stored. */
TEST_F(PrefixFolderTest, AFileHoldsTheMomentOfItsStoring) {
  const std::vector<std::function<void(engine::Request&)>> kinds{
      [](auto&) {},
      [](auto& r) { r.drafts.ngram_tokens = 4; },
      [](auto& r) { r.kv_bits = 8, r.kv_group_size = 32, r.quantized_kv_start = 20; },
  };
  for (const char* name : {"mistral.q4", "llama.f32", "nemotron_h.f32", "llama4.f32"}) {
    const auto model = model_named(name);
    for (std::size_t kind = 0; kind < (std::string(name) == "mistral.q4" ? kinds.size() : 1); ++kind) {
      SCOPED_TRACE(fmt::format("{} {}", name, kind));
      Tokens prompt;
      for (int i = 0; i < 131; ++i) prompt.push_back((i * 37 + i / 60) % model->description().vocab);
      std::vector<std::string> files_of;
      for (const bool delayed : {false, true}) {
        fs::remove_all(folder_);
        const engine::Limits limits{.prefix_cache_bytes = 1 << 28};
        gen::ModelRunner runner(*model, limits);
        gen::PrefixFiles store({folder_, 1 << 30, [&](const std::string& text) { warnings_.push_back(text); }}, *model, runner);
        auto other = delayed ? std::make_unique<engine::FolderLock>(folder_) : nullptr;
        engine::Engine engine(runner, limits);
        engine.set_store(&store);
        engine::Request r;
        r.tokens = prompt;
        r.max_tokens = 12;
        r.boundaries = {100};
        r.store_at_end = false;
        kinds[kind](r);
        engine.submit(std::move(r));
        while (engine.has_work()) {
          engine.step();
          for (int i = 0; i < 500 && store.unwritten_bytes() > 0 && !delayed; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
          if (store.unwritten_bytes() > 0) engine.shrink_prefix_cache(0);
        }
        EXPECT_EQ(store.unwritten_bytes() > 0, delayed);
        EXPECT_EQ(engine.memory().unwritten_bytes > 0, delayed);
        other.reset();
        for (int i = 0; i < 500 && (files().empty() || files()[0].extension() != ".safetensors"); ++i)
          std::this_thread::sleep_for(std::chrono::milliseconds(10));
        ASSERT_EQ(files().size(), 1u);
        files_of.push_back(read_text_file(files()[0]));
        EXPECT_TRUE(runner.count() == (delayed ? 0u : 1u));
      }
      EXPECT_EQ(files_of[0] == files_of[1], true);
      EXPECT_GT(files_of[0].size(), 1000u);
    }
  }
  EXPECT_TRUE(warnings_.empty());
}

/** A warning is never worth a request, whatever the one who is warned does. */
TEST_F(PrefixFolderTest, WarningsThatThrowEndNothing) {
  const auto first = run({tokens(150)});
  const auto path = files().at(0);
  const engine::Limits limits{.prefix_cache_bytes = 1 << 28};
  gen::ModelRunner runner(*model_, limits);
  for (const int how : {0, 1, 2}) {
    SCOPED_TRACE(how);
    int told = 0;
    {
      gen::PrefixFiles store({folder_, how == 1 ? 1 << 30 : 200000,
                              [&](const std::string&) {
                                ++told;
                                throw std::runtime_error("the listener's own");
                              }},
                             *model_, runner);
      if (how == 0) {  // does not fit the folder
        const auto cache = runner.adopt(cache::make_caches(model_->description()));
        store.save(cache, tokens(150), 7);
        runner.free(cache);
      } else if (how == 1) {  // breaks while it is known
        std::ofstream(path, std::ios::binary) << "no such thing";
        EXPECT_EQ(store.load(tokens(150), 0).cache, 0);
        EXPECT_EQ(store.find(tokens(150), 0).usable_tokens, 0);
      } else {
        std::ofstream(folder_ / "prefix-0.safetensors") << "broken";
        gen::PrefixFiles other({folder_, 1 << 30, [&](const std::string&) { throw 1; }}, *model_, runner);
      }
    }
    EXPECT_EQ(told, 1);
  }
  EXPECT_EQ(first.answers.size(), 1u);
}

TEST_F(PrefixFolderTest, OfAnotherModelIsNotUsed) {
  run({tokens(150)});
  const auto other = model_named("qwen3.f32", 1);
  const auto got = run(*other, {tokens(150)});
  EXPECT_EQ(got.found, 0u);
  EXPECT_EQ(got.reused, 0);
  EXPECT_EQ(files().size(), 2u);
  EXPECT_TRUE(warnings_.empty()) << "it is no fault";
}

TEST_F(PrefixFolderTest, BrokenFilesAreIgnored) {
  const auto first = run({tokens(150)});
  const auto whole = files().at(0);
  const auto content = read_text_file(whole);
  const auto put = [&](const std::string& name, const std::string& text) { std::ofstream(folder_ / name, std::ios::binary) << text; };
  for (const std::size_t size : {std::size_t{0}, std::size_t{5}, std::size_t{700}, content.size() / 2, content.size() - 1}) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    put(whole.filename().string(), content.substr(0, size));
    put("prefix-foreign.safetensors", "no such thing");
    put("notes.txt", "not ours");
    warnings_.clear();
    const auto got = run({tokens(150)});
    EXPECT_EQ(got.found, 0u) << size;
    EXPECT_EQ(got.answers, first.answers);
    EXPECT_EQ(warnings_.size(), 1u) << size;
    EXPECT_TRUE(fs::exists(folder_ / "notes.txt"));
  }
}

TEST_F(PrefixFolderTest, LyingFilesAreIgnored) {
  const auto first = run({tokens(150)});
  const auto path = files().at(0);
  const auto metadata = cache::read_prompt_metadata(path);
  auto caches = cache::load_prompt_file(path, model_->description());
  cache::trim(caches, 20);
  cache::save_prompt_file(path, caches, model_->description(), metadata);
  const auto got = run({tokens(150)});
  EXPECT_EQ(got.found, 1u);
  EXPECT_EQ(got.reused, 0);
  EXPECT_EQ(got.answers, first.answers);
  EXPECT_EQ(warnings_.size(), 1u);
}

/** What its caches are like stands in the metadata, in the name and in the caches: a file that contradicts itself is refused, or a request
 * would go on from caches of another kind. */
TEST_F(PrefixFolderTest, FilesThatLieAboutTheirKindAreIgnored) {
  const auto model = model_named("mistral.q4");
  const auto quantized = [](engine::Request& r) { r.kv_bits = 8, r.kv_group_size = 32, r.quantized_kv_start = 20; };
  const auto bounded = [](engine::Request& r) { r.max_kv_size_tokens = 400; };
  const auto one_file = [&](const std::function<void(engine::Request&)>& change) {
    fs::remove_all(folder_);
    const auto got = run(*model, {tokens(150)}, 1 << 30, {}, change);
    return std::pair(files().at(0), got.answers);
  };
  const auto [plain_path, plain_answers] = one_file({});
  const auto plain_name = plain_path.filename();
  for (const auto& kind : {std::function<void(engine::Request&)>(quantized), std::function<void(engine::Request&)>(bounded)}) {
    for (const bool renamed : {false, true}) {
      SCOPED_TRACE(renamed);
      const auto [path, answers] = one_file(kind);
      auto metadata = cache::read_prompt_metadata(path);
      EXPECT_EQ(metadata.erase("prefix_options"), 1u);
      const auto caches = cache::load_prompt_file(path, model->description());
      fs::remove(path);
      cache::save_prompt_file(renamed ? folder_ / plain_name : path, caches, model->description(), metadata);
      warnings_.clear();
      const auto got = run(*model, {tokens(150)});
      EXPECT_EQ(got.reused, 0);
      EXPECT_EQ(got.answers, plain_answers);
      EXPECT_EQ(warnings_.size(), 1u);
    }
  }
  // And floats that pass for quantized ones.
  const auto [path, answers] = one_file(quantized);
  const auto metadata = cache::read_prompt_metadata(path);
  auto caches = cache::make_caches(model->description());
  const auto list = tokens(static_cast<int>(cache::prompt_tokens(cache::load_prompt_file(path, model->description()))));
  mx::eval(model->run(mx::array(list.data(), {static_cast<int>(list.size())}, mx::int32), {{static_cast<int>(list.size()), 1, &caches}}));
  cache::save_prompt_file(path, caches, model->description(), metadata);
  warnings_.clear();
  const auto got = run(*model, {tokens(150)}, 1 << 30, {}, quantized);
  EXPECT_EQ(got.reused, 0);
  EXPECT_EQ(got.answers, answers);
  EXPECT_EQ(warnings_.size(), 1u);
}

TEST_F(PrefixFolderTest, WhatADeadWriterLeftIsRemoved) {
  fs::create_directories(folder_);
  const auto left = folder_ / "prefix-0123.safetensors.tmp999999999",
             busy = folder_ / ("prefix-4567.safetensors.tmp" + std::to_string(::getppid()));
  std::ofstream(left) << "half";
  std::ofstream(busy) << "being written";
  run({tokens(150)});
  EXPECT_FALSE(fs::exists(left));
  EXPECT_TRUE(fs::exists(busy)) << "of a process that lives";
}

TEST_F(PrefixFolderTest, TheBudgetHolds) {
  run({tokens(200)});
  const auto one = folder_bytes();
  fs::remove_all(folder_);
  const auto budget = one * 5 / 2 + 300000;
  for (int i = 0; i < 6; ++i) {
    run({tokens(200, i + 1)}, budget);
    EXPECT_LE(folder_bytes(), budget);
  }
  EXPECT_GE(files().size(), 2u);
  const auto kept = files().size();
  // The one that was used last stays.
  EXPECT_GT(run({tokens(200, 6)}, budget).reused, 0);
  EXPECT_EQ(run({tokens(200, 1)}, budget).reused, 0);
  EXPECT_LE(files().size(), kept + 1);
  run({}, 0);
  EXPECT_TRUE(files().empty());
}

TEST_F(PrefixFolderTest, FilesMayVanish) {
  const auto first = run({tokens(150)});
  const engine::Limits limits{.prefix_cache_bytes = 1 << 28};
  gen::ModelRunner runner(*model_, limits);
  gen::PrefixFiles store({folder_, 1 << 30, [&](const std::string& text) { warnings_.push_back(text); }}, *model_, runner);
  ASSERT_EQ(store.size(), 1u);
  fs::remove(files().at(0));
  EXPECT_EQ(store.load(tokens(150), 0).cache, 0);
  EXPECT_EQ(store.find(tokens(150), 0).usable_tokens, 0);
  EXPECT_TRUE(warnings_.empty());
}

}  // namespace
}  // namespace mlxlm::tests
