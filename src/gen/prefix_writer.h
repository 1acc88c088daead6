// Writes prefix files on a thread of its own, within a byte budget: no step waits for a disk.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace mlxlm::gen {

/** A file that counts against a folder's budget: a prefix, or what is being written or was left. */
struct PrefixFile {
  std::filesystem::path path;
  int64_t bytes = 0;
  std::filesystem::file_time_type used{};
  bool whole = false;  // else of a writer
  int writer = 0;      // its process
};

std::vector<PrefixFile> prefix_files(const std::filesystem::path& folder);

/** Held by one writer at a time, whatever its process; nobody waits for long. */
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  bool held() const { return held_; }

 private:
  int fd_;
  bool held_ = false;
};

/** Under the lock. The least recently used prefixes give way, and are named in `removed`, until `bytes` more fit into the budget; false
 * when they never do. */
bool make_room_in_folder(const std::filesystem::path& folder, int64_t budget_bytes, int64_t bytes, std::vector<std::string>& removed);

/** Every function may be called on one thread; the files are written on another. No MLX there. */
class PrefixWriter {
 public:
  PrefixWriter(std::filesystem::path folder, int64_t budget_bytes);
  /** Writes what waits. */
  ~PrefixWriter();
  PrefixWriter(const PrefixWriter&) = delete;
  PrefixWriter& operator=(const PrefixWriter&) = delete;

  struct Job {
    std::string name, content;
  };
  struct Done {
    std::string name;
    int64_t bytes = 0;  // 0 = it was not written
    std::vector<std::string> removed{};
    std::string problem{};  // empty = none, or the folder was busy
  };
  /** Waits only while so much waits already that memory might become short. */
  void add(Job job);
  /** What happened since the last call. */
  std::vector<Done> take_done();
  /** Waits until all is written. */
  void finish();

 private:
  void run();
  Done write(const Job& job) const;

  const std::filesystem::path folder_;
  const int64_t budget_bytes_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;  // the first one is being written
  std::vector<Done> done_;
  int64_t waiting_bytes_ = 0;  // of jobs_
  bool ends_ = false;
  std::thread thread_;  // the last member: it uses the others
};

}  // namespace mlxlm::gen
