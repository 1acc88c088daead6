// Finding a model, the status line, Ctrl-C.
#include "cli/command.h"

#include <chrono>
#include <csignal>
#include <cstdio>

#include <fmt/format.h>
#include <unistd.h>

#include "api/session.h"
#include "base/error.h"
#include "gen/speculative.h"
#include "kernels/cpu/kernels.h"

namespace mlxlm::cli {

namespace {

std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free);

}  // namespace

void add_cpu_precision(CLI::App& command, std::string& value) {
  command
      .add_option("--cpu-precision", value,
                  "Activations in products with quantized weights: exact (float32), default (15 bits), fast (8 bits)")
      ->check(CLI::IsMember({"exact", "default", "fast"}))
      ->capture_default_str();
}

void set_cpu_precision(const std::string& value) {
  using kernels::cpu::Precision;
  kernels::cpu::set_precision(value == "exact" ? Precision::exact : value == "fast" ? Precision::fast : Precision::standard);
}

StatusLine::StatusLine() : terminal_(::isatty(STDERR_FILENO) == 1) {}

void StatusLine::show(const std::string& text) {
  if (!terminal_) return;
  fmt::print(stderr, "\r\033[K{}", text);
  std::fflush(stderr);
  shown_ = true;
}

void StatusLine::clear() {
  if (!shown_) return;
  fmt::print(stderr, "\r\033[K");
  std::fflush(stderr);
  shown_ = false;
}

InterruptGuard::InterruptGuard() {
  interrupted = false;
  struct sigaction action{};
  action.sa_handler = [](int) { interrupted.store(true, std::memory_order_relaxed); };
  action.sa_flags = SA_RESETHAND;  // the second one kills
  ::sigaction(SIGINT, &action, nullptr);
}

InterruptGuard::~InterruptGuard() {
  std::signal(SIGINT, SIG_DFL);
}

const std::atomic<bool>& InterruptGuard::flag() {
  return interrupted;
}

std::filesystem::path find_model(const std::string& path_or_repo) {
  StatusLine line;
  auto last = std::chrono::steady_clock::now() - std::chrono::seconds(1);
  hub::ResolveOptions options;
  options.on_progress = [&](const hub::Progress& p) {
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(100)) return;
    last = now;
    const double done_mb = static_cast<double>(p.done_bytes) / 1e6, total_mb = static_cast<double>(p.total_bytes) / 1e6;
    line.show(total_mb > 0 ? fmt::format("Downloading {}: {:.1f} of {:.1f} MB", p.file, done_mb, total_mb)
                           : fmt::format("Downloading {}: {:.1f} MB", p.file, done_mb));
  };
  const auto path = resolve_model(path_or_repo, options);
  line.clear();
  if (path_or_repo.empty()) fmt::print(stderr, "mlx-lm: no --model given, using {}\n", path.string());
  return path;
}

cache::Quantization kv_quantization(std::optional<int> bits, std::optional<int> group_size, int start_tokens) {
  if (bits && *bits <= 0) throw Error(Code::bad_request, "kv_bits", fmt::format("got {}, wanted 2, 3, 4, 5, 6 or 8", *bits));
  return {.bits = bits.value_or(0), .group_size = group_size.value_or(64), .start_tokens = start_tokens};
}

void add_drafts(CLI::App& c, DraftFlags& flags) {
  c.add_option("--draft-model", flags.model, "Smaller model with the same tokens that guesses ahead; the answer stays the model's own");
  c.add_option("--num-draft-tokens", flags.num_tokens, "Tokens that the draft model guesses at a time")->capture_default_str();
  c.add_option("--ngram-draft-tokens", flags.ngram_tokens,
               "Guess ahead out of the text so far, at most so many tokens at a time; for texts that repeat themselves; 0 = off")
      ->capture_default_str();
}

std::optional<Session> open_draft_model(const DraftFlags& flags, const text::Tokenizer& tokenizer) {
  if (flags.model.empty()) return std::nullopt;
  std::optional<Session> draft(open_session(find_model(flags.model)));
  gen::check_same_vocabulary(tokenizer, draft->tokenizer);
  return draft;
}

}  // namespace mlxlm::cli
