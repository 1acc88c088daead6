// A queue of files; each is written beside and renamed under the folder's lock.
#include "gen/prefix_writer.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "base/files.h"

namespace mlxlm::gen {

namespace fs = std::filesystem;

namespace {

constexpr int64_t kMostWaitingBytes = int64_t{256} << 20;

/** The process that writes it, of "prefix-....safetensors.tmp123". */
std::optional<int> writer_of(const std::string& name) {
  const auto at = name.rfind(".safetensors.tmp");
  if (!name.starts_with("prefix-") || at == std::string::npos) return std::nullopt;
  int pid = 0;
  const char *begin = name.data() + at + 16, *end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(begin, end, pid);
  return error == std::errc() && stop == end && pid > 0 ? std::optional(pid) : std::nullopt;
}

}  // namespace

std::vector<PrefixFile> prefix_files(const fs::path& folder) {
  std::vector<PrefixFile> list;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    const auto name = at->path().filename().string();
    const bool whole = name.starts_with("prefix-") && name.ends_with(".safetensors");
    const auto writer = writer_of(name);
    if (!whole && !writer) continue;
    std::error_code gone;
    PrefixFile file{.path = at->path(), .whole = whole, .writer = writer.value_or(0)};
    const auto bytes = fs::file_size(file.path, gone);
    if (!gone) file.used = fs::last_write_time(file.path, gone);
    if (gone) continue;
    file.bytes = static_cast<int64_t>(bytes);
    list.push_back(std::move(file));
  }
  return list;
}

FolderLock::FolderLock(const fs::path& folder) : fd_(::open((folder / ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
  for (int i = 0; fd_ >= 0 && !held_ && i < 40; ++i) {
    held_ = ::flock(fd_, LOCK_EX | LOCK_NB) == 0;
    if (!held_) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

FolderLock::~FolderLock() {
  if (fd_ >= 0) ::close(fd_);
}

bool make_room_in_folder(const fs::path& folder, int64_t budget_bytes, int64_t bytes, std::vector<std::string>& removed) {
  if (bytes > budget_bytes) return false;
  auto files = prefix_files(folder);
  std::ranges::sort(files, {}, &PrefixFile::used);
  int64_t total = bytes;
  for (const auto& file : files) total += file.bytes;
  for (const auto& file : files) {
    if (total <= budget_bytes) return true;
    std::error_code error;
    if (!file.whole || !fs::remove(file.path, error)) continue;
    removed.push_back(file.path.filename().string());
    total -= file.bytes;
  }
  return total <= budget_bytes;
}

PrefixWriter::PrefixWriter(fs::path folder, int64_t budget_bytes)
    : folder_(std::move(folder)), budget_bytes_(budget_bytes), thread_([this] { run(); }) {}

PrefixWriter::~PrefixWriter() {
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void PrefixWriter::add(Job job) {
  const auto bytes = static_cast<int64_t>(job.content.size());
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return jobs_.empty() || waiting_bytes_ + bytes <= kMostWaitingBytes; });
  waiting_bytes_ += bytes;
  jobs_.push_back(std::move(job));
  lock.unlock();
  changed_.notify_all();
}

std::vector<PrefixWriter::Done> PrefixWriter::take_done() {
  const std::lock_guard lock(mutex_);
  return std::exchange(done_, {});
}

void PrefixWriter::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return jobs_.empty(); });
}

void PrefixWriter::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return ends_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    const auto& job = jobs_.front();  // a deque: what is added moves nothing
    lock.unlock();
    auto done = write(job);
    lock.lock();
    done_.push_back(std::move(done));
    waiting_bytes_ -= static_cast<int64_t>(job.content.size());
    jobs_.pop_front();
    changed_.notify_all();
  }
}

PrefixWriter::Done PrefixWriter::write(const Job& job) const {
  Done done{.name = job.name};
  const auto bytes = static_cast<int64_t>(job.content.size());
  try {
    const FolderLock lock(folder_);
    if (!lock.held()) return done;
    if (!make_room_in_folder(folder_, budget_bytes_, bytes, done.removed)) {
      done.problem = fmt::format("a prefix takes {} bytes, of {} for the folder", bytes, budget_bytes_);
      return done;
    }
    write_file_atomically(folder_ / job.name, job.content);
    done.bytes = bytes;
  } catch (const std::exception& e) {
    done.problem = e.what();
  }
  return done;
}

}  // namespace mlxlm::gen
