// Tokens <-> text for one model. Reference: mlx_lm/tokenizer_utils.py. Thread-safe after construction.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "text/detokenizer.h"

namespace mlxlm::text {

struct TemplateOptions {
  bool add_generation_prompt = true;
  bool continue_final_message = false;
  json tools = nullptr;
  json extra = json::object();  // further variables of the template; enable_thinking is set unless given
};

class Tokenizer {
 public:
  /** tokenizer.json, tokenizer_config.json, chat_template.jinja|chat_template.json, special_tokens_map.json of a folder;
   *  `config` is the model's (eos_token_id, unless generation_config.json has one). Throws Error(not_found), Error(bad_config). */
  static Tokenizer from_folder(const std::filesystem::path& folder, const json& config);
  /** From GGUF metadata (tokenizer.ggml.*): gpt2 (BPE) and llama (SPM) vocabularies. Throws Error(unsupported). */
  static Tokenizer from_gguf(const json& metadata, const json& config);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  std::vector<int> encode(std::string_view text, bool add_special_tokens) const;
  std::string decode(const std::vector<int>& tokens, bool skip_special_tokens = false) const;
  int vocab_size() const;  // with added tokens
  std::optional<int> token_to_id(std::string_view token) const;
  std::optional<std::string> id_to_token(int id) const;

  const std::optional<std::string>& bos_token() const;
  const std::set<int>& eos_token_ids() const;
  /** A token's text, or an integer as text. Throws Error(bad_request) when it is neither. */
  void add_eos_token(const std::string& token_or_id);

  bool has_chat_template() const;
  void set_chat_template(std::string source);
  /** messages: [{"role","content"|[{"type":"text"}], ...}]. Throws Error(bad_template) (also for raise_exception, with its message),
   *  Error(unsupported) for images. */
  std::string apply_chat_template(const json& messages, const TemplateOptions& options = {}) const;

  /** Markers of thinking, as mlx_lm infers them from the vocabulary; empty = none. */
  const std::string& think_start() const;
  const std::string& think_end() const;
  bool has_thinking() const { return !think_start().empty(); }
  /** The kind of tool calls that the chat template speaks ("json_tools", "qwen3_coder", ...) and its markers; "" = none. */
  const std::string& tool_parser() const;
  const std::string& tool_start() const;
  const std::string& tool_end() const;

  /** "bpe", "spm", "spm_no_trim" or "naive": chosen from the decoder of tokenizer.json by the reference's rules. */
  std::string_view detokenizer_kind() const;
  std::unique_ptr<Detokenizer> make_detokenizer() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace mlxlm::text
