// Files: mapping, reading whole, writing beside and renaming.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace mlxlm {

/** A file mapped read-only (private). Lives as long as a shared_ptr holds it. */
class MappedFile {
 public:
  /** Throws Error(not_found) or Error(io). An empty file maps to an empty span. */
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_bytes_}; }
  const std::filesystem::path& path() const { return path_; }

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_bytes_ = 0;
};

/** Throws Error(not_found) or Error(io). */
std::string read_text_file(const std::filesystem::path& path);

/** A file that is written piece by piece beside `path` (".tmp" and the process are added to its name) and takes its place at once: a crash
 * leaves the old file or the new one. Every function throws Error(io). */
class NewFile {
 public:
  explicit NewFile(std::filesystem::path path);
  /** Unless it was put into its place, nothing is left of it. */
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  void write(std::string_view piece);
  /** Waits until the disk has what was written. */
  void flush();
  /** Waits for the disk. The last call. */
  void put_into_place();

 private:
  std::filesystem::path path_, beside_;
  int fd_;
};

/** Writes beside `path` and renames, so that a crash leaves the old file or the new one. Throws Error(io). */
void write_file_atomically(const std::filesystem::path& path, std::string_view content);

}  // namespace mlxlm
