// Tokenizers of the small folders in tests/data/text, GGUF vocabularies, markers, broken files.
#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>

#include "base/error.h"
#include "base/files.h"
#include "text/markers.h"

namespace {

using namespace mlxlm;
using namespace mlxlm::text;
namespace fs = std::filesystem;

Tokenizer load(const std::string& name, const json& config = json::object()) {
  return Tokenizer::from_folder(fs::path(MLXLM_TEST_DATA) / "text" / name, config);
}

Code code_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.code();
  }
  ADD_FAILURE() << "no error";
  return Code::internal;
}

fs::path folder_with(const std::string& name, const std::string& content) {
  const fs::path folder = fs::path(::testing::TempDir()) / "mlxlm_text_tokenizer";
  fs::remove_all(folder);
  fs::create_directories(folder);
  std::ofstream(folder / name) << content;
  return folder;
}

/** The metadata that a GGUF file made from a byte-level tokenizer.json would have. */
json gguf_metadata() {
  const json file = read_json_file(fs::path(MLXLM_TEST_DATA) / "text/byte_level/tokenizer.json");
  json tokens = json::array(), merges = json::array(), types = json::array();
  for (const auto& [token, id] : file["model"]["vocab"].items()) {
    if (id.get<std::size_t>() >= tokens.size()) tokens.get_ref<json::array_t&>().resize(id.get<std::size_t>() + 1, "");
    tokens[id.get<std::size_t>()] = token;
  }
  types.get_ref<json::array_t&>().resize(tokens.size(), 1);
  for (const auto& token : file["added_tokens"]) types[token["id"].get<std::size_t>()] = 3;
  for (const auto& merge : file["model"]["merges"]) merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  return {{"tokenizer.ggml.model", "gpt2"},   {"tokenizer.ggml.pre", "gpt-2"},
          {"tokenizer.ggml.tokens", tokens},  {"tokenizer.ggml.token_type", types},
          {"tokenizer.ggml.merges", merges},  {"tokenizer.ggml.bos_token_id", 1},
          {"tokenizer.ggml.eos_token_id", 2}, {"tokenizer.chat_template", "{{ messages[0].content }}"}};
}

TEST(Tokenizer, EncodesAndDecodes) {
  const Tokenizer t = load("byte_level");
  const auto ids = t.encode("<|im_start|>Hello 日本<|im_end|>", true);
  EXPECT_EQ(ids.front(), 1);
  EXPECT_EQ(ids.back(), 2);
  EXPECT_EQ(t.decode(ids), "<|im_start|>Hello 日本<|im_end|>");
  EXPECT_EQ(t.decode(ids, true), "Hello 日本");
  EXPECT_EQ(t.vocab_size(), 320);
  EXPECT_EQ(t.token_to_id("<|im_end|>"), 2);
  EXPECT_EQ(t.token_to_id("no such token"), std::nullopt);
  EXPECT_EQ(t.id_to_token(1), "<|im_start|>");
  EXPECT_EQ(t.id_to_token(-1), std::nullopt);
  EXPECT_EQ(t.id_to_token(320), std::nullopt);
  EXPECT_EQ(t.encode("", true), std::vector<int>());
  EXPECT_EQ(t.decode({}), "");
  EXPECT_EQ(t.decode({-1, 1 << 30}), "");
  EXPECT_NO_THROW(t.encode("\xFF\xFE", false));
}

TEST(Tokenizer, PostProcessorAddsBos) {
  const Tokenizer t = load("spm");
  EXPECT_EQ(t.encode("the", true).front(), 1);
  EXPECT_NE(t.encode("the", false).front(), 1);
  EXPECT_EQ(t.bos_token(), "<s>");
}

TEST(Tokenizer, EosIsTheUnion) {
  EXPECT_EQ(load("byte_level").eos_token_ids(), std::set<int>({2}));
  EXPECT_EQ(load("byte_level", {{"eos_token_id", 0}}).eos_token_ids(), std::set<int>({0, 2}));
  Tokenizer t = load("byte_level", {{"eos_token_id", {0, 7}}});
  EXPECT_EQ(t.eos_token_ids(), std::set<int>({0, 2, 7}));
  t.add_eos_token("<think>");
  t.add_eos_token("99");
  EXPECT_EQ(t.eos_token_ids(), std::set<int>({0, 2, 3, 7, 99}));
  EXPECT_EQ(code_of([&] { t.add_eos_token("nothing of the kind"); }), Code::bad_request);
}

TEST(Tokenizer, GenerationConfigOverridesEos) {
  const fs::path from = fs::path(MLXLM_TEST_DATA) / "text/byte_level/tokenizer.json";
  const fs::path folder = folder_with("generation_config.json", R"({"eos_token_id": [5, 6]})");
  fs::copy_file(from, folder / "tokenizer.json");
  EXPECT_EQ(Tokenizer::from_folder(folder, {{"eos_token_id", 9}}).eos_token_ids(), std::set<int>({5, 6}));
}

TEST(Tokenizer, ChatTemplateGetsTokensAndThinking) {
  Tokenizer t = load("byte_level");
  const json chat = json::array({{{"role", "user"}, {"content", "Hi"}}});
  EXPECT_EQ(t.think_start(), "<think>");
  EXPECT_EQ(t.apply_chat_template(chat), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(t.apply_chat_template(chat, {.extra = {{"enable_thinking", false}}}),
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n");
  t.set_chat_template("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools }}");
  EXPECT_EQ(t.apply_chat_template(chat), "<|im_start|><|im_end|>None");
  EXPECT_FALSE(load("spm").has_chat_template());
}

TEST(Tokenizer, DetokenizerKinds) {
  EXPECT_EQ(load("byte_level").detokenizer_kind(), "bpe");
  EXPECT_EQ(load("spm").detokenizer_kind(), "spm");
  EXPECT_EQ(load("spm_no_trim").detokenizer_kind(), "spm_no_trim");
  EXPECT_EQ(load("wordpiece").detokenizer_kind(), "naive");
}

TEST(Tokenizer, BrokenFolders) {
  const auto open = [](const fs::path& folder) { return code_of([&] { Tokenizer::from_folder(folder, json::object()); }); };
  EXPECT_EQ(open("/no/such/folder"), Code::not_found);
  EXPECT_EQ(open(folder_with("tokenizer.model", "x")), Code::unsupported);
  for (const char* content : {"", "{", "[]", "null", R"({"model": 3})", R"({"version": "1.0", "model": {"type": "Nope"}})"})
    EXPECT_EQ(open(folder_with("tokenizer.json", content)), Code::bad_config) << content;
}

TEST(Tokenizer, GgufByteLevel) {
  const Tokenizer t = Tokenizer::from_gguf(gguf_metadata(), json::object()), reference = load("byte_level");
  const std::string text = "<|im_start|>Hello, the capital  of 日本 is 123\n";
  EXPECT_EQ(t.encode(text, true), reference.encode(text, true));
  EXPECT_EQ(t.decode(t.encode(text, false)), text);
  EXPECT_EQ(t.eos_token_ids(), std::set<int>({2}));
  EXPECT_EQ(t.bos_token(), "<|im_start|>");
  EXPECT_EQ(t.detokenizer_kind(), "bpe");
  EXPECT_EQ(t.apply_chat_template(json::array({{{"role", "user"}, {"content", "x"}}})), "x");
  json with_bos = gguf_metadata();
  with_bos["tokenizer.ggml.add_bos_token"] = true;
  EXPECT_EQ(Tokenizer::from_gguf(with_bos, json::object()).encode("a", true).front(), 1);
}

TEST(Tokenizer, GgufEveryPreTokenizerLoads) {
  for (const char* pre : {"default", "smollm", "llama-bpe", "qwen2", "gpt-4o", "tekken", "deepseek-v3", "stablelm2"}) {
    json metadata = gguf_metadata();
    metadata["tokenizer.ggml.pre"] = pre;
    const Tokenizer t = Tokenizer::from_gguf(metadata, json::object());
    const std::string text = "Hello don't WON'T 1234567 日本語\r\n\n  x: [1, 2]  ";
    EXPECT_EQ(t.decode(t.encode(text, false)), text) << pre;
  }
}

TEST(Tokenizer, GgufSpm) {
  const std::vector<std::string> tokens = {"<unk>", "<s>", "</s>", "<0xE6>", "<0x97>", "<0xA5>", "▁",
                                           "t",     "h",   "e",    "▁t",     "he",     "▁the",   "the"};
  const json metadata = {{"tokenizer.ggml.model", "llama"},
                         {"tokenizer.ggml.tokens", tokens},
                         {"tokenizer.ggml.scores", {0, 0, 0, 0, 0, 0, -9, -8, -7, -6, -1, -2, -3, -4}},
                         {"tokenizer.ggml.token_type", {2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1, 1}},
                         {"tokenizer.ggml.bos_token_id", 1},
                         {"tokenizer.ggml.eos_token_id", 2}};
  const Tokenizer t = Tokenizer::from_gguf(metadata, json::object());
  EXPECT_EQ(t.encode("the the", true), std::vector<int>({1, 12, 12}));
  EXPECT_EQ(t.encode("日", false), std::vector<int>({6, 3, 4, 5}));
  EXPECT_EQ(t.decode({12, 12, 3, 4, 5}), "the the日");
  EXPECT_EQ(t.detokenizer_kind(), "spm");
  EXPECT_EQ(t.eos_token_ids(), std::set<int>({2}));
}

TEST(Tokenizer, GgufRefusals) {
  const auto change = [](const char* key, json value) {
    json metadata = gguf_metadata();
    metadata[key] = std::move(value);
    return code_of([&] { Tokenizer::from_gguf(metadata, json::object()); });
  };
  EXPECT_EQ(change("tokenizer.ggml.model", "bert"), Code::unsupported);
  EXPECT_EQ(change("tokenizer.ggml.pre", "never-heard-of"), Code::unsupported);
  EXPECT_EQ(change("tokenizer.ggml.tokens", nullptr), Code::bad_config);
  EXPECT_EQ(change("tokenizer.ggml.tokens", json::array({1})), Code::bad_config);
  EXPECT_EQ(change("tokenizer.ggml.token_type", json::array({1})), Code::bad_config);
  EXPECT_EQ(change("tokenizer.ggml.merges", "x"), Code::bad_config);
  EXPECT_EQ(change("tokenizer.ggml.eos_token_id", 1 << 30), Code::bad_config);
  EXPECT_EQ(code_of([] { Tokenizer::from_gguf(json(), json()); }), Code::bad_config);
}

TEST(Markers, Tools) {
  const auto none = [](std::string_view) { return false; };
  EXPECT_EQ(infer_tools("<tool_call>{{ tool_call.name }}", none).parser, "json_tools");
  EXPECT_EQ(infer_tools("<tool_call>\\n<function=", none).parser, "qwen3_coder");
  EXPECT_EQ(infer_tools("[TOOL_CALLS]", none).end, "");
  EXPECT_EQ(infer_tools("plain", none).parser, "");
  EXPECT_EQ(infer_tools("", [](auto t) { return t == "<|tool_call_start|>" || t == "<|tool_call_end|>"; }).parser, "pythonic");
  EXPECT_EQ(infer_thinking([](auto t) { return t == "<|channel>" || t == "<channel|>"; }).start, "<|channel>thought");
}

}  // namespace
