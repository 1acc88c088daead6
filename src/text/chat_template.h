// Chat templates: where a model folder keeps them, and messages -> prompt.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "base/json.h"
#include "text/rust_handles.h"

namespace mlxlm::text {

struct ChatRequest {
  json messages;
  json tools = nullptr;
  bool add_generation_prompt = true;
  bool continue_final_message = false;
  json variables = json::object();  // special tokens and further variables
};

/** Named templates of one model. Compiled at each render (less than a millisecond), so that a broken one hurts only who uses it. */
class ChatTemplates {
 public:
  /** HF's order: chat_template.jinja, tokenizer_config.json, chat_template.json; additional_chat_templates/NAME.jinja beside them. */
  static ChatTemplates from_folder(const std::filesystem::path& folder, const json& tokenizer_config);
  /** A string, or [{"name", "template"}]. Throws Error(bad_config). */
  void set(const json& value);
  bool empty() const { return sources_.empty(); }
  /** The source of "default" ("" if there is none). */
  std::string default_source() const;
  /** Throws Error(bad_template), Error(bad_request), Error(unsupported). Reference: transformers render_jinja_template. */
  std::string render(const ChatRequest& request) const;

 private:
  const std::string& choose(bool with_tools) const;
  std::map<std::string, std::string> sources_;
};

}  // namespace mlxlm::text
