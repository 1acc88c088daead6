// Downloads a repository into the cache, file by file, each resumed where it stopped. Layout: huggingface_hub
#include "hub/download.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/text_util.h"
#include "hub/http.h"
#include "hub/layout.h"

namespace mlxlm::hub {

namespace fs = std::filesystem;

namespace {

// Reference: mlx_lm/utils.py DEFAULT_ALLOW_PATTERNS, without *.py: nothing here runs Python.
constexpr std::array kPatterns{"*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl",
                               "*.jinja"};

bool is_wanted(const std::string& file) {
  return std::ranges::any_of(kPatterns, [&](const char* pattern) { return glob_match(pattern, file); });
}

[[noreturn]] void fail(const std::string& repo, const HttpAnswer& answer) {
  if (answer.error_code == "GatedRepo" || answer.status == 403) {
    throw Error(Code::not_found, repo,
                fmt::format("access refused by {} (HTTP {}): wanted HF_TOKEN with access to it", endpoint(), answer.status));
  }
  if (answer.status == 401 || answer.status == 404) {
    const std::string_view what = answer.error_code == "RevisionNotFound" ? "no such revision" : "no such folder, and not a repository";
    throw Error(Code::not_found, repo, fmt::format("{} at {} (HTTP {})", what, endpoint(), answer.status));
  }
  throw Error(Code::network, repo, fmt::format("{} answered HTTP {}", endpoint(), answer.status));
}

bool is_blob_name(std::string_view etag) {
  return !etag.empty() && etag.size() <= 128 &&
         std::ranges::all_of(etag, [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_'; });
}

/** A file that is appended to, locked against other processes that download the same blob. */
class PartFile {
 public:
  explicit PartFile(const fs::path& path) : path_(path), fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    if (fd_ < 0) fail("open");
    if (::flock(fd_, LOCK_EX) != 0) fail("lock");
    seek(size());
  }
  ~PartFile() {
    if (fd_ >= 0) ::close(fd_);
  }
  PartFile(const PartFile&) = delete;
  PartFile& operator=(const PartFile&) = delete;

  int64_t size() const {
    struct stat info{};
    if (::fstat(fd_, &info) != 0) fail("stat");
    return info.st_size;
  }
  void restart() {
    if (::ftruncate(fd_, 0) != 0) fail("truncate");
    seek(0);
  }
  void write(const char* data, std::size_t size) {
    while (size > 0) {
      const auto written = ::write(fd_, data, size);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) fail("write");
      data += written;
      size -= static_cast<std::size_t>(written);
    }
  }

 private:
  void seek(int64_t offset) {
    if (::lseek(fd_, offset, SEEK_SET) < 0) fail("seek");
  }
  [[noreturn]] void fail(const char* what) const {
    throw Error(Code::io, path_.string(), fmt::format("{}: {}", what, std::strerror(errno)));
  }
  fs::path path_;
  int fd_;
};

struct File {
  std::string name, url, etag;
  int64_t size = -1;
};

void fetch_blob(const std::string& repo, const File& file, const fs::path& blob, const ResolveOptions& options) {
  const fs::path part_path = blob.string() + ".incomplete";
  PartFile part(part_path);
  if (fs::exists(blob)) return;  // another process had the lock and finished
  if (file.size >= 0 && part.size() > file.size) part.restart();
  int64_t done = part.size();
  if (file.size < 0 || done < file.size || file.size == 0) {
    const auto report = [&] {
      if (options.on_progress) options.on_progress({file.name, done, std::max<int64_t>(0, file.size)});
    };
    report();
    bool first = true;
    const auto answer = http({.url = file.url, .token = token(), .range_start = done}, [&](int status, const char* data, std::size_t size) {
      if (first && status == 200 && done > 0) {  // the server does not resume
        part.restart();
        done = 0;
      }
      first = false;
      part.write(data, size);
      done += static_cast<int64_t>(size);
      report();
    });
    if (answer.status != 200 && answer.status != 206) {
      throw Error(Code::network, repo, fmt::format("{}: {} answered HTTP {}", file.name, endpoint(), answer.status));
    }
  }
  if (file.size >= 0 && part.size() != file.size) {
    const auto got = part.size();
    if (got > file.size) part.restart();
    throw Error(Code::network, repo, fmt::format("{}: got {} bytes, wanted {}; run again to continue", file.name, got, file.size));
  }
  fs::rename(part_path, blob);
}

File head_of(const std::string& repo, const std::string& commit, const std::string& name) {
  File file{name, fmt::format("{}/{}/resolve/{}/{}", endpoint(), repo, commit, url_path(name)), {}};
  const auto answer = http({.url = file.url, .token = token(), .head = true});
  if (answer.status < 200 || answer.status >= 400) fail(repo, answer);
  if (!is_blob_name(answer.etag)) {
    throw Error(Code::network, repo, fmt::format("{}: {} sent no usable ETag", name, endpoint()));
  }
  file.etag = answer.etag;
  file.size = answer.size;
  return file;
}

void link_into(const fs::path& snapshot, const std::string& name, const std::string& etag) {
  const fs::path link = snapshot / name;
  fs::create_directories(link.parent_path());
  fs::path target = "../..";
  for (auto depth = std::ranges::count(name, '/'); depth > 0; --depth) target /= "..";
  target = target / "blobs" / etag;
  if (fs::is_symlink(link) || fs::exists(link)) fs::remove(link);
  fs::create_symlink(target, link);
}

}  // namespace

Listing list_repository(const std::string& repo, const std::string& revision, int connect_timeout_ms, int read_timeout_ms) {
  const auto url = fmt::format("{}/api/models/{}/revision/{}", endpoint(), repo, [&] {
    std::string quoted;  // a slash in a revision is part of its name
    for (const auto& part : split(revision, '/')) quoted += (quoted.empty() ? "" : "%2F") + url_path(part);
    return quoted;
  }());
  const auto answer = http({.url = url, .token = token(), .connect_timeout_ms = connect_timeout_ms, .read_timeout_ms = read_timeout_ms});
  if (answer.status != 200) fail(repo, answer);
  json content;
  try {
    content = parse_json(answer.body, url);
  } catch (const Error& e) {
    throw Error(Code::network, e.what());
  }
  const auto sha = content.is_object() ? content.find("sha") : content.end();
  const auto siblings = content.is_object() ? content.find("siblings") : content.end();
  if (!content.is_object() || sha == content.end() || !sha->is_string() || siblings == content.end() || !siblings->is_array()) {
    throw Error(Code::network, url, "got an answer without sha and siblings, wanted a repository's listing");
  }
  Listing listing{sha->get<std::string>(), {}};
  if (!is_blob_name(listing.commit)) throw Error(Code::network, url, "got a sha that is no commit");
  for (const auto& entry : *siblings) {
    const auto name = entry.is_object() ? entry.find("rfilename") : entry.end();
    if (!entry.is_object() || name == entry.end() || !name->is_string()) continue;
    const auto file = name->get<std::string>();
    if (!is_wanted(file)) continue;
    if (!is_safe_file(file)) throw Error(Code::network, repo, "its listing has a file that lies outside of it");
    listing.files.push_back(file);
  }
  std::ranges::sort(listing.files);
  if (!std::ranges::binary_search(listing.files, "config.json")) {
    throw Error(Code::not_found, repo, fmt::format("the repository at {} has no config.json, wanted a language model", endpoint()));
  }
  return listing;
}

fs::path download(const std::string& repo, const ResolveOptions& options) {
  const auto listing = list_repository(repo, options.revision);
  const auto folder = repo_folder(repo);
  const auto snapshot = folder / "snapshots" / listing.commit;
  try {
    fs::create_directories(folder / "blobs");
    fs::create_directories(snapshot);
    for (const auto& name : listing.files) {
      if (fs::exists(snapshot / name)) continue;
      const auto file = head_of(repo, listing.commit, name);
      const auto blob = folder / "blobs" / file.etag;
      if (!fs::exists(blob)) fetch_blob(repo, file, blob, options);
      link_into(snapshot, name, file.etag);
    }
    // Last, so that a reference never names a snapshot with files missing.
    if (options.revision != listing.commit) {
      const auto ref = folder / "refs" / options.revision;
      fs::create_directories(ref.parent_path());
      write_file_atomically(ref, listing.commit);
    }
  } catch (const fs::filesystem_error& e) {
    throw Error(Code::io, repo, e.what());
  }
  return snapshot;
}

}  // namespace mlxlm::hub
