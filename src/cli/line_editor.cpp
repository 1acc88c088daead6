// Polls the terminal and the pipe of Ctrl-C together, so that no press is lost whichever thread the signal reaches.
#include "cli/line_editor.h"

#include <algorithm>
#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef MLXLM_LIBEDIT
#include <histedit.h>
#endif

#include <fmt/format.h>

#include "base/error.h"
#include "base/utf8.h"

namespace mlxlm::cli {

namespace {

constexpr std::size_t kMaxLineBytes = std::size_t{4} << 20;
constexpr int kPressesToEnd = 3;

std::atomic<bool> interrupted{false};
std::atomic<int> presses{0};
int wake_pipe[2] = {-1, -1};
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);

void on_interrupt(int signal) {
  const int saved_errno = errno;
  interrupted.store(true, std::memory_order_relaxed);
  if (presses.fetch_add(1) + 1 >= kPressesToEnd) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  [[maybe_unused]] const auto written = ::write(wake_pipe[1], "", 1);
  errno = saved_errno;
}

/** Where to read from: for a terminal a description of our own, so that reads need not block and nobody else's do not. Ctrl-C empties the
 * terminal's queue: after a poll that saw bytes there may be none. */
int input_fd(bool terminal) {
  static const int own = [] {
    const char* name = ::ttyname(STDIN_FILENO);
    return name ? ::open(name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC) : -1;
  }();
  return terminal && own >= 0 ? own : STDIN_FILENO;
}

/** read(2) that waits for bytes, or for Ctrl-C where a pipe tells of it: nothing then. -1 for errors, 0 at the end. */
std::optional<ssize_t> read_input(bool terminal, char* to, std::size_t count) {
  const int fd = input_fd(terminal);
  while (true) {
    pollfd wanted[2] = {{fd, POLLIN, 0}, {terminal ? Interrupts::wake_fd() : -1, POLLIN, 0}};
    while (::poll(wanted, 2, -1) < 0) {
      if (errno != EINTR && errno != EAGAIN) return -1;
    }
    if (wanted[1].revents != 0) return std::nullopt;
    const ssize_t got = ::read(fd, to, count);
    if (got >= 0 || (errno != EINTR && errno != EAGAIN)) return got;
  }
}

}  // namespace

void Interrupts::install() {
  if (wake_pipe[0] >= 0) return;
  if (::pipe(wake_pipe) != 0) throw Error(Code::io, "pipe", std::strerror(errno));
  for (const int fd : wake_pipe) {
    ::fcntl(fd, F_SETFL, O_NONBLOCK);
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  }
  struct sigaction action{};
  action.sa_handler = on_interrupt;
  action.sa_flags = SA_RESTART;
  ::sigaction(SIGINT, &action, nullptr);
}

void Interrupts::clear() {
  interrupted = false;
  presses = 0;
  char bytes[64];
  while (::read(wake_pipe[0], bytes, sizeof bytes) > 0) {
  }
}

const std::atomic<bool>& Interrupts::flag() {
  return interrupted;
}

int Interrupts::wake_fd() {
  return wake_pipe[0];
}

std::filesystem::path chat_history_file() {
  const char* state = std::getenv("XDG_STATE_HOME");
  const char* home = std::getenv("HOME");
  std::filesystem::path folder;
  if (state && *state == '/') {  // the specification wants relative ones to be ignored
    folder = state;
  } else if (home && *home) {
    folder = std::filesystem::path(home) / ".local" / "state";
  } else {
    return {};
  }
  return folder / "mlx-lm" / "chat_history";
}

#ifdef MLXLM_LIBEDIT

namespace {

constexpr std::size_t kHistoryEntries = 1000;
constexpr std::size_t kMaxHistoryEntryBytes = 16384;  // longer ones are not worth recalling
constexpr wchar_t kPasteEnd[] = L"\033[201~";

std::wstring to_wide(std::string_view text) {
  std::wstring wide;
  for (std::size_t at = 0; at < text.size();) wide += static_cast<wchar_t>(next_code_point(text, at));
  return wide;
}

std::string to_utf8(const wchar_t* wide, std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) append_utf8(text, static_cast<char32_t>(wide[i]));
  return text;
}

/** The history file holds an entry a line. */
std::string escape_entry(const std::string& entry) {
  std::string line;
  for (const char c : entry) {
    if (c == '\\' || c == '\n') {
      line += c == '\n' ? "\\n" : "\\\\";
    } else {
      line += c;
    }
  }
  return line;
}

std::string unescape_entry(const std::string& line) {
  std::string entry;
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '\\' && i + 1 < line.size()) {
      entry += line[++i] == 'n' ? '\n' : line[i];
    } else {
      entry += line[i];
    }
  }
  return entry;
}

/** Appends; other conversations may do so at the same time. */
void append_private(const std::filesystem::path& path, const std::string& text, int flags = O_APPEND) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0600);
  if (fd < 0) return;
  ::fchmod(fd, 0600);
  [[maybe_unused]] const auto written = ::write(fd, text.data(), text.size());
  ::close(fd);
}

}  // namespace

struct LineEditor::Editing {
  EditLine* editor = nullptr;
  HistoryW* history = nullptr;
  std::filesystem::path history_file;
  std::wstring prompt;
  std::string last_entry;
  bool interrupted = false;

  explicit Editing(std::filesystem::path file);
  ~Editing() {
    if (editor) el_end(editor);
    if (history) history_wend(history);
  }
  Editing(const Editing&) = delete;
  Editing& operator=(const Editing&) = delete;

  void bind_keys();
  void load_history();
  void enter(const std::string& entry) {
    HistEventW event;
    history_w(history, &event, H_ENTER, to_wide(entry).c_str());
    last_entry = entry;
  }

  static Editing& of(EditLine* editor) {
    void* self = nullptr;
    el_wget(editor, EL_CLIENTDATA, &self);
    return *static_cast<Editing*>(self);
  }
  static wchar_t* prompt_of(EditLine* editor) { return of(editor).prompt.data(); }
  static int read_char(EditLine* editor, wchar_t* c);
  static unsigned char paste(EditLine* editor, wint_t);
  static unsigned char new_line(EditLine* editor, wint_t) { return el_winsertstr(editor, L"\n") == 0 ? CC_REFRESH : CC_ERROR; }
};

LineEditor::Editing::Editing(std::filesystem::path file) : history_file(std::move(file)) {
  // libedit measures and prints characters by the locale; a terminal without one is taken to speak UTF-8.
  for (const char* name : {"", "C.UTF-8", "en_US.UTF-8"}) {
    if (std::setlocale(LC_CTYPE, name) && MB_CUR_MAX > 1) break;
  }
  editor = el_init("mlx-lm", stdin, stdout, stderr);
  history = history_winit();
  if (!editor || !history) throw Error(Code::io, "terminal", "could not be set up for editing lines");
  HistEventW event;
  history_w(history, &event, H_SETSIZE, static_cast<int>(kHistoryEntries));
  el_wset(editor, EL_CLIENTDATA, this);
  el_wset(editor, EL_PROMPT, prompt_of);
  el_wset(editor, EL_HIST, history_w, history);
  el_wset(editor, EL_GETCFN, read_char);
  bind_keys();
  el_source(editor, nullptr);  // the user's own ~/.editrc
  load_history();
}

void LineEditor::Editing::bind_keys() {
  el_wset(editor, EL_EDITOR, L"emacs");
  el_wset(editor, EL_ADDFN, L"mlx-paste", L"Insert what is pasted", paste);
  el_wset(editor, EL_ADDFN, L"mlx-new-line", L"Insert a new line", new_line);
  constexpr const wchar_t* kKeys[][2] = {
      {L"\\e[200~", L"mlx-paste"},     {L"\\e^J", L"mlx-new-line"},    {L"\\e^M", L"mlx-new-line"},    {L"^R", L"em-inc-search-prev"},
      {L"^W", L"ed-delete-prev-word"}, {L"\\e[1;5D", L"ed-prev-word"}, {L"\\e[1;5C", L"em-next-word"}, {L"\\e[3~", L"ed-delete-next-char"},
      {L"\\e[H", L"ed-move-to-beg"},   {L"\\e[F", L"ed-move-to-end"},  {L"\\e[1~", L"ed-move-to-beg"}, {L"\\e[4~", L"ed-move-to-end"},
  };
  for (const auto& [key, function] : kKeys) el_wset(editor, EL_BIND, key, function, nullptr);
}

void LineEditor::Editing::load_history() {
  if (history_file.empty()) return;
  std::error_code ignored;
  std::filesystem::create_directories(history_file.parent_path(), ignored);
  if (!std::filesystem::is_regular_file(history_file, ignored)) return;
  std::ifstream file(history_file);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line.size() <= 2 * kMaxHistoryEntryBytes) lines.push_back(line);
  }
  const bool too_long = lines.size() > 2 * kHistoryEntries;
  if (lines.size() > kHistoryEntries) lines.erase(lines.begin(), lines.end() - static_cast<std::ptrdiff_t>(kHistoryEntries));
  std::string kept;
  for (const auto& line : lines) {
    enter(to_valid_utf8(unescape_entry(line)));
    kept += line + '\n';
  }
  if (too_long) append_private(history_file, kept, O_TRUNC);
}

/** 1 for a character, 0 at the end, -1 for Ctrl-C and errors. */
int LineEditor::Editing::read_char(EditLine* editor, wchar_t* c) {
  auto& self = of(editor);
  std::string bytes;
  do {
    char byte = 0;
    const auto got = read_input(true, &byte, 1);
    if (!got) {
      self.interrupted = true;
      errno = EINTR;
      return -1;
    }
    if (*got <= 0) return static_cast<int>(*got);
    bytes += byte;
  } while (complete_utf8_prefix(bytes) == 0);
  std::size_t at = 0;
  *c = static_cast<wchar_t>(next_code_point(bytes, at));
  return 1;
}

/** Reads up to the end of the paste, so that its line ends do not end the line. */
unsigned char LineEditor::Editing::paste(EditLine* editor, wint_t) {
  std::wstring text;
  wchar_t c = 0;
  while (!text.ends_with(kPasteEnd)) {
    if (el_wgetc(editor, &c) != 1) return CC_EOF;
    if (text.size() > kMaxLineBytes) continue;
    const bool after_return = !text.empty() && text.back() == L'\r';
    if (c == L'\n' && after_return) text.pop_back();
    if (c != 0) text += c;
  }
  text.resize(text.size() - std::size(kPasteEnd) + 1);
  std::replace(text.begin(), text.end(), L'\r', L'\n');
  if (!text.empty() && el_winsertstr(editor, text.c_str()) != 0) return CC_ERROR;
  return CC_REFRESH;
}

namespace {

/** While it lives, the terminal marks where a paste begins and ends. */
struct PasteMarks {
  PasteMarks() { write("\033[?2004h"); }
  ~PasteMarks() { write("\033[?2004l"); }
  PasteMarks(const PasteMarks&) = delete;
  PasteMarks& operator=(const PasteMarks&) = delete;
  static void write(const char* text) {
    std::fputs(text, stdout);
    std::fflush(stdout);
  }
};

}  // namespace

LineEditor::Got LineEditor::read(const char* prompt, std::string& line) {
  if (!editing_) return read_plain(prompt, line);
  auto& e = *editing_;
  e.prompt = to_wide(prompt);
  e.interrupted = false;
  el_resize(e.editor);
  int count = 0;
  const wchar_t* text = nullptr;
  {
    el_wset(e.editor, EL_PREP_TERM, 1);  // before the prompt is seen: el_wgets() itself does so after it
    const PasteMarks marks;
    text = el_wgets(e.editor, &count);
  }
  if (!text || count <= 0) {
    PasteMarks::write("\n");
    return e.interrupted ? Got::interrupted : Got::end;
  }
  line = to_utf8(text, static_cast<std::size_t>(count));
  if (line.ends_with('\n')) line.pop_back();
  return Got::line;
}

void LineEditor::remember(const std::string& entry) {
  if (!editing_ || entry.empty() || entry == editing_->last_entry || entry.size() > kMaxHistoryEntryBytes) return;
  editing_->enter(entry);
  if (!editing_->history_file.empty()) append_private(editing_->history_file, escape_entry(entry) + '\n');
}

#else  // without libedit

struct LineEditor::Editing {
  explicit Editing(const std::filesystem::path&) {}
};

LineEditor::Got LineEditor::read(const char* prompt, std::string& line) {
  return read_plain(prompt, line);
}

void LineEditor::remember(const std::string&) {}

#endif

LineEditor::LineEditor(bool terminal, std::filesystem::path history_file) : terminal_(terminal) {
#ifdef MLXLM_LIBEDIT
  const char* kind = std::getenv("TERM");
  if (terminal && kind && *kind && std::strcmp(kind, "dumb") != 0) editing_ = std::make_unique<Editing>(std::move(history_file));
#else
  (void)history_file;
#endif
}

LineEditor::~LineEditor() = default;

LineEditor::Got LineEditor::read_plain(const char* prompt, std::string& line) {
  if (terminal_) {
    std::fputs(prompt, stdout);
    std::fflush(stdout);
  }
  bool too_long = false, ended = false;
  while (true) {
    const auto end = buffer_.find('\n', scanned_);
    if (end != std::string::npos || ended) {
      if (ended && buffer_.empty() && !too_long) {
        if (terminal_) std::fputs("\n", stdout);
        return Got::end;
      }
      line = to_valid_utf8(std::string_view(buffer_).substr(0, end));
      buffer_.erase(0, end == std::string::npos ? end : end + 1);
      scanned_ = 0;
      if (too_long) throw Error(Code::bad_request, "line", fmt::format("got more than {} bytes, wanted a shorter one", kMaxLineBytes));
      if (line.ends_with('\r')) line.pop_back();
      return Got::line;
    }
    if (buffer_.size() > kMaxLineBytes) {
      too_long = true;
      buffer_.clear();
    }
    scanned_ = buffer_.size();
    char bytes[16384];
    const auto got = read_input(terminal_, bytes, sizeof bytes);
    if (!got) {
      std::fputs("\n", stdout);
      buffer_.clear();
      scanned_ = 0;
      return Got::interrupted;
    }
    if (*got < 0) throw Error(Code::io, "stdin", std::strerror(errno));
    ended = *got == 0;
    buffer_.append(bytes, static_cast<std::size_t>(*got));
  }
}

}  // namespace mlxlm::cli
