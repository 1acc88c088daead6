// mlx-lm chat: a conversation with a model, on a terminal or line by line from a pipe. Reference: mlx_lm/chat.py, mlx_lm/cli_ui.py
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>

#include <fmt/format.h>
#include <unistd.h>

#include "api/session.h"
#include "base/error.h"
#include "base/files.h"
#include "base/text_util.h"
#include "base/utf8.h"
#include "cli/command.h"
#include "cli/conversation.h"
#include "cli/flags.h"
#include "cli/line_editor.h"

namespace mlxlm::cli {

namespace {

constexpr std::uintmax_t kMaxConversationBytes = std::uintmax_t{64} << 20;
constexpr const char* kFence = "\"\"\"";
constexpr const char* kHelp =
    "  q  /quit        end (also Ctrl-D)\n"
    "  r  /reset       forget the conversation, but not the system prompt\n"
    "  h  /help        this list\n"
    "  /system TEXT    set the system prompt; without TEXT, remove it\n"
    "  /save FILE      write the conversation as JSON messages\n"
    "  /load FILE      go on with a saved conversation\n"
    "A line that ends in \\ goes on in the next one; so does everything between two lines of \"\"\".\n"
    "Ctrl-C stops an answer or clears the line.\n";

/** The options as the command line spells them; defaults are the reference's. */
struct Arguments {
  std::string model, adapter_path, chat_template_config, cpu_precision = "default";
  std::vector<std::string> extra_eos;
  std::optional<std::string> system_prompt;
  bool trust_remote_code = false, pipeline = false, statistics = false;
  int max_tokens = 256, prefill_step_size = 2048, threads = 0;
  int64_t seed = 0;
  sample::SamplerOptions sampler;
  CacheFlags cache;
  DraftFlags drafts;
};

/** What can be known before a model is loaded. */
gen::Options to_options(const Arguments& a) {
  check_at_least("seed", a.seed, 0);
  check_at_least("prefill_step_size", a.prefill_step_size, 1);
  check_max_tokens(a.max_tokens);
  gen::Options options;
  options.max_tokens = a.max_tokens;
  options.sampler = a.sampler;
  options.sampler.seed = static_cast<uint64_t>(a.seed);
  sample::check(options.sampler);
  options.max_kv_size_tokens = a.cache.max_kv_size_tokens();
  options.kv_quantization = a.cache.quantization();
  options.prefill_step_tokens = a.prefill_step_size;
  options.draft_tokens = a.drafts.num_tokens;
  options.ngram_draft_tokens = a.drafts.ngram_tokens;
  return options;
}

std::string trimmed(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

/** What a model says must not steer the terminal: control characters other than line ends and tabs are shown as U+FFFD. */
std::string harmless(const std::string& text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const char32_t c = next_code_point(text, at);
    const bool control = (c < 0x20 && c != '\n' && c != '\t') || (c >= 0x7f && c < 0xa0);
    append_utf8(out, control ? U'\uFFFD' : c);
  }
  return out;
}

std::filesystem::path user_path(const std::string& text) {
  const char* home = std::getenv("HOME");
  return home && text.starts_with("~/") ? std::filesystem::path(home) / text.substr(2) : std::filesystem::path(text);
}

/** Reads, obeys and answers until the end. */
class Repl {
 public:
  Repl(Conversation& conversation, bool terminal, bool statistics)
      : conversation_(conversation),
        terminal_(terminal),
        statistics_(statistics || terminal || ::isatty(STDERR_FILENO) == 1),
        editor_(terminal, terminal ? chat_history_file() : std::filesystem::path{}) {
    const char* kind = std::getenv("TERM");
    colors_ = terminal && !std::getenv("NO_COLOR") && kind && *kind && std::strcmp(kind, "dumb") != 0;
  }

  int run();

 private:
  struct Input {
    std::string text;
    bool one_line = true;  // may be a command
  };
  LineEditor::Got read_input(Input& input);
  LineEditor::Got read_block(Input& input);
  bool obey(const Input& input);
  void save(const std::string& file);
  void load(const std::string& file);
  void answer(const std::string& message);
  void write(const std::string& text);
  void note(const std::string& text);
  void report(const std::string& message);
  void print_statistics(const Conversation::Turn& turn);

  Conversation& conversation_;
  const bool terminal_, statistics_;
  bool colors_ = false, quit_ = false;
  int status_ = 0;
  LineEditor editor_;
};

void Repl::write(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (std::fflush(stdout) != 0) throw Error(Code::io, "stdout", "could not be written");
}

/** Something about the conversation, not of it. */
void Repl::note(const std::string& text) {
  if (!terminal_) {
    fmt::print(stderr, "{}\n", text);
  } else {
    write(colors_ ? fmt::format("\033[2m{}\033[0m\n", text) : text + "\n");
  }
}

void Repl::report(const std::string& message) {
  std::string line = message;
  for (auto& c : line) c = c == '\n' ? ' ' : c;
  std::fflush(stdout);
  fmt::print(stderr, "mlx-lm: error: {}\n", line);
  if (!terminal_) status_ = 1;
}

/** Lines up to the closing fence, or to the end of the input. */
LineEditor::Got Repl::read_block(Input& input) {
  input = {"", false};
  std::string line;
  for (bool first = true;; first = false) {
    const auto got = editor_.read("... ", line);
    if (got == LineEditor::Got::interrupted) return got;
    if (got == LineEditor::Got::end || trimmed(line) == kFence) return LineEditor::Got::line;
    if (!first) input.text += '\n';
    input.text += line;
  }
}

LineEditor::Got Repl::read_input(Input& input) {
  input = {};
  auto got = editor_.read(">> ", input.text);
  if (got != LineEditor::Got::line) return got;
  if (trimmed(input.text) == kFence) {
    got = read_block(input);
  } else {
    std::string more;
    while (input.text.ends_with('\\')) {
      input.text.back() = '\n';
      got = editor_.read("... ", more);
      if (got == LineEditor::Got::interrupted) return got;
      if (got == LineEditor::Got::end) break;
      input.text += more;
    }
    input.one_line = input.text.find('\n') == std::string::npos;
    got = LineEditor::Got::line;
  }
  return got;
}

void Repl::save(const std::string& file) {
  if (file.empty()) throw Error(Code::bad_request, "/save", "wanted the name of a file");
  const auto path = user_path(file);
  write_file_atomically(path, to_text(conversation_.to_json(), 2) + "\n");
  note(fmt::format("Saved {} messages in {}", conversation_.to_json().size(), path.string()));
}

void Repl::load(const std::string& file) {
  if (file.empty()) throw Error(Code::bad_request, "/load", "wanted the name of a file");
  const auto path = user_path(file);
  std::error_code none;
  if (!std::filesystem::exists(path, none)) throw Error(Code::not_found, path.string(), "no such file");
  if (!std::filesystem::is_regular_file(path, none))
    throw Error(Code::bad_request, path.string(), "is no file, wanted a saved conversation");
  if (std::filesystem::file_size(path, none) > kMaxConversationBytes) {
    throw Error(Code::bad_request, path.string(),
                fmt::format("is larger than {} bytes, wanted a saved conversation", kMaxConversationBytes));
  }
  const auto value = read_json_file(path);
  try {
    conversation_.from_json(value);
  } catch (const Error& e) {
    throw Error(e.code(), path.string(), e.what());
  }
  note(fmt::format("Loaded {} messages from {}", conversation_.to_json().size(), path.string()));
}

/** Whether the input was a command; if so, it was carried out. */
bool Repl::obey(const Input& input) {
  if (!input.one_line) return false;
  auto text = input.text;
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.pop_back();
  if (text == "q" || text == "r" || text == "h") text = text == "q" ? "/quit" : text == "r" ? "/reset" : "/help";
  if (!text.starts_with('/')) return false;
  const auto space = text.find_first_of(" \t");
  const auto name = text.substr(0, space), rest = space == std::string::npos ? "" : trimmed(text.substr(space));
  if (name.find_first_not_of("abcdefghijklmnopqrstuvwxyz", 1) != std::string::npos || name == "/") return false;  // "/usr/bin" is a message
  if (name == "/quit" || name == "/exit") {
    quit_ = true;
  } else if (name == "/reset") {
    conversation_.reset();
    note("The conversation is forgotten.");
  } else if (name == "/help") {
    write(kHelp);
  } else if (name == "/system") {
    conversation_.set_system(rest.empty() ? std::nullopt : std::optional(rest));
    note(rest.empty() ? "The system prompt is removed." : "The system prompt is set.");
  } else if (name == "/save") {
    save(rest);
  } else if (name == "/load") {
    load(rest);
  } else {
    const auto nearest = nearest_names(name, {"/quit", "/reset", "/help", "/system", "/save", "/load"}, 1);
    throw Error(Code::bad_request,
                fmt::format("unknown command '{}'; wanted {}", name, nearest.empty() ? "one that /help lists" : nearest[0]));
  }
  return true;
}

void Repl::print_statistics(const Conversation::Turn& turn) {
  const auto& r = turn.last;
  if (r.generation_tokens == 0) return note("[stopped before the answer; the message is taken back]");
  const char* how = r.finish == gen::Finish::cancelled ? ", stopped" : r.finish == gen::Finish::length ? ", cut by --max-tokens" : "";
  const auto kept = turn.reused_tokens > 0 ? fmt::format(" (and {} kept)", turn.reused_tokens) : "";
  const auto drafts = r.drafted_tokens > 0 ? fmt::format("; {} of {} guesses right", r.accepted_tokens, r.drafted_tokens) : "";
  note(fmt::format("[prompt {} tokens{}, {:.1f}/s; answer {} tokens, {:.1f}/s{}{}; peak memory {:.3f} GB]", r.prompt_tokens, kept,
                   r.prompt_tokens_per_s, r.generation_tokens, r.generation_tokens_per_s, how, drafts, r.peak_memory_gb));
}

void Repl::answer(const std::string& message) {
  bool any = false;
  const auto on_text = [&](const std::string& text) {
    any = true;
    write(terminal_ ? harmless(text) : text);
  };
  std::optional<InterruptGuard> guard;  // in a pipe, Ctrl-C ends all
  if (!terminal_) guard.emplace();
  Conversation::Turn turn;
  try {
    turn = conversation_.answer(message, on_text);
  } catch (...) {
    if (any) write("\n");
    throw;
  }
  write("\n");
  if (statistics_) print_statistics(turn);
  if (!terminal_ && turn.last.finish == gen::Finish::cancelled) {
    status_ = exit_status(Code::cancelled);
    quit_ = true;
  }
}

int Repl::run() {
  while (!quit_) {
    try {
      if (terminal_) Interrupts::clear();
      Input input;
      const auto got = read_input(input);
      if (got == LineEditor::Got::end) break;
      if (got == LineEditor::Got::interrupted || trimmed(input.text).empty()) continue;
      editor_.remember(input.text);
      if (!obey(input)) answer(input.text);
    } catch (const Error& e) {
      if (std::ferror(stdout) || std::string_view(e.what()).starts_with("stdin:")) throw;
      report(e.what());
    } catch (const std::bad_alloc&) {
      report("out of memory");
    } catch (const std::exception& e) {  // MLX's, which has no type for a lack of memory
      report(e.what());
    }
  }
  return status_;
}

int run(const Arguments& a) {
  auto options = to_options(a);
  auto variables = template_variables(a.chat_template_config);
  use_threads(a.threads);
  set_cpu_precision(a.cpu_precision);
  const bool terminal = ::isatty(STDIN_FILENO) == 1 && ::isatty(STDOUT_FILENO) == 1;

  const auto path = find_model(a.model);
  StatusLine line;
  line.show(fmt::format("Loading {}", path.string()));
  auto session = open_session(path, {.executor = model::Executor::best, .adapter = a.adapter_path, .quantize_activations = false});
  const auto draft = open_draft_model(a.drafts, session.tokenizer);
  if (draft) options.draft_model = draft->loaded.model.get();
  line.clear();
  for (const auto& token : a.extra_eos) session.tokenizer.add_eos_token(token);
  if (a.sampler.xtc_probability > 0.f) options.sampler.xtc_special_tokens = xtc_special_tokens(session.tokenizer);
  sample::check(options.sampler, session.loaded.model->description().vocab);
  options.on_prefill = show_prompt_on(line);
  options.cancel = terminal ? &Interrupts::flag() : &InterruptGuard::flag();
  if (terminal) Interrupts::install();

  Conversation conversation(session, std::move(options), std::move(variables));
  conversation.set_system(a.system_prompt);
  if (terminal) fmt::print("Talking with {}. h lists the commands, q ends.\n", path.filename().string());
  return Repl(conversation, terminal, a.statistics).run();
}

void add_options(CLI::App& c, Arguments& a) {
  add_sampling(c, a.sampler);
  c.add_option("--seed", a.seed, "Seed of the sampler")->capture_default_str();
  c.add_option("-m,--max-tokens", a.max_tokens, "Most tokens of an answer; -1 = no limit")->capture_default_str();
  add_max_kv_size(c, a.cache);
  c.add_option("--prefill-step-size", a.prefill_step_size, "Prompt tokens processed at a time")->capture_default_str();
  c.add_option("--system-prompt", a.system_prompt, "System message of the conversation");
  c.add_option("--chat-template-config", a.chat_template_config, "JSON object of further variables for the chat template");
  c.add_option("--extra-eos-token", a.extra_eos, "Tokens, or their ids, that also end an answer");
  c.add_flag("--stats", a.statistics, "Tokens and speed after each answer on stderr, also where that is no terminal");
  c.add_flag("--pipeline", a.pipeline, "Accepted for compatibility, without effect in one process");
  add_cpu_precision(c, a.cpu_precision);
  add_threads(c, a.threads);
  c.add_option("--adapter-path", a.adapter_path, "Folder of a trained adapter (LoRA, DoRA or full)");
  add_kv_bits(c, a.cache);
  add_quantized_kv_start(c, a.cache);
  add_drafts(c, a.drafts);
}

}  // namespace

void add_chat(CLI::App& app, Action& action) {
  auto a = std::make_shared<Arguments>();
  auto& c = *app.add_subcommand("chat", "Talk with a model");
  add_model(c, a->model, a->trust_remote_code);
  add_options(c, *a);
  c.footer("Commands while talking:\n" + std::string(kHelp) +
           "\nExample:\n  mlx-lm chat --model org/name --system-prompt \"Answer briefly.\" --temp 0.7");
  c.callback([a, &action] { action = [a] { return run(*a); }; });
}

}  // namespace mlxlm::cli
