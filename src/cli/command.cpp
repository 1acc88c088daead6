// Finding a model, the status line, Ctrl-C.
#include "cli/command.h"

#include <chrono>
#include <csignal>
#include <cstdio>

#include <fmt/format.h>
#include <unistd.h>

#include "api/session.h"

namespace mlxlm::cli {

namespace {

std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free);

}  // namespace

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

}  // namespace mlxlm::cli
