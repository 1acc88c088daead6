// Messages, and caches that hold as much of them as can be kept between turns.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "api/session.h"
#include "gen/generate.h"

namespace mlxlm::cli {

/** Thread: the one that owns MLX. */
class Conversation {
 public:
  /** `variables` are further ones of the chat template. Throws Error(unsupported) for a model without a chat template. */
  Conversation(Session& session, gen::Options options, json variables);

  struct Turn {
    gen::Response last;
    int reused_tokens = 0;  // of the prompt, already in the caches
  };
  /** Adds the message and its answer. One that was cancelled stays with what on_text got; without any text the message is taken back, as it
   * is when this throws. */
  Turn answer(const std::string& message, const std::function<void(const std::string& text)>& on_text);

  void set_system(std::optional<std::string> text) { system_ = std::move(text); }
  /** Forgets all messages but the system prompt. */
  void reset() { messages_ = json::array(); }
  std::size_t size() const { return messages_.size(); }

  /** [{"role", "content"}, ...], the system prompt first. */
  json to_json() const;
  /** Takes such a list, or an object with it as "messages", instead of what there is. Throws Error(bad_request), Error(bad_template) and
   * changes nothing then. */
  void from_json(const json& value);

 private:
  std::vector<int> render() const;
  /** Makes the caches hold a prefix of the prompt and no more; returns its length, less than the prompt's. */
  std::size_t keep_common_prefix(const std::vector<int>& prompt);
  void drop_caches();

  Session& session_;
  gen::Options options_;
  json variables_;
  uint64_t turns_ = 0;
  std::optional<std::string> system_;
  json messages_ = json::array();
  cache::Caches caches_;
  std::vector<int> held_;  // what the caches hold
};

}  // namespace mlxlm::cli
