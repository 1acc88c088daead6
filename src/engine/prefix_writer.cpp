// A queue of files; each is written beside and renamed under the folder's lock.
#include "engine/prefix_writer.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <optional>
#include <utility>

#include <fmt/format.h>

namespace mlxlm::engine {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kPieceBytes = 256 << 10;   // written at a time: a fraction of a millisecond
constexpr std::size_t kFlushedBytes = 16 << 20;  // so that the system does not send a whole file to the disk at once, which takes a core
constexpr double kPausesPerWrite = 7, kLongestPause_s = 0.05;

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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

FolderLock::FolderLock(const fs::path& folder, const std::function<bool()>& gives_up)
    : fd_(::open((folder / ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
  for (int i = 0; fd_ >= 0 && !held_ && i < 200 && !(gives_up && gives_up()); ++i) {
    held_ = ::flock(fd_, LOCK_EX | LOCK_NB) == 0;
    if (!held_) std::this_thread::sleep_for(std::chrono::milliseconds(10));
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

/** Ends the owners of what is written or given up, here and not on the other thread. */
void PrefixWriter::let_go(std::unique_lock<std::mutex>& lock) {
  auto spent = std::exchange(spent_, {});
  for (const auto& s : spent) held_bytes_ -= s.bytes;
  lock.unlock();
  spent.clear();
  lock.lock();
}

/** Under the mutex. */
void PrefixWriter::spend(Job& job) {
  if (job.owner || job.held_bytes > 0) spent_.push_back({std::move(job.owner), std::exchange(job.held_bytes, 0)});
  changed_.notify_all();
}

void PrefixWriter::add(Job job) {
  std::unique_lock lock(mutex_);
  let_go(lock);
  held_bytes_ += job.held_bytes;
  jobs_.push_back(std::move(job));
  lock.unlock();
  changed_.notify_all();
}

std::vector<PrefixWriter::Done> PrefixWriter::take_done() {
  std::unique_lock lock(mutex_);
  let_go(lock);
  return std::exchange(done_, {});
}

int64_t PrefixWriter::held_bytes() {
  std::unique_lock lock(mutex_);
  let_go(lock);
  return held_bytes_;
}

void PrefixWriter::shrink_to(int64_t bytes) {
  std::unique_lock lock(mutex_);
  let_go(lock);
  while (held_bytes_ > std::max<int64_t>(bytes, 0) && !jobs_.empty()) {
    if (jobs_.size() > 1) {
      spend(jobs_.back());
      done_.push_back({.name = jobs_.back().name});
      jobs_.pop_back();
    } else {
      abandoned_ = true;
      changed_.notify_all();
      changed_.wait(lock, [&] { return jobs_.empty() || !spent_.empty(); });
    }
    let_go(lock);
  }
}

void PrefixWriter::finish() {
  std::unique_lock lock(mutex_);
  is_waited_for_ = true;
  changed_.notify_all();
  changed_.wait(lock, [&] { return jobs_.empty(); });
  is_waited_for_ = false;
  let_go(lock);
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
    spend(jobs_.front());
    done_.push_back(std::move(done));
    jobs_.pop_front();
    abandoned_ = false;
    changed_.notify_all();
  }
}

bool PrefixWriter::is_abandoned() {
  const std::lock_guard lock(mutex_);
  return abandoned_;
}

/** Leaves the cores to those who compute, unless somebody waits for the file. False = it is given up. */
bool PrefixWriter::pause(double seconds) {
  std::unique_lock lock(mutex_);
  const std::chrono::duration<double> time(std::min(seconds, kLongestPause_s));
  changed_.wait_for(lock, time, [&] { return ends_ || is_waited_for_ || abandoned_; });
  return !abandoned_;
}

/** Piece by piece; false when it was given up. */
bool PrefixWriter::write_content(const Job& job, NewFile& file) {
  std::size_t written = 0, unflushed = 0;
  double start_s = now_s();
  const auto put = [&](std::string_view piece) {
    for (; !piece.empty(); piece.remove_prefix(std::min(piece.size(), kPieceBytes))) {
      const auto part = piece.substr(0, kPieceBytes);
      file.write(part);
      written += part.size();
      unflushed += part.size();
      if (unflushed >= kFlushedBytes) {
        file.flush();
        unflushed = 0;
      }
      if (written < kPieceBytes) continue;
      if (!pause(kPausesPerWrite * (now_s() - start_s))) return false;
      written = 0;
      start_s = now_s();
    }
    return true;
  };
  if (!put(job.start)) return false;
  return std::ranges::all_of(job.rest, [&](auto piece) { return put({reinterpret_cast<const char*>(piece.data()), piece.size()}); });
}

PrefixWriter::Done PrefixWriter::write(const Job& job) {
  Done done{.name = job.name};
  auto bytes = static_cast<int64_t>(job.start.size());
  for (const auto& piece : job.rest) bytes += static_cast<int64_t>(piece.size());
  try {
    const FolderLock lock(folder_, [this] { return is_abandoned(); });
    if (!lock.held()) return done;
    if (!make_room_in_folder(folder_, budget_bytes_, bytes, done.removed)) {
      done.problem = fmt::format("a prefix takes {} bytes, of {} for the folder", bytes, budget_bytes_);
      return done;
    }
    NewFile file(folder_ / job.name);
    if (!write_content(job, file)) return done;
    {
      const std::lock_guard mine(mutex_);
      spend(jobs_.front());  // the disk may take its time
    }
    file.put_into_place();
    done.bytes = bytes;
  } catch (const std::exception& e) {
    done.problem = e.what();
  }
  return done;
}

}  // namespace mlxlm::engine
