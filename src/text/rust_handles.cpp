// The Rust library's handles: calls through its C interface, errors translated.
#include "text/rust_handles.h"

#include "base/utf8.h"

namespace mlxlm::text {
namespace {

std::string take(MlxlmString string) {
  std::string out(string.data, string.size);
  mlxlm_string_free(string);
  return out;
}

std::string one_line(std::string text) {
  for (char& c : text)
    if (c == '\n' || c == '\r') c = ' ';
  return text;
}

void check(int result, MlxlmString error, Code code, std::string_view where) {
  if (result == MLXLM_OK) return;
  const std::string message = take(error);
  throw Error(result == MLXLM_E_INTERNAL ? Code::internal : code, where, one_line(message));
}

}  // namespace

HfTokenizer::HfTokenizer(std::string_view tokenizer_json, std::string_view where) {
  MlxlmTokenizer* raw = nullptr;
  MlxlmString error{};
  check(mlxlm_tokenizer_new(tokenizer_json.data(), tokenizer_json.size(), &raw, &error), error, Code::bad_config, where);
  handle_ = std::shared_ptr<MlxlmTokenizer>(raw, mlxlm_tokenizer_free);
}

HfTokenizer::HfTokenizer(const BytePairs& model, std::string_view where) {
  MlxlmTokenizer* raw = nullptr;
  MlxlmString error{};
  check(mlxlm_tokenizer_new_bpe(model.tokenizer_json.data(), model.tokenizer_json.size(), model.token_text.data(), model.token_ends.data(),
                                model.token_ends.size(), reinterpret_cast<const uint32_t*>(model.merges.data()), model.merges.size(), &raw,
                                &error),
        error, Code::bad_config, where);
  handle_ = std::shared_ptr<MlxlmTokenizer>(raw, mlxlm_tokenizer_free);
}

void HfTokenizer::add_token(std::string_view token, bool special, bool normalized, bool lstrip, bool rstrip) {
  MlxlmString error{};
  check(mlxlm_tokenizer_add_token(handle_.get(), token.data(), token.size(), special, normalized, lstrip, rstrip, &error), error,
        Code::bad_config, "added token");
}

std::vector<int> HfTokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const std::string valid = to_valid_utf8(text);
  MlxlmIds ids{};
  MlxlmString error{};
  check(mlxlm_tokenizer_encode(handle_.get(), valid.data(), valid.size(), add_special_tokens, &ids, &error), error, Code::bad_request,
        "encode");
  std::vector<int> out(ids.data, ids.data + ids.size);
  mlxlm_ids_free(ids);
  return out;
}

std::string HfTokenizer::decode(const std::vector<int>& tokens, bool skip_special_tokens) const {
  std::vector<uint32_t> ids;
  ids.reserve(tokens.size());
  for (int token : tokens)
    if (token >= 0) ids.push_back(static_cast<uint32_t>(token));
  MlxlmString out{}, error{};
  check(mlxlm_tokenizer_decode(handle_.get(), ids.data(), ids.size(), skip_special_tokens, &out, &error), error, Code::bad_request,
        "decode");
  return take(out);
}

int HfTokenizer::vocab_size() const {
  return static_cast<int>(mlxlm_tokenizer_vocab_size(handle_.get()));
}

int HfTokenizer::token_to_id(std::string_view token) const {
  return static_cast<int>(mlxlm_tokenizer_token_to_id(handle_.get(), token.data(), token.size()));
}

bool HfTokenizer::id_to_token(int id, std::string& out) const {
  MlxlmString token{};
  if (id < 0 || !mlxlm_tokenizer_id_to_token(handle_.get(), static_cast<uint32_t>(id), &token)) return false;
  out = take(token);
  return true;
}

json HfTokenizer::decoder() const {
  MlxlmString out{}, error{};
  check(mlxlm_tokenizer_decoder(handle_.get(), &out, &error), error, Code::bad_config, "decoder");
  return parse_json(take(out), "decoder");
}

std::vector<VocabularyEntry> HfTokenizer::vocabulary(bool only_added) const {
  MlxlmVocabulary raw{};
  MlxlmString error{};
  check(mlxlm_tokenizer_vocabulary(handle_.get(), only_added, &raw, &error), error, Code::bad_config, "vocabulary");
  std::vector<VocabularyEntry> out(raw.count);
  for (std::size_t i = 0; i < raw.count; ++i)
    out[i] = {std::string(raw.text + raw.offsets[i], raw.text + raw.offsets[i + 1]), (raw.flags[i] & 1) != 0, (raw.flags[i] & 2) != 0,
              (raw.flags[i] & 4) != 0};
  mlxlm_vocabulary_free(raw);
  return out;
}

JinjaTemplate::JinjaTemplate(std::string_view source) {
  MlxlmTemplate* raw = nullptr;
  MlxlmString error{};
  check(mlxlm_template_new(source.data(), source.size(), &raw, &error), error, Code::bad_template, "chat template");
  handle_ = std::shared_ptr<MlxlmTemplate>(raw, mlxlm_template_free);
}

std::string JinjaTemplate::render(const json& context) const {
  const std::string text = to_text(context);
  MlxlmString out{}, error{};
  check(mlxlm_template_render(handle_.get(), text.data(), text.size(), &out, &error), error, Code::bad_template, "chat template");
  return take(out);
}

}  // namespace mlxlm::text
