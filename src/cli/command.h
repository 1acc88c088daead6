// What the commands share: each adds itself to the parser and runs when it was chosen.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <string>

#include <CLI/CLI.hpp>

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

/** The local path of --model (empty = the default model, named on stderr); downloads show their progress on a terminal. */
std::filesystem::path find_model(const std::string& path_or_repo);

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
