// Mapping, reading and atomic writing over POSIX.
#include "base/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace mlxlm {
namespace {

Error io_error(const std::filesystem::path& path, int error, const char* verb) {
  if (error == ENOENT) return Error(Code::not_found, path.string(), "no such file");
  return Error(Code::io, path.string(), std::string("cannot ") + verb + ": " + std::strerror(error));
}

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags, mode_t mode = 0) : fd_(::open(path.c_str(), flags | O_CLOEXEC, mode)) {
    if (fd_ < 0) throw io_error(path, errno, "open");
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
  Descriptor descriptor(path, O_RDONLY);
  struct stat info{};
  if (::fstat(descriptor.get(), &info) != 0) throw io_error(path, errno, "read");
  if (!S_ISREG(info.st_mode)) throw Error(Code::io, path.string(), "not a regular file");
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->path_ = path;
  file->size_bytes_ = static_cast<std::size_t>(info.st_size);
  if (file->size_bytes_ == 0) return file;
  void* data = ::mmap(nullptr, file->size_bytes_, PROT_READ, MAP_PRIVATE, descriptor.get(), 0);
  if (data == MAP_FAILED) {
    file->size_bytes_ = 0;
    throw io_error(path, errno, "map");
  }
  file->data_ = static_cast<const std::byte*>(data);
  return file;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_bytes_);
}

std::string read_text_file(const std::filesystem::path& path) {
  const auto file = MappedFile::open(path);
  const auto bytes = file->bytes();
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

NewFile::NewFile(std::filesystem::path path)
    : path_(std::move(path)),
      beside_(path_.string() + ".tmp" + std::to_string(::getpid())),
      fd_(::open(beside_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)) {
  if (fd_ < 0) throw Error(Code::io, path_.string(), std::string("cannot create: ") + std::strerror(errno));
}

NewFile::~NewFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(beside_.c_str());
}

void NewFile::write(std::string_view piece) {
  while (!piece.empty()) {
    const ssize_t written = ::write(fd_, piece.data(), piece.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      throw io_error(path_, errno, "write");
    }
    piece.remove_prefix(static_cast<std::size_t>(written));
  }
}

void NewFile::flush() {
  if (::fsync(fd_) != 0) throw io_error(path_, errno, "write");
}

void NewFile::put_into_place() {
  flush();
  if (::rename(beside_.c_str(), path_.c_str()) != 0) throw io_error(path_, errno, "rename into place");
  ::close(std::exchange(fd_, -1));
}

void write_file_atomically(const std::filesystem::path& path, std::string_view content) {
  NewFile file(path);
  file.write(content);
  file.put_into_place();
}

}  // namespace mlxlm
