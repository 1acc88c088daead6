// GGUF vocabularies as tokenizers. Reference: llama.cpp src/llama-vocab.cpp; transformers convert_slow_tokenizer.py (merges)
#include "text/gguf_vocab.h"

#include <algorithm>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/error.h"

namespace mlxlm::text {
namespace {

constexpr int kUnknown = 2, kControl = 3, kUserDefined = 4;  // tokenizer.ggml.token_type

constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekken = R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
                                R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
                                R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kThreeDigits = R"(\p{N}{1,3})";
constexpr const char* kDeepseek3Cjk = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+";
constexpr const char* kDeepseek3 =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

enum class Extra { none, digits };
struct PreTokenizer {
  std::string_view name;
  std::vector<const char*> regexes;  // empty = ByteLevel's own (GPT-2)
  Extra extra = Extra::none;
  bool ignore_merges = false, add_bos = false, nfc = false;
};

const std::vector<PreTokenizer>& pre_tokenizers() {
  static const std::vector<PreTokenizer> table = [] {
    std::vector<PreTokenizer> out;
    for (auto name : {"default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "jina-es", "jina-de", "gigachat"})
      out.push_back({.name = name, .regexes = {}});
    for (auto name : {"smollm", "starcoder", "refact", "command-r", "codeshell"})
      out.push_back({.name = name, .regexes = {}, .extra = Extra::digits});
    for (auto name : {"llama-bpe", "llama3", "llama-v3", "lfm2", "falcon3"})
      out.push_back({.name = name, .regexes = {kLlama3}, .ignore_merges = true, .add_bos = true});
    for (auto name : {"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}) out.push_back({.name = name, .regexes = {kLlama3}});
    for (auto name : {"qwen2", "deepseek-r1-qwen", "megrez"}) out.push_back({.name = name, .regexes = {kQwen2}, .nfc = true});
    out.push_back({.name = "stablelm2", .regexes = {kQwen2}});
    for (auto name : {"gpt-4o", "llama4"}) out.push_back({.name = name, .regexes = {kGpt4o}});
    out.push_back({.name = "tekken", .regexes = {kTekken}, .ignore_merges = true, .add_bos = true});
    for (auto name : {"deepseek-v3", "hunyuan-dense"}) out.push_back({.name = name, .regexes = {kThreeDigits, kDeepseek3Cjk, kDeepseek3}});
    return out;
  }();
  return table;
}

const PreTokenizer& find_pre_tokenizer(const std::string& name) {
  for (const auto& entry : pre_tokenizers())
    if (entry.name == name) return entry;
  throw Error(Code::unsupported, "tokenizer.ggml.pre", "got '" + name + "', which is no known pre-tokenizer");
}

json pre_tokenizer_json(const PreTokenizer& pre) {
  json steps = json::array();
  if (pre.extra == Extra::digits) steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
  for (const char* regex : pre.regexes)
    steps.push_back({{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}, {"invert", false}});
  steps.push_back({{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", pre.regexes.empty()}});
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

/** Its texts are the metadata's. */
struct Vocabulary {
  std::vector<std::string_view> tokens;
  std::vector<int> types;
  std::unordered_map<std::string_view, int> ids;
};

const json* find(const json& metadata, const char* key) {
  const auto found = metadata.find(key);
  return found == metadata.end() || found->is_null() ? nullptr : &*found;
}

const json& array_of(const json& metadata, const char* key) {
  const json* value = find(metadata, key);
  if (!value || !value->is_array()) throw Error(Code::bad_config, key, "missing, wanted an array");
  return *value;
}

std::vector<std::string_view> texts_in(const json& metadata, const char* key) {
  const json* value = find(metadata, key);
  if (value == nullptr) throw Error(Code::bad_config, key, "missing, wanted an array");
  return texts_of(*value, key);
}

Vocabulary read_vocabulary(const json& metadata) {
  Vocabulary out;
  out.tokens = texts_in(metadata, "tokenizer.ggml.tokens");
  out.types.assign(out.tokens.size(), 1);
  if (const json* types = find(metadata, "tokenizer.ggml.token_type")) {
    if (!types->is_array() || types->size() != out.tokens.size())
      throw Error(Code::bad_config, "tokenizer.ggml.token_type", "its length is not that of tokenizer.ggml.tokens");
    for (std::size_t i = 0; i < out.types.size(); ++i)
      if ((*types)[i].is_number_integer()) out.types[i] = (*types)[i].get<int>();
  }
  out.ids.reserve(out.tokens.size());
  for (std::size_t i = 0; i < out.tokens.size(); ++i) out.ids.emplace(out.tokens[i], static_cast<int>(i));
  return out;
}

json added_tokens_json(const Vocabulary& vocabulary) {
  json out = json::array();
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const int type = vocabulary.types[i];
    if (type != kControl && type != kUserDefined && type != kUnknown) continue;
    if (vocabulary.tokens[i].empty()) continue;
    out.push_back({{"id", i},
                   {"content", vocabulary.tokens[i]},
                   {"single_word", false},
                   {"lstrip", false},
                   {"rstrip", false},
                   {"normalized", false},
                   {"special", type != kUserDefined}});
  }
  return out;
}

using Merges = std::vector<std::array<uint32_t, 2>>;

Merges bpe_merges(const json& metadata, const Vocabulary& vocabulary) {
  Merges out;
  std::string whole;
  for (const auto text : texts_in(metadata, "tokenizer.ggml.merges")) {
    const auto space = text.find(' ', 1);
    if (space == std::string_view::npos) continue;
    const auto left = vocabulary.ids.find(text.substr(0, space)), right = vocabulary.ids.find(text.substr(space + 1));
    if (left == vocabulary.ids.end() || right == vocabulary.ids.end()) continue;
    whole.assign(left->first).append(right->first);
    if (vocabulary.ids.contains(whole)) out.push_back({static_cast<uint32_t>(left->second), static_cast<uint32_t>(right->second)});
  }
  return out;
}

/** Merges that rank as SentencePiece's scores do: every way to split a piece in two, best piece first. */
Merges score_merges(const json& metadata, const Vocabulary& vocabulary) {
  const json& scores = array_of(metadata, "tokenizer.ggml.scores");
  if (scores.size() != vocabulary.tokens.size())
    throw Error(Code::bad_config, "tokenizer.ggml.scores", "its length is not that of tokenizer.ggml.tokens");
  struct Merge {
    double score;
    int left, right;
  };
  std::vector<Merge> merges;
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const std::string_view piece = vocabulary.tokens[i];
    if (piece.size() > 512 || vocabulary.types[i] == kControl || vocabulary.types[i] == kUnknown) continue;
    const double score = scores[i].is_number() ? scores[i].get<double>() : 0;
    for (std::size_t cut = 1; cut < piece.size(); ++cut) {
      if ((piece[cut] & 0xC0) == 0x80) continue;
      const auto left = vocabulary.ids.find(piece.substr(0, cut)), right = vocabulary.ids.find(piece.substr(cut));
      if (left != vocabulary.ids.end() && right != vocabulary.ids.end()) merges.push_back({score, left->second, right->second});
    }
  }
  std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) { return a.score > b.score; });
  Merges out;
  for (const auto& m : merges) out.push_back({static_cast<uint32_t>(m.left), static_cast<uint32_t>(m.right)});
  return out;
}

json bpe_options() {
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"ignore_merges", false},
          {"vocab", json::object()},
          {"merges", json::array()}};
}

BytePairs byte_pairs(const json& tokenizer, const Vocabulary& vocabulary, Merges merges) {
  BytePairs out{.tokenizer_json = to_text(tokenizer), .merges = std::move(merges)};
  for (const auto& token : vocabulary.tokens) {
    out.token_text += token;
    out.token_ends.push_back(out.token_text.size());
  }
  return out;
}

json gpt2_tokenizer(const Vocabulary& vocabulary, const PreTokenizer& pre) {
  json model = bpe_options();
  model["ignore_merges"] = pre.ignore_merges;
  return {{"version", "1.0"},
          {"added_tokens", added_tokens_json(vocabulary)},
          {"normalizer", pre.nfc ? json{{"type", "NFC"}} : json(nullptr)},
          {"pre_tokenizer", pre_tokenizer_json(pre)},
          {"post_processor", nullptr},
          {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
          {"model", std::move(model)}};
}

json spm_tokenizer(const Vocabulary& vocabulary, bool space_prefix) {
  json model = bpe_options();
  model["fuse_unk"] = true;
  model["byte_fallback"] = true;
  for (std::size_t i = 0; i < vocabulary.types.size(); ++i)
    if (vocabulary.types[i] == kUnknown) model["unk_token"] = vocabulary.tokens[i];
  const json replace = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}};
  json normalizer = replace;
  json decoders = json::array(
      {{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}}, {{"type", "ByteFallback"}}, {{"type", "Fuse"}}});
  if (space_prefix) {
    normalizer = {{"type", "Sequence"}, {"normalizers", json::array({{{"type", "Prepend"}, {"prepend", "▁"}}, replace})}};
    decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }
  return {{"version", "1.0"},          {"added_tokens", added_tokens_json(vocabulary)},
          {"normalizer", normalizer},  {"pre_tokenizer", nullptr},
          {"post_processor", nullptr}, {"decoder", {{"type", "Sequence"}, {"decoders", decoders}}},
          {"model", std::move(model)}};
}

bool flag_of(const json& metadata, const char* key, bool otherwise) {
  const json* value = find(metadata, key);
  return value && value->is_boolean() ? value->get<bool>() : otherwise;
}

json config_of(const json& metadata, const Vocabulary& vocabulary, bool add_bos) {
  json out = json::object();
  constexpr std::pair<const char*, const char*> kNames[] = {{"tokenizer.ggml.bos_token_id", "bos_token"},
                                                            {"tokenizer.ggml.eos_token_id", "eos_token"},
                                                            {"tokenizer.ggml.unknown_token_id", "unk_token"},
                                                            {"tokenizer.ggml.padding_token_id", "pad_token"}};
  for (const auto& [key, name] : kNames) {
    const json* id = find(metadata, key);
    if (!id || !id->is_number_integer()) continue;
    const auto index = id->get<int64_t>();
    if (index < 0 || index >= static_cast<int64_t>(vocabulary.tokens.size()))
      throw Error(Code::bad_config, key, "got " + std::to_string(index) + ", wanted an id of the vocabulary");
    out[name] = vocabulary.tokens[static_cast<std::size_t>(index)];
  }
  out["add_bos_token"] = flag_of(metadata, "tokenizer.ggml.add_bos_token", add_bos);
  out["add_eos_token"] = flag_of(metadata, "tokenizer.ggml.add_eos_token", false);
  if (const json* source = find(metadata, "tokenizer.chat_template"); source && source->is_string()) out["chat_template"] = *source;
  return out;
}

}  // namespace

GgufTokenizer tokenizer_from_gguf(const json& metadata) {
  const json* model = metadata.is_object() ? find(metadata, "tokenizer.ggml.model") : nullptr;
  if (!model || !model->is_string()) throw Error(Code::bad_config, "tokenizer.ggml.model", "missing, wanted a string");
  const auto& kind = model->get_ref<const std::string&>();
  if (kind != "gpt2" && kind != "llama") throw Error(Code::unsupported, "tokenizer.ggml.model", "got '" + kind + "', wanted gpt2 or llama");
  const Vocabulary vocabulary = read_vocabulary(metadata);
  if (kind == "llama") {
    const bool space_prefix = flag_of(metadata, "tokenizer.ggml.add_space_prefix", true);
    return {byte_pairs(spm_tokenizer(vocabulary, space_prefix), vocabulary, score_merges(metadata, vocabulary)),
            config_of(metadata, vocabulary, true)};
  }
  const json* name = find(metadata, "tokenizer.ggml.pre");
  const PreTokenizer& pre = find_pre_tokenizer(name && name->is_string() ? name->get<std::string>() : "default");
  return {byte_pairs(gpt2_tokenizer(vocabulary, pre), vocabulary, bpe_merges(metadata, vocabulary)),
          config_of(metadata, vocabulary, pre.add_bos)};
}

}  // namespace mlxlm::text
