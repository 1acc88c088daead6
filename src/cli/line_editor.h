// What the user of a conversation types: lines edited with libedit on a terminal, plain lines from a pipe, and Ctrl-C.
#pragma once

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>

namespace mlxlm::cli {

/** Ctrl-C of a conversation on a terminal. From install() on a press sets flag() and wakes whoever polls wake_fd(); it never ends the
 * program, but for the third press without a clear() between (a long step cannot be stopped otherwise). */
class Interrupts {
 public:
  static void install();
  static void clear();
  static const std::atomic<bool>& flag();
  static int wake_fd();
};

/** Lines from stdin. With `terminal`, prompts are shown, lines can be edited (where libedit was there at build time and TERM is not
 * "dumb"), and Interrupts must be installed. */
class LineEditor {
 public:
  enum class Got { line, interrupted, end };

  /** An empty history_file means that nothing is kept; a file that cannot be read or written is none. */
  LineEditor(bool terminal, std::filesystem::path history_file);
  ~LineEditor();
  LineEditor(const LineEditor&) = delete;
  LineEditor& operator=(const LineEditor&) = delete;

  /** The next line, without its end; valid UTF-8, and of more than one line when it was pasted so. Throws Error(bad_request) for one that
   * is too long (the next call reads the line after it) and Error(io). Ctrl-C pressed since the last Interrupts::clear() interrupts it at
   * once: between two lines of one message it must not be lost. */
  Got read(const char* prompt, std::string& line);
  /** Makes an entry the newest of the history; nothing unless lines are edited. */
  void remember(const std::string& entry);

 private:
  Got read_plain(const char* prompt, std::string& line);
  struct Editing;  // libedit's side
  bool terminal_;
  std::string buffer_;       // read, not yet returned
  std::size_t scanned_ = 0;  // no end of a line before here
  std::unique_ptr<Editing> editing_;
};

/** $XDG_STATE_HOME/mlx-lm/chat_history, by default below ~/.local/state; empty when there is no home. */
std::filesystem::path chat_history_file();

}  // namespace mlxlm::cli
