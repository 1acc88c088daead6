// What the commands share: each adds itself to the parser and runs when it was chosen.
#pragma once

#include <atomic>
#include <functional>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include "api/session.h"
#include "cache/quantized.h"
#include "hub/hub.h"

namespace mlxlm::cli {

/** Set by parsing, called by main; returns the exit status. */
using Action = std::function<int()>;

void add_generate(CLI::App& app, Action& action);
void add_batch_generate(CLI::App& app, Action& action);
void add_chat(CLI::App& app, Action& action);
void add_describe(CLI::App& app, Action& action);
void add_cache_prompt(CLI::App& app, Action& action);
void add_logits(CLI::App& app, Action& action);
void add_benchmark(CLI::App& app, Action& action);

/** --cpu-precision exact|default|fast. */
void add_cpu_precision(CLI::App& command, std::string& value);
void set_cpu_precision(const std::string& value);

/** The local path of --model (empty = the default model, named on stderr); downloads show their progress on a terminal. */
std::filesystem::path find_model(const std::string& path_or_repo);

/** --kv-bits, --kv-group-size and --quantized-kv-start. */
cache::Quantization kv_quantization(std::optional<int> bits, std::optional<int> group_size, int start_tokens);

/** --draft-model, --num-draft-tokens and --ngram-draft-tokens. */
struct DraftFlags {
  std::string model;
  int num_tokens = 3, ngram_tokens = 0;
};
void add_drafts(CLI::App& command, DraftFlags& flags);
/** The draft model, if there is one; its tokens are those of `tokenizer`. */
std::optional<Session> open_draft_model(const DraftFlags& flags, const text::Tokenizer& tokenizer);

/** A line on stderr that is written over; nothing unless stderr is a terminal. */
class StatusLine {
 public:
  StatusLine();
  ~StatusLine() { clear(); }
  StatusLine(const StatusLine&) = delete;
  StatusLine& operator=(const StatusLine&) = delete;
  void show(const std::string& text);
  void clear();

 private:
  bool terminal_;
  bool shown_ = false;
};

/** While it lives, the first Ctrl-C sets flag() and the second ends the process. */
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  static const std::atomic<bool>& flag();
};

}  // namespace mlxlm::cli
