// The text of answers as their tokens come, request by request: for whoever reads the engine's events.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "text/stop_matcher.h"
#include "text/tokenizer.h"

namespace mlxlm::gen {

/** Requests may begin and end at any time. Thread: one; no MLX. */
class TextEvents {
 public:
  explicit TextEvents(const text::Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  /** `stop`: texts that end the answer; empty ones are ignored. */
  void begin(engine::SequenceId id, const std::vector<std::string>& stop);
  /** Forgets a request whose last event will not come. */
  void end(engine::SequenceId id) { open_.erase(id); }

  struct Piece {
    std::string text{};    // UTF-8, whole code points; what may be the beginning of a stop text is held back
    bool stopped = false;  // a stop text was met: the request is to be ended, and more events of it bring no text
  };
  /** What an event adds. A token that the engine stopped at has no text. Nothing for requests that are not known. */
  Piece take(const engine::Event& event);

 private:
  struct Open {
    std::unique_ptr<text::Detokenizer> detokenizer;
    text::StopMatcher stops;
  };
  const text::Tokenizer& tokenizer_;
  std::map<engine::SequenceId, Open> open_;
};

}  // namespace mlxlm::gen
