// Writes prefix files on a thread of its own, within a byte budget: no step waits for a disk, and none for the copying of bytes. No MLX.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/files.h"

namespace mlxlm::engine {

/** A file that counts against a folder's budget: a prefix, or what is being written or was left. */
struct PrefixFile {
  std::filesystem::path path;
  int64_t bytes = 0;
  std::filesystem::file_time_type used{};
  bool whole = false;  // else of a writer
  int writer = 0;      // its process
};

std::vector<PrefixFile> prefix_files(const std::filesystem::path& folder);

/** Held by one writer at a time, whatever its process; nobody waits for more than two seconds, nor once `gives_up` says so. */
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder, const std::function<bool()>& gives_up = {});
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

/** Every function is for one thread; the files are written on another, which takes an eighth of a core at most while nobody waits. */
class PrefixWriter {
 public:
  PrefixWriter(std::filesystem::path folder, int64_t budget_bytes);
  /** Writes what waits. */
  ~PrefixWriter();
  PrefixWriter(const PrefixWriter&) = delete;
  PrefixWriter& operator=(const PrefixWriter&) = delete;

  struct Job {
    std::string name{}, start{};                     // the content: this
    std::vector<std::span<const std::byte>> rest{};  // and then these; nobody may change them while the owner lives
    std::shared_ptr<const void> owner{};             // of their memory; it ends on the thread that calls
    int64_t held_bytes = 0;                          // that live as long as the job does
  };
  struct Done {
    std::string name{};
    int64_t bytes = 0;  // 0 = it was not written
    std::vector<std::string> removed{};
    std::string problem{};  // empty = none, the folder was busy, or it was given up
  };
  void add(Job job);
  /** What happened since the last call. */
  std::vector<Done> take_done();
  /** Of jobs that are not yet in their file. */
  int64_t held_bytes();
  /** Gives jobs up, the latest first, until at most so many bytes are held. */
  void shrink_to(int64_t bytes);
  /** Waits until all is written. */
  void finish();

 private:
  struct Spent {
    std::shared_ptr<const void> owner;
    int64_t bytes;
  };
  void run();
  Done write(const Job& job);
  bool write_content(const Job& job, NewFile& file);
  bool is_abandoned();
  bool pause(double seconds);
  void spend(Job& job);
  void let_go(std::unique_lock<std::mutex>& lock);

  const std::filesystem::path folder_;
  const int64_t budget_bytes_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;  // the first one is being written
  std::vector<Done> done_;
  std::vector<Spent> spent_;  // what nobody needs any more
  int64_t held_bytes_ = 0;    // of jobs_ and spent_
  bool ends_ = false, is_waited_for_ = false;
  bool abandoned_ = false;  // the first job
  std::thread thread_;      // the last member: it uses the others
};

}  // namespace mlxlm::engine
