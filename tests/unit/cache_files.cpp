// Prompt-cache files: what is written comes back, and whatever else a file says is one clear error.
#include <filesystem>
#include <fstream>
#include <random>

#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <unistd.h>

#include "arch/config.h"
#include "arch/registry.h"
#include "base/error.h"
#include "base/files.h"
#include "cache/layer_shape.h"
#include "cache/prompt_file.h"
#include "weights/weights.h"

namespace {

using namespace mlxlm;
namespace mx = mlx::core;
namespace fs = std::filesystem;

/** Two full layers and one with a window of 8: two heads of 32. */
json config_of(int kv_heads = 2, int layers = 3) {
  json kinds = json::array();
  for (int i = 0; i < layers; ++i) kinds.push_back(i == 1 ? "sliding_attention" : "full_attention");
  return {{"model_type", "llama"},    {"hidden_size", 64},
          {"intermediate_size", 64},  {"num_hidden_layers", layers},
          {"num_attention_heads", 4}, {"num_key_value_heads", kv_heads},
          {"head_dim", 32},           {"rms_norm_eps", 1e-5},
          {"vocab_size", 16},         {"rope_theta", 1e4},
          {"sliding_window", 8},      {"layer_types", kinds}};
}

arch::Model model_of(const json& config) {
  return arch::build(arch::Config(config));
}
arch::Model model() {
  return model_of(config_of());
}

mx::array rows(int tokens, int seed) {
  std::mt19937 random(seed);
  std::vector<float> values(2 * tokens * 32);
  for (auto& v : values) v = std::normal_distribution<float>()(random);
  return mx::array(values.data(), {1, 2, tokens, 32}, mx::float32);
}

cache::Caches filled(int tokens) {
  auto caches = cache::make_caches(model());
  for (std::size_t i = 0; i < caches.size(); ++i) {
    dynamic_cast<cache::AttentionCache&>(*caches[i]).update(rows(tokens, int(2 * i)), rows(tokens, int(2 * i + 1)));
  }
  return caches;
}

class PromptFile : public testing::Test {
 protected:
  PromptFile() : folder_(fs::temp_directory_path() / ("mlxlm-caches-" + std::to_string(::getpid()))) { fs::create_directories(folder_); }
  ~PromptFile() override { fs::remove_all(folder_); }
  fs::path file() const { return folder_ / "c.safetensors"; }

  /** Loads tensors and metadata that a test changed. */
  void rewrite(const std::function<void(weights::Tensors&, std::map<std::string, std::string>&)>& change, int tokens = 5, int kv_bits = 0) {
    auto caches = filled(tokens);
    cache::quantize_caches(caches, {.bits = kv_bits, .group_size = 32});
    cache::save_prompt_file(file(), caches, model(), {{"model", "m"}});
    auto stored = weights::load_safetensors(file());
    auto metadata = stored.metadata.get<std::map<std::string, std::string>>();
    change(stored.tensors, metadata);
    weights::save_safetensors(folder_ / "changed.safetensors", stored.tensors, metadata);
  }
  std::string error(const arch::Model& m = model()) const {
    try {
      cache::load_prompt_file(folder_ / "changed.safetensors", m);
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      EXPECT_NE(e.code(), Code::internal) << e.what();
      return e.what();
    }
    return "";
  }
  void expect_error(const std::string& part) const {
    const auto message = error();
    EXPECT_NE(message.find(part), std::string::npos) << "got: " << message << "\nwanted: " << part;
  }
  fs::path folder_;
};

/** The next keys that both give are the same bits. */
void expect_same(cache::Caches& a, cache::Caches& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    auto &x = dynamic_cast<cache::AttentionCache&>(*a[i]), &y = dynamic_cast<cache::AttentionCache&>(*b[i]);
    EXPECT_EQ(x.offset(), y.offset());
    for (const int tokens : {1, 3, 1}) {
      const auto p = x.update(rows(tokens, 7), rows(tokens, 8)), q = y.update(rows(tokens, 7), rows(tokens, 8));
      EXPECT_TRUE(mx::array_equal(p.first, q.first).item<bool>() && mx::array_equal(p.second, q.second).item<bool>()) << "layer " << i;
    }
  }
}

TEST_F(PromptFile, ComesBack) {
  for (const int tokens : {1, 5, 8, 21, 300}) {
    for (const int bits : {0, 4}) {
      auto caches = filled(tokens);
      cache::quantize_caches(caches, {.bits = bits, .group_size = 32});
      cache::save_prompt_file(file(), caches, model(), {{"model", "org/name"}, {"tokenizer_config", "{}"}, {"note.more", "x"}});
      auto loaded = cache::load_prompt_file(file(), model());
      EXPECT_EQ(cache::prompt_tokens(loaded), tokens);
      const auto metadata = cache::read_prompt_metadata(file());
      EXPECT_EQ(metadata.at("model"), "org/name");
      EXPECT_EQ(metadata.at("note.more"), "x");
      expect_same(caches, loaded);
    }
  }
  for (const auto& item : fs::directory_iterator(folder_)) EXPECT_EQ(item.path(), file()) << "left beside the file";
}

/** What is written later is what would be written now, and lies where the caches do. */
TEST_F(PromptFile, PiecesAreTheFile) {
  for (const int tokens : {1, 5, 63, 130, 300}) {
    for (const int bits : {0, 4}) {
      for (const bool shared : {false, true}) {
        SCOPED_TRACE(std::to_string(tokens) + (shared ? " shared" : ""));
        auto origin = filled(tokens);
        cache::quantize_caches(origin, {.bits = bits, .group_size = 32});
        auto caches = shared ? cache::copy(origin) : std::move(origin);
        cache::save_prompt_file(file(), caches, model(), {{"model", "m"}});
        auto pieces = cache::prompt_file_pieces(caches, model(), {{"model", "m"}});
        caches.clear();  // the owner is enough
        origin.clear();
        auto all = pieces.start;
        for (const auto& piece : pieces.rest) all.append(reinterpret_cast<const char*>(piece.data()), piece.size());
        EXPECT_TRUE(all == read_text_file(file()));
        EXPECT_EQ(pieces.copied_bytes, 0);
      }
    }
  }
}

TEST_F(PromptFile, EmptyAndBoundedCachesComeBack) {
  auto empty = cache::make_caches(model());
  cache::save_prompt_file(file(), empty, model(), {});
  auto loaded = cache::load_prompt_file(file(), model());
  expect_same(empty, loaded);
  auto bounded = cache::make_caches(model(), 6);
  for (auto& c : bounded) dynamic_cast<cache::AttentionCache&>(*c).update(rows(20, 1), rows(20, 2));
  cache::save_prompt_file(file(), bounded, model(), {});
  loaded = cache::load_prompt_file(file(), model());
  expect_same(bounded, loaded);
}

TEST_F(PromptFile, SavingReplacesTheFileOrLeavesIt) {
  auto caches = filled(3);
  cache::save_prompt_file(file(), caches, model(), {});
  const auto before = read_text_file(file());
  EXPECT_THROW(cache::save_prompt_file(folder_ / "none" / "c.safetensors", caches, model(), {}), Error);
  caches.push_back(nullptr);
  cache::save_prompt_file(file(), filled(4), model(), {});
  EXPECT_NE(read_text_file(file()), before);
}

/** Every length of a truncated file, and every changed byte of its header, is an error or a cache, never a crash. */
TEST_F(PromptFile, BrokenFilesAreErrors) {
  cache::save_prompt_file(file(), filled(2), model(), {{"model", "m"}});
  const auto whole = read_text_file(file());
  uint64_t header = 0;
  std::memcpy(&header, whole.data(), 8);
  const auto load = [&](const std::string& bytes) {
    std::ofstream(folder_ / "changed.safetensors", std::ios::binary) << bytes;
    return error();
  };
  for (std::size_t size = 0; size < whole.size(); size += 1 + whole.size() / 60)
    EXPECT_FALSE(load(whole.substr(0, size)).empty()) << size << " bytes";
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    auto bytes = whole;
    bytes[8 + random() % header] = static_cast<char>(random());
    if (load(bytes).empty()) {
      auto caches = cache::load_prompt_file(folder_ / "changed.safetensors", model());
      for (auto& c : caches) {
        const auto seen = dynamic_cast<cache::AttentionCache&>(*c).update(rows(1, 1), rows(1, 2));
        mx::eval(seen.first, seen.second);
      }
    }
  }
}

TEST_F(PromptFile, OtherFilesAreNotPromptCaches) {
  weights::save_safetensors(folder_ / "changed.safetensors", {{"model.norm.weight", rows(1, 1)}});
  expect_error("prompt cache");
  weights::save_safetensors(folder_ / "changed.safetensors", {{"model.norm.weight", rows(1, 1)}}, {{"format", "mlx"}});
  expect_error("prompt cache");
  EXPECT_THROW(cache::read_prompt_metadata(folder_ / "none.safetensors"), Error);
}

TEST_F(PromptFile, OtherModelsAreRefused) {
  rewrite([](auto&, auto&) {});
  EXPECT_EQ(error(), "");
  EXPECT_NE(error(model_of(config_of(4))).find("wanted [1, 4, tokens, 32]"), std::string::npos) << error(model_of(config_of(4)));
  EXPECT_NE(error(model_of(config_of(2, 4))).find("got caches of 3 layers, wanted 4"), std::string::npos);
  auto narrow = config_of();
  narrow["sliding_window"] = 4;
  EXPECT_NE(error(model_of(narrow)).find("window"), std::string::npos);
}

using Tensors = weights::Tensors;
using Strings = std::map<std::string, std::string>;

TEST_F(PromptFile, HostileStatesAreRefused) {
  const auto number = [](const char* path, int value) { return [=](Tensors& t, Strings&) { t.insert_or_assign(path, mx::array(value)); }; };
  rewrite(number("0.2", 6));
  expect_error("offset 6 is beyond the 5 tokens");
  rewrite(number("0.2", -1));
  expect_error("offset");
  rewrite(number("0.2", 4));
  expect_error("have seen 4 and 5 tokens");
  for (const auto& [path, value] :
       {std::pair("1.5", 6), {"1.5", 3}, {"1.3", 8}, {"1.4", 0}, {"1.4", 4000}, {"1.2", 4}, {"1.2", 99}, {"1.2", INT32_MAX}}) {
    rewrite(number(path, value));
    EXPECT_NE(error(), "") << path << " = " << value;
  }
  for (const auto& [path, value] : {std::pair("0.3", 16), {"0.3", 0}, {"0.4", 7}, {"0.4", 8}, {"0.2", 6}, {"1.7", 1}, {"1.5", 9}}) {
    rewrite(number(path, value), 5, 4);
    EXPECT_NE(error(), "") << "quantized " << path << " = " << value;
  }
  rewrite([](Tensors& t, Strings&) { t.insert_or_assign("0.0.0", mx::astype(t.at("0.0.0"), mx::int32)); }, 5, 4);
  expect_error("uint32");
  rewrite([](Tensors& t, Strings&) { t.insert_or_assign("0.0.1", mx::slice(t.at("0.0.1"), {0, 0, 0, 0}, {1, 2, 3, 1})); }, 5, 4);
  expect_error("differ in length");
  rewrite([](Tensors& t, Strings&) { t.insert_or_assign("0.1", rows(4, 1)); });
  expect_error("differ in length");
  rewrite([](Tensors& t, Strings&) { t.insert_or_assign("0.0", mx::astype(t.at("0.0"), mx::int32)); });
  expect_error("floats");
  rewrite([](Tensors& t, Strings&) { t.erase("0.1"); });
  expect_error("state 1 is missing");
  rewrite([](Tensors& t, Strings&) { t.erase("1.4"); });
  expect_error("max_size is missing");
  rewrite([](Tensors& t, Strings&) { t.insert_or_assign("9.0", rows(1, 1)); });
  expect_error("belongs to no cache");
  rewrite([](Tensors& t, Strings&) { t.insert_or_assign("99999999999999999999.0", rows(1, 1)); });
  expect_error("belongs to no cache");
}

TEST_F(PromptFile, HostileMetadataIsRefused) {
  rewrite([](Tensors&, Strings& s) { s["1.0"] = "ConcatenateKVCache"; });
  expect_error("class 'ConcatenateKVCache' is not supported");
  rewrite([](Tensors&, Strings& s) { s["1.0"] = "ChunkedKVCache"; });
  expect_error("got a ChunkedKVCache, wanted one without chunks");
  rewrite([](Tensors&, Strings& s) { s["1.0"] = "CacheList"; });
  expect_error("belongs to no cache");
  rewrite([](Tensors&, Strings& s) { s["1.0"] = "ArraysCache"; });
  expect_error("got a ArraysCache");
  rewrite([](Tensors&, Strings& s) { s.erase("1.1"); });
  EXPECT_NE(error(), "");
  rewrite([](Tensors&, Strings& s) { s["1.7"] = "KVCache"; });
  expect_error("gaps");
  rewrite([](Tensors&, Strings& s) { s["7.0"] = "x"; });
  expect_error("not that of a prompt cache");
  rewrite([](Tensors&, Strings& s) { s["2.1.1"] = "list"; });
  expect_error("is not known");
  rewrite([](Tensors&, Strings& s) { s.erase("2.1.1"); });
  expect_error("has no type");
  rewrite([](Tensors&, Strings& s) { s.erase("2.0"); });
  EXPECT_NE(error(), "");
}

/** Chunks of 8 in three layers of four. */
arch::Model chunked_model(int chunk_tokens = 8) {
  return model_of({{"model_type", "llama4"},
                   {"text_config",
                    {{"hidden_size", 64},
                     {"intermediate_size", 32},
                     {"intermediate_size_mlp", 64},
                     {"num_hidden_layers", 4},
                     {"num_attention_heads", 4},
                     {"num_key_value_heads", 2},
                     {"head_dim", 32},
                     {"num_local_experts", 2},
                     {"rms_norm_eps", 1e-5},
                     {"vocab_size", 16},
                     {"rope_theta", 1e4},
                     {"attention_chunk_size", chunk_tokens}}}});
}

cache::Caches chunked(int tokens) {
  auto caches = cache::make_caches(chunked_model());
  for (auto& c : caches) {
    for (int i = 0; i < tokens; ++i) dynamic_cast<cache::AttentionCache&>(*c).update(rows(1, i), rows(1, 1000 + i));
  }
  return caches;
}

TEST_F(PromptFile, ChunksComeBack) {
  for (const int tokens : {0, 1, 7, 8, 9, 16, 21}) {
    for (const int bits : {0, 8}) {
      SCOPED_TRACE(tokens);
      auto caches = chunked(tokens);
      cache::quantize_caches(caches, {.bits = bits, .group_size = 32});
      cache::save_prompt_file(file(), caches, chunked_model(), {});
      auto loaded = cache::load_prompt_file(file(), chunked_model());
      for (std::size_t i = 0; i < caches.size(); ++i) {
        auto &x = dynamic_cast<cache::AttentionCache&>(*caches[i]), &y = dynamic_cast<cache::AttentionCache&>(*loaded[i]);
        EXPECT_EQ(x.offset(), tokens);
        EXPECT_EQ(y.offset(), tokens);
        const auto p = x.update(rows(1, 7), rows(1, 8)), q = y.update(rows(1, 7), rows(1, 8));
        EXPECT_EQ(p.first.shape(2), i == 3 ? tokens + 1 : tokens % 8 + 1);
        EXPECT_TRUE(mx::array_equal(p.first, q.first).item<bool>() && mx::array_equal(p.second, q.second).item<bool>()) << "layer " << i;
      }
    }
  }
}

TEST_F(PromptFile, HostileChunksAreRefused) {
  const auto change = [&](const std::function<void(Tensors&, Strings&)>& edit) {
    cache::save_prompt_file(file(), chunked(21), chunked_model(), {});
    auto stored = weights::load_safetensors(file());
    auto metadata = stored.metadata.get<Strings>();
    edit(stored.tensors, metadata);
    weights::save_safetensors(folder_ / "changed.safetensors", stored.tensors, metadata);
    return error(chunked_model());
  };
  EXPECT_EQ(change([](auto&, auto&) {}), "");
  for (const auto& [path, value] : {std::pair("0.2", 22),
                                    {"0.2", -1},
                                    {"0.2", INT32_MAX},
                                    {"0.3", 0},
                                    {"0.3", 16},
                                    {"0.4", 17},
                                    {"0.4", 22},
                                    {"0.4", 0},
                                    {"0.4", -8}}) {
    EXPECT_NE(change([&](Tensors& t, Strings&) { t.insert_or_assign(path, mx::array(value)); }), "") << path << " = " << value;
  }
  EXPECT_NE(change([](Tensors&, Strings& s) { s["1.0"] = "KVCache"; }).find("wanted one for chunks"), std::string::npos);
  EXPECT_NE(change([](Tensors&, Strings& s) { s["1.0"] = "RotatingKVCache"; }), "");
  EXPECT_NE(change([](Tensors&, Strings& s) { s["1.0"] = "QuantizedChunkedKVCache"; }), "");
  EXPECT_NE(change([](Tensors& t, Strings&) { t.erase("0.4"); }), "");
  EXPECT_EQ(change([](auto&, auto&) {}), "");
  EXPECT_NE(error(chunked_model(16)).find("got chunks of 8 tokens, wanted 16"), std::string::npos);
}

/** A state space and attention in each of two layers. */
arch::Model parallel_model() {
  return model_of({{"model_type", "falcon_h1"},
                   {"hidden_size", 64},
                   {"intermediate_size", 64},
                   {"num_hidden_layers", 2},
                   {"num_attention_heads", 4},
                   {"num_key_value_heads", 2},
                   {"head_dim", 32},
                   {"mamba_n_heads", 4},
                   {"mamba_d_head", 16},
                   {"mamba_d_state", 16},
                   {"rms_norm_eps", 1e-5},
                   {"vocab_size", 16}});
}

cache::Caches parallel(int tokens) {
  auto caches = cache::make_caches(parallel_model());
  for (auto& c : caches) {
    if (auto* attention = dynamic_cast<cache::AttentionCache*>(c.get())) {
      attention->update(rows(tokens, 1), rows(tokens, 2));
      continue;
    }
    auto& recurrent = dynamic_cast<cache::RecurrentCache&>(*c);
    recurrent.set_slot(0, mx::full({1, 3, 64 + 2 * 16}, 0.5f));
    recurrent.set_slot(1, mx::full({1, 4, 16, 16}, 0.25f));
    recurrent.advance(tokens);
  }
  return caches;
}

TEST_F(PromptFile, ListsComeBack) {
  for (const int bits : {0, 4}) {
    auto caches = parallel(5);
    ASSERT_EQ(caches.size(), 4u);
    cache::quantize_caches(caches, {.bits = bits, .group_size = 32});
    cache::save_prompt_file(file(), caches, parallel_model(), {});
    EXPECT_EQ(weights::load_safetensors(file()).metadata.at("1.1"), "CacheList");
    auto loaded = cache::load_prompt_file(file(), parallel_model());
    ASSERT_EQ(loaded.size(), 4u);
    for (const int at : {0, 2}) {
      const auto& recurrent = dynamic_cast<cache::RecurrentCache&>(*loaded[at]);
      EXPECT_EQ(recurrent.offset(), 5);
      EXPECT_TRUE(mx::array_equal(*recurrent.slot(1), mx::full({1, 4, 16, 16}, 0.25f)).item<bool>());
    }
    EXPECT_EQ(loaded[3]->offset(), 5);
    EXPECT_EQ(cache::trim(loaded, 2), 0) << "one of a list cannot";
  }
}

TEST_F(PromptFile, HostileListsAreRefused) {
  const auto change = [&](const std::function<void(Tensors&, Strings&)>& edit) {
    cache::save_prompt_file(file(), parallel(5), parallel_model(), {});
    auto stored = weights::load_safetensors(file());
    auto metadata = stored.metadata.get<Strings>();
    edit(stored.tensors, metadata);
    weights::save_safetensors(folder_ / "changed.safetensors", stored.tensors, metadata);
    return error(parallel_model());
  };
  const auto says = [&](const std::function<void(Tensors&, Strings&)>& edit, const std::string& part) {
    const auto message = change(edit);
    EXPECT_NE(message.find(part), std::string::npos) << "got: " << message << "\nwanted: " << part;
  };
  EXPECT_EQ(change([](auto&, auto&) {}), "");
  says([](Tensors&, Strings& s) { s["1.0"] = "KVCache"; }, "is not known");
  says([](Tensors& t, Strings&) { t.insert_or_assign("0.2.0.0", rows(1, 1)); }, "got a list of 3, wanted 2");
  says([](Tensors& t, Strings&) { t.insert_or_assign("0.17.0.0", rows(1, 1)); }, "more than 16");
  says([](Tensors& t, Strings&) { t.insert_or_assign("0.0.7", rows(1, 1)); }, "belongs to no cache");
  says([](Tensors& t, Strings&) { t.insert_or_assign("0.x", rows(1, 1)); }, "belongs to no cache");
  says([](Tensors& t, Strings&) { t.insert_or_assign("0.0.1", t.at("0.1.1")); }, "got a KVCache, wanted one for a recurrent layer");
  says([](Tensors& t, Strings&) { t.insert_or_assign("0.0.1", mx::array({7, 8}, mx::int32)); }, "a name in ASCII");
  says([](Tensors& t, Strings&) { t.insert_or_assign("0.0.1", mx::zeros({4000}, mx::int32)); }, "a short text");
  says([](Tensors& t, Strings&) { t.erase("0.0.1"); }, "class ''");
  EXPECT_EQ(change([](auto&, auto&) {}), "");
  EXPECT_NE(error(chunked_model()), "");
}

/** Without attention only the metadata tells how many tokens the caches have seen. */
TEST_F(PromptFile, NotedLengthsAreBounded) {
  const auto recurrent_model = model_of({{"model_type", "nemotron_h"},
                                         {"hidden_size", 64},
                                         {"intermediate_size", 96},
                                         {"num_hidden_layers", 2},
                                         {"num_attention_heads", 4},
                                         {"num_key_value_heads", 2},
                                         {"head_dim", 32},
                                         {"mamba_num_heads", 4},
                                         {"mamba_head_dim", 16},
                                         {"ssm_state_size", 16},
                                         {"conv_kernel", 4},
                                         {"n_groups", 2},
                                         {"use_conv_bias", true},
                                         {"layer_norm_epsilon", 1e-5},
                                         {"hybrid_override_pattern", "M-"},
                                         {"max_position_embeddings", 512},
                                         {"vocab_size", 16}});
  const auto with_tokens = [&](const std::string& text) {
    auto caches = cache::make_caches(recurrent_model);
    for (auto& c : caches) {
      if (c) dynamic_cast<cache::RecurrentCache&>(*c).advance(5);
    }
    cache::save_prompt_file(file(), caches, recurrent_model, {});
    auto stored = weights::load_safetensors(file());
    auto metadata = stored.metadata.get<Strings>();
    EXPECT_EQ(metadata.at("0.tokens"), "5");
    metadata["0.tokens"] = text;
    weights::save_safetensors(folder_ / "changed.safetensors", stored.tensors, metadata);
    return error(recurrent_model);
  };
  for (const auto& [text, tokens] : {std::pair("5", 5), {"1073741824", 1 << 30}, {"many", 0}, {"", 0}, {"5 of them", 0}}) {
    EXPECT_EQ(with_tokens(text), "") << text;
    EXPECT_EQ(cache::prompt_tokens(cache::load_prompt_file(folder_ / "changed.safetensors", recurrent_model)), tokens) << text;
  }
  for (const char* text : {"1073741825", "2147483647", "99999999999999999999", "-1"})
    EXPECT_NE(with_tokens(text).find("wanted 0 to 1073741824"), std::string::npos) << text;
}

TEST(TrimAndCopy, WorkOverAllLayers) {
  auto caches = filled(7);
  EXPECT_TRUE(cache::trimmable(caches));
  auto copied = cache::copy(caches);
  EXPECT_EQ(cache::trim(caches, 3), 3);
  EXPECT_EQ(cache::prompt_tokens(caches), 4);
  EXPECT_EQ(cache::prompt_tokens(copied), 7);
  auto longer = filled(9);  // the window has dropped one
  EXPECT_FALSE(cache::trimmable(longer));
  EXPECT_EQ(cache::trim(longer, 3), 0);
  EXPECT_EQ(cache::prompt_tokens(longer), 9);
}

TEST(CheckFits, ACacheIsOfModelsWithItsSizesOnly) {
  const auto problem = [](const cache::Caches& caches, const arch::Model& m) -> std::string {
    try {
      cache::check_fits(caches, m);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::bad_request);
      return e.what();
    }
    return "";
  };
  const auto with = [](const char* key, const json& value) {
    auto config = config_of();
    config[key] = value;
    return model_of(config);
  };
  auto caches = filled(5);
  auto shared = cache::copy(filled(100));  // all of it in memory of others, but for a rest
  auto quantized = filled(5);
  cache::quantize_caches(quantized, {.bits = 4, .group_size = 32});
  for (const auto* c : {&caches, &shared, &quantized}) {
    EXPECT_EQ(problem(*c, model()), "");
    EXPECT_NE(problem(*c, model_of(config_of(4))).find("cache 0: got 2 heads of 32 and 32 numbers, wanted 4"), std::string::npos);
    EXPECT_NE(problem(*c, model_of(config_of(2, 4))).find("got caches of 3 layers, wanted 4"), std::string::npos);
    EXPECT_NE(problem(*c, with("head_dim", 64)).find("wanted 2 of 64 and 64"), std::string::npos);
    EXPECT_NE(problem(*c, with("sliding_window", 4)).find("cache 1: got a window of 8 tokens, wanted at most 4"), std::string::npos);
    EXPECT_EQ(problem(*c, with("sliding_window", 9)), "");
  }
  EXPECT_EQ(problem(cache::make_caches(model(), 6), model()), "");
  caches[2] = std::make_unique<cache::RecurrentCache>(2);
  EXPECT_NE(problem(caches, model()).find("cache 2: got one of a recurrent layer"), std::string::npos);
  caches[2].reset();
  EXPECT_NE(problem(caches, model()).find("cache 2: got none"), std::string::npos);
  caches[2] = std::make_unique<cache::ChunkedKvCache>(64);
  EXPECT_NE(problem(caches, model()).find("cache 2: got chunks of 64"), std::string::npos);
}

TEST(CheckFits, StatesOfRecurrentLayers) {
  const auto of = [](int heads) {
    return model_of({{"model_type", "lfm2"},
                     {"hidden_size", 16 * heads},
                     {"num_hidden_layers", 2},
                     {"layer_types", {"conv", "full_attention"}},
                     {"num_attention_heads", heads},
                     {"num_key_value_heads", 1},
                     {"conv_L_cache", 3},
                     {"conv_bias", false},
                     {"block_dim", 16 * heads},
                     {"block_ff_dim", 32},
                     {"block_multiple_of", 16},
                     {"block_ffn_dim_multiplier", 1.0},
                     {"block_auto_adjust_ff_dim", false},
                     {"norm_eps", 1e-5},
                     {"vocab_size", 16},
                     {"max_position_embeddings", 64},
                     {"rope_theta", 1e4}});
  };
  auto caches = cache::make_caches(of(2));
  auto& state = dynamic_cast<cache::RecurrentCache&>(*caches[0]);
  EXPECT_NO_THROW(cache::check_fits(caches, of(4)));  // it holds nothing yet
  state.set_slot(0, mx::zeros({1, 2, 32}));
  EXPECT_NO_THROW(cache::check_fits(caches, of(2)));
  EXPECT_THROW(cache::check_fits(caches, of(4)), Error);
  std::swap(caches[0], caches[1]);
  EXPECT_THROW(cache::check_fits(caches, of(2)), Error);
}

}  // namespace
