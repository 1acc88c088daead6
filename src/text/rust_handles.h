// The Rust library's handles with C++ lifetimes, and its errors as mlxlm::Error.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "mlxlm_rust.h"

namespace mlxlm::text {

/** A token as its vocabulary writes it. */
struct VocabularyEntry {
  std::string text;
  bool exists = false, added = false, special = false;
};

/** A byte-pair tokenizer whose vocabulary has not been written as JSON. */
struct BytePairs {
  std::string tokenizer_json{};                   // with an empty "vocab" and empty "merges"
  std::string token_text{};                       // all tokens, one after another
  std::vector<uint64_t> token_ends{};             // [vocabulary]
  std::vector<std::array<uint32_t, 2>> merges{};  // ids of the two parts, best pair first
};

/** A tokenizer.json, loaded. */
class HfTokenizer {
 public:
  /** `where` names the source in errors. Throws Error(bad_config). */
  HfTokenizer(std::string_view tokenizer_json, std::string_view where);
  HfTokenizer(const BytePairs& model, std::string_view where);
  void add_token(std::string_view token, bool special, bool normalized, bool lstrip, bool rstrip);
  std::vector<int> encode(std::string_view text, bool add_special_tokens) const;
  std::string decode(const std::vector<int>& tokens, bool skip_special_tokens) const;
  int vocab_size() const;
  int token_to_id(std::string_view token) const;  // -1 = none
  bool id_to_token(int id, std::string& out) const;
  json decoder() const;
  /** Indexed by token id. With only_added those of the model do not exist. */
  std::vector<VocabularyEntry> vocabulary(bool only_added = false) const;

 private:
  std::shared_ptr<MlxlmTokenizer> handle_;
};

/** A compiled chat template. */
class JinjaTemplate {
 public:
  /** Throws Error(bad_template). */
  explicit JinjaTemplate(std::string_view source);
  /** Throws Error(bad_template); for raise_exception the message ends with the template's own. */
  std::string render(const json& context) const;

 private:
  std::shared_ptr<MlxlmTemplate> handle_;
};

}  // namespace mlxlm::text
