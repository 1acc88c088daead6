// One model's tokenizer: vocabulary, special tokens, chat template, detokenizer. Reference: mlx_lm/tokenizer_utils.py load,
// TokenizerWrapper
#include "text/tokenizer.h"

#include <charconv>

#include "base/error.h"
#include "base/files.h"
#include "text/chat_template.h"
#include "text/gguf_vocab.h"
#include "text/markers.h"
#include "text/rust_handles.h"

namespace mlxlm::text {

struct Tokenizer::Impl {
  explicit Impl(HfTokenizer loaded) : hf(std::move(loaded)) {}

  HfTokenizer hf;
  ChatTemplates templates;
  std::string unsupported_template;      // the reference's Python module that makes the prompt instead of a template; "" = none
  json special_tokens = json::object();  // bos_token, eos_token, ...: text
  std::optional<std::string> bos_token;
  std::optional<bool> add_bos, add_eos;  // tokenizer_config's override of the post-processor
  std::set<int> eos_token_ids;
  ThinkingMarkers thinking;
  ToolMarkers tools;
  std::string_view kind;
  bool clean_spaces = false;
  std::shared_ptr<const TokenBytes> token_bytes;

  void read_special_tokens(const json& tokenizer_config, const json& special_tokens_map);
  void read_eos(const json& eos_token_id);
  void choose_detokenizer();
  void infer_markers(const json& tokenizer_config);
};

namespace {

constexpr const char* kNamedTokens[] = {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"};

json object_in(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return json::object();
  json out = read_json_file(path);
  if (!out.is_object()) throw Error(Code::bad_config, path.filename().string(), "wanted an object");
  return out;
}

/** generation_config.json's eos_token_id goes before the model's. Reference: mlx_lm/utils.py load_config */
json eos_of(const std::filesystem::path& folder, const json& config) {
  const json generation = object_in(folder / "generation_config.json");
  const bool given = generation.contains("eos_token_id") && !generation["eos_token_id"].is_null() && generation["eos_token_id"] != 0;
  const json& source = given ? generation : config;
  return source.is_object() && source.contains("eos_token_id") ? source["eos_token_id"] : json();
}

/** "text" or {"content": "text", ...}; "" otherwise. */
std::string token_text(const json& token) {
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string()) return token["content"].get<std::string>();
  return {};
}

bool flag(const json& object, const char* name, bool otherwise) {
  const auto found = object.find(name);
  return found != object.end() && found->is_boolean() ? found->get<bool>() : otherwise;
}

std::optional<bool> optional_flag(const json& object, const char* name) {
  if (object.contains(name) && object[name].is_boolean()) return object[name].get<bool>();
  return std::nullopt;
}

void add_token(HfTokenizer& hf, const json& token, bool special) {
  const std::string text = token_text(token);
  if (text.empty()) return;
  const json none = json::object();
  const json& fields = token.is_object() ? token : none;
  hf.add_token(text, special || flag(fields, "special", false), flag(fields, "normalized", !special), flag(fields, "lstrip", false),
               flag(fields, "rstrip", false));
}

/** Sequence[Replace U+2581 by space, ByteFallback, Fuse], then Strip of one leading space. */
std::string_view detokenizer_kind_of(const json& decoder) {
  const json spm = json::array({{{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}},
                                {{"type", "ByteFallback"}},
                                {{"type", "Fuse"}},
                                {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}});
  if (!decoder.is_object()) return "naive";
  if (decoder.value("type", json()) == "ByteLevel") return "bpe";
  if (decoder.value("type", json()) != "Sequence" || !decoder.contains("decoders") || !decoder["decoders"].is_array()) return "naive";
  const json& steps = decoder["decoders"];
  if (steps.size() != 3 && steps.size() != 4) return "naive";
  for (std::size_t i = 0; i < steps.size(); ++i)
    if (nlohmann::json(steps[i]) != nlohmann::json(spm[i])) return "naive";
  return steps.size() == 4 ? "spm" : "spm_no_trim";
}

}  // namespace

void Tokenizer::Impl::read_special_tokens(const json& tokenizer_config, const json& special_tokens_map) {
  std::set<std::string> added;
  for (const auto& entry : hf.vocabulary(true))
    if (entry.added) added.insert(entry.text);
  if (const auto decoder = tokenizer_config.find("added_tokens_decoder"); decoder != tokenizer_config.end() && decoder->is_object())
    for (const auto& [id, token] : decoder->items())
      if (added.insert(token_text(token)).second) add_token(hf, token, false);
  for (const char* name : kNamedTokens) {
    const json* token = tokenizer_config.contains(name) ? &tokenizer_config[name] : nullptr;
    if (!token && special_tokens_map.contains(name)) token = &special_tokens_map[name];
    const std::string text = token ? token_text(*token) : std::string();
    if (text.empty()) continue;
    special_tokens[name] = text;
    if (added.insert(text).second) add_token(hf, *token, true);
  }
  if (special_tokens.contains("bos_token")) bos_token = special_tokens["bos_token"].get<std::string>();
  if (tokenizer_config.contains("add_bos_token") || tokenizer_config.contains("add_eos_token")) {
    add_bos = optional_flag(tokenizer_config, "add_bos_token").value_or(false);
    add_eos = optional_flag(tokenizer_config, "add_eos_token").value_or(false);
  }
}

void Tokenizer::Impl::read_eos(const json& eos_token_id) {
  if (eos_token_id.is_number_integer()) eos_token_ids.insert(eos_token_id.get<int>());
  if (eos_token_id.is_array())
    for (const auto& id : eos_token_id)
      if (id.is_number_integer()) eos_token_ids.insert(id.get<int>());
  if (special_tokens.contains("eos_token"))
    if (const int id = hf.token_to_id(special_tokens["eos_token"].get<std::string>()); id >= 0) eos_token_ids.insert(id);
}

void Tokenizer::Impl::choose_detokenizer() {
  kind = detokenizer_kind_of(hf.decoder());
  if (kind == "naive") {
    clean_spaces = hf.decode(hf.encode("a ,b", false), false).find(" ,") == std::string::npos;
    return;
  }
  auto table = std::make_shared<TokenBytes>();
  for (const auto& entry : hf.vocabulary()) table->push_back(kind == "bpe" ? byte_level_bytes(entry.text) : spm_bytes(entry.text));
  token_bytes = std::move(table);
}

void Tokenizer::Impl::infer_markers(const json& tokenizer_config) {
  const auto has_token = [this](std::string_view token) { return hf.token_to_id(token) >= 0; };
  thinking = infer_thinking(has_token);
  const auto given = [&](const char* name) {
    return tokenizer_config.contains(name) && tokenizer_config[name].is_string() ? tokenizer_config[name].get<std::string>()
                                                                                 : std::string();
  };
  const std::string parser = given("tool_parser_type");
  tools = parser.empty() ? infer_tools(templates.default_source(), has_token) : tool_markers(parser);
  unsupported_template = given("chat_template_type");
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::from_folder(const std::filesystem::path& folder, const json& config) {
  namespace fs = std::filesystem;
  if (!fs::exists(folder / "tokenizer.json")) {
    for (const char* name : {"tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "tekken.json", "spiece.model"})
      if (fs::exists(folder / name))
        throw Error(Code::unsupported, folder.string(), std::string("has ") + name + " but no tokenizer.json, which is wanted");
    throw Error(Code::not_found, folder.string(), "no tokenizer.json");
  }
  const json tokenizer_config = object_in(folder / "tokenizer_config.json");
  auto impl = std::make_unique<Impl>(HfTokenizer(read_text_file(folder / "tokenizer.json"), "tokenizer.json"));
  impl->read_special_tokens(tokenizer_config, object_in(folder / "special_tokens_map.json"));
  impl->templates = ChatTemplates::from_folder(folder, tokenizer_config);
  impl->read_eos(eos_of(folder, config));
  impl->choose_detokenizer();
  impl->infer_markers(tokenizer_config);
  return Tokenizer(std::move(impl));
}

Tokenizer Tokenizer::from_gguf(const json& metadata, const json& config) {
  const GgufTokenizer files = tokenizer_from_gguf(metadata);
  auto impl = std::make_unique<Impl>(HfTokenizer(files.model, "GGUF vocabulary"));
  impl->read_special_tokens(files.tokenizer_config, json::object());
  if (files.tokenizer_config.contains("chat_template")) impl->templates.set(files.tokenizer_config["chat_template"]);
  impl->read_eos(config.is_object() && config.contains("eos_token_id") ? config["eos_token_id"] : json());
  for (const char* key : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"})
    if (metadata.contains(key)) impl->read_eos(metadata[key]);
  impl->choose_detokenizer();
  impl->infer_markers(files.tokenizer_config);
  return Tokenizer(std::move(impl));
}

std::vector<int> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  if (!add_special_tokens || !impl_->add_bos) return impl_->hf.encode(text, add_special_tokens);
  std::vector<int> out = impl_->hf.encode(text, false);
  const auto id_of = [&](const char* name) {
    return impl_->special_tokens.contains(name) ? impl_->hf.token_to_id(impl_->special_tokens[name].get<std::string>()) : -1;
  };
  if (const int bos = id_of("bos_token"); *impl_->add_bos && bos >= 0) out.insert(out.begin(), bos);
  if (const int eos = id_of("eos_token"); *impl_->add_eos && eos >= 0) out.push_back(eos);
  return out;
}

std::string Tokenizer::decode(const std::vector<int>& tokens, bool skip_special_tokens) const {
  return impl_->hf.decode(tokens, skip_special_tokens);
}

int Tokenizer::vocab_size() const {
  return impl_->hf.vocab_size();
}

std::optional<int> Tokenizer::token_to_id(std::string_view token) const {
  const int id = impl_->hf.token_to_id(token);
  return id < 0 ? std::nullopt : std::optional(id);
}

std::optional<std::string> Tokenizer::id_to_token(int id) const {
  std::string out;
  return impl_->hf.id_to_token(id, out) ? std::optional(std::move(out)) : std::nullopt;
}

const std::optional<std::string>& Tokenizer::bos_token() const {
  return impl_->bos_token;
}
const std::set<int>& Tokenizer::eos_token_ids() const {
  return impl_->eos_token_ids;
}

void Tokenizer::add_eos_token(const std::string& token_or_id) {
  int id = -1;
  const char* end = token_or_id.data() + token_or_id.size();
  const auto parsed = std::from_chars(token_or_id.data(), end, id);
  if (parsed.ec != std::errc() || parsed.ptr != end) id = impl_->hf.token_to_id(token_or_id);
  if (id < 0) throw Error(Code::bad_request, "eos token", "got '" + token_or_id + "', which is not a token of this tokenizer");
  impl_->eos_token_ids.insert(id);
}

bool Tokenizer::has_chat_template() const {
  return !impl_->templates.empty() || !impl_->unsupported_template.empty();
}

void Tokenizer::set_chat_template(std::string source) {
  impl_->templates = {};
  impl_->templates.set(json(std::move(source)));
  impl_->unsupported_template.clear();
}

std::string Tokenizer::apply_chat_template(const json& messages, const TemplateOptions& options) const {
  if (!impl_->unsupported_template.empty())
    throw Error(Code::unsupported, "chat_template_type", "got '" + impl_->unsupported_template + "', wanted a Jinja chat template");
  json variables = impl_->special_tokens;
  variables["enable_thinking"] = has_thinking();
  if (options.extra.is_object())
    for (const auto& [name, value] : options.extra.items()) variables[name] = value;
  return impl_->templates.render({.messages = messages,
                                  .tools = options.tools,
                                  .add_generation_prompt = options.add_generation_prompt,
                                  .continue_final_message = options.continue_final_message,
                                  .variables = std::move(variables)});
}

const std::string& Tokenizer::think_start() const {
  return impl_->thinking.start;
}
const std::string& Tokenizer::think_end() const {
  return impl_->thinking.end;
}
const std::string& Tokenizer::tool_parser() const {
  return impl_->tools.parser;
}
const std::string& Tokenizer::tool_start() const {
  return impl_->tools.start;
}
const std::string& Tokenizer::tool_end() const {
  return impl_->tools.end;
}
std::string_view Tokenizer::detokenizer_kind() const {
  return impl_->kind;
}

std::unique_ptr<Detokenizer> Tokenizer::make_detokenizer() const {
  if (impl_->kind == "bpe") return make_bytes_detokenizer(impl_->token_bytes, true, "!");
  if (impl_->kind != "naive") return make_bytes_detokenizer(impl_->token_bytes, impl_->kind == "spm", "");
  return make_naive_detokenizer([hf = impl_->hf](const std::vector<int>& tokens) { return hf.decode(tokens, false); }, impl_->clean_spaces);
}

}  // namespace mlxlm::text
