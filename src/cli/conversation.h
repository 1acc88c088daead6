// Messages, and caches that hold as much of them as can be kept between turns.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "api/session.h"
#include "gen/generate.h"
#include "gen/speculative.h"

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
  std::vector<int> render(bool for_answer = true) const;
  /** Makes the caches hold a prefix of the prompt and no more; returns its length, less than the prompt's. */
  std::size_t keep_common_prefix(const std::vector<int>& prompt);
  /** Takes the latest snapshot that is the beginning of the prompt; returns its length. */
  std::size_t keep_snapshot(const std::vector<int>& prompt);
  /** Where the messages end and the answer's opening begins, if a snapshot of there may be needed; else 0. */
  int snapshot_point(const std::vector<int>& prompt) const;
  /** Makes room for the prompt, for which snapshots give way, and says whether there is some for one more of them, of `tokens` tokens. */
  bool has_room_for_snapshot(int64_t prompt_tokens, int64_t tokens);
  void take_snapshot();
  void drop_caches();

  Session& session_;
  gen::Options options_;
  json variables_;
  uint64_t turns_ = 0;
  std::optional<std::string> system_;
  json messages_ = json::array();
  cache::Caches caches_;
  std::vector<int> held_;  // what the caches hold
  /** Caches that cannot go back, as they were at the end of a message: a template may show the answer in another way, or without what the
   * model thought, once it is in the past. */
  struct Snapshot {
    std::vector<int> tokens;
    cache::Caches caches;
  };
  std::vector<Snapshot> snapshots_;  // the latest, oldest first
  gen::DraftMemory drafts_;
};

}  // namespace mlxlm::cli
