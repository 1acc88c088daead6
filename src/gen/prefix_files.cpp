// One file a prefix, written beside and renamed; the tokens and the model stand in its metadata.
#include "gen/prefix_files.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <thread>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/prompt_file.h"

namespace mlxlm::gen {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t least_tokens = 64;  // fewer are computed again as fast
const char* const model_key = "prefix_model";
const char* const tokens_key = "prefix_tokens";
const char* const trimmable_key = "prefix_trimmable";

uint64_t hash_bytes(const void* data, std::size_t size, uint64_t hash = 14695981039346656037ull) {
  const auto* p = static_cast<const uint8_t*>(data);
  for (std::size_t i = 0; i < size; ++i) hash = (hash ^ p[i]) * 1099511628211ull;
  return hash;
}

bool is_ours(const std::string& name) {
  return name.starts_with("prefix-") && name.ends_with(".safetensors");
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

std::optional<std::vector<int>> parse_tokens(const std::string& text) {
  std::vector<int> tokens;
  for (const char *at = text.data(), *end = at + text.size(); at != end;) {
    int token = 0;
    const auto [stop, error] = std::from_chars(at, end, token);
    if (error != std::errc() || token < 0 || (stop != end && *stop != ' ')) return std::nullopt;
    tokens.push_back(token);
    at = stop == end ? end : stop + 1;
  }
  return tokens;
}

/** Held by one process at a time; nobody waits for long. */
class FolderLock {
 public:
  explicit FolderLock(const fs::path& folder) : fd_(::open((folder / ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    for (int i = 0; fd_ >= 0 && !held_ && i < 40; ++i) {
      held_ = ::flock(fd_, LOCK_EX | LOCK_NB) == 0;
      if (!held_) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  ~FolderLock() {
    if (fd_ >= 0) ::close(fd_);
  }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  bool held() const { return held_; }

 private:
  int fd_;
  bool held_ = false;
};

struct File {
  fs::path path;
  int64_t bytes = 0;
  fs::file_time_type used{};
};

/** All that counts against the budget: prefixes, and what is being written or was left. */
std::vector<File> files_of(const fs::path& folder) {
  std::vector<File> list;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    const auto name = at->path().filename().string();
    if (!is_ours(name) && !writer_of(name)) continue;
    std::error_code gone;
    File file{.path = at->path()};
    const auto bytes = fs::file_size(file.path, gone);
    if (!gone) file.used = fs::last_write_time(file.path, gone);
    if (gone) continue;
    file.bytes = static_cast<int64_t>(bytes);
    list.push_back(std::move(file));
  }
  return list;
}

/** Names what a model computes, weights included: from the bits of a few logits. */
std::string model_fingerprint(model::CausalModel& model) {
  constexpr int count = 16;
  const int vocab = model.description().vocab;
  std::vector<int> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(static_cast<int>((int64_t{i} * 7919 + 13) % vocab));
  auto caches = cache::make_caches(model.description());
  auto logits = mx::contiguous(mx::astype(model.run(mx::array(tokens.data(), {count}, mx::int32), {{count, count, &caches}}), mx::float32));
  mx::eval(logits);
  return fmt::format("{:016x}-{}", hash_bytes(logits.data<float>(), logits.nbytes()), model.description().layers.size());
}

}  // namespace

PrefixFiles::PrefixFiles(PrefixFolder options, model::CausalModel& model, ModelRunner& runner)
    : options_(std::move(options)), model_(model), runner_(runner), fingerprint_(model_fingerprint(model)) {
  std::error_code error;
  fs::create_directories(options_.folder, error);
  if (!fs::is_directory(options_.folder, error)) throw Error(Code::io, options_.folder.string(), "cannot be made a folder for prefixes");
  if (options_.bytes < 0) throw Error(Code::bad_request, "prefix cache", fmt::format("got {} bytes, wanted 0 or more", options_.bytes));
  remove_leftovers();
  if (const FolderLock lock(options_.folder); lock.held()) make_room(0);
  read_folder();
}

void PrefixFiles::warn(const std::string& text) const {
  if (!warned_ && options_.warn) options_.warn(text);
  warned_ = true;  // one is enough: nothing is lost but time
}

void PrefixFiles::remove_leftovers() const {
  for (const auto& file : files_of(options_.folder)) {
    const auto writer = writer_of(file.path.filename().string());
    const bool old = fs::file_time_type::clock::now() - file.used > std::chrono::hours(1);
    std::error_code ignored;
    if (writer && (old || *writer == ::getpid() || (::kill(*writer, 0) != 0 && errno == ESRCH))) fs::remove(file.path, ignored);
  }
}

void PrefixFiles::read_folder() {
  for (const auto& file : files_of(options_.folder)) {
    const auto name = file.path.filename().string();
    if (is_ours(name)) read_file(name);
  }
}

/** False when it is not there, broken or of another model. */
bool PrefixFiles::read_file(const std::string& name) {
  const auto path = options_.folder / name;
  try {
    const auto metadata = cache::read_prompt_metadata(path);
    const auto of = metadata.find(model_key), tokens = metadata.find(tokens_key), trimmable = metadata.find(trimmable_key);
    if (of == metadata.end() || tokens == metadata.end()) throw Error(Code::bad_weights, path.string(), "is no stored prefix");
    if (of->second != fingerprint_) return false;
    auto parsed = parse_tokens(tokens->second);
    if (!parsed || parsed->empty()) throw Error(Code::bad_weights, path.string(), "its tokens cannot be read");
    std::error_code error;
    const auto bytes = fs::file_size(path, error);
    if (error) return false;
    held_.insert_or_assign(name,
                           Held{std::move(*parsed), trimmable != metadata.end() && trimmable->second == "1", static_cast<int64_t>(bytes)});
    return true;
  } catch (const Error& e) {
    if (e.code() != Code::not_found) warn(fmt::format("{}; ignored", e.what()));
  } catch (const std::exception& e) {
    warn(fmt::format("{}: {}; ignored", path.string(), e.what()));
  }
  return false;
}

std::pair<PrefixFiles::Files::const_iterator, int> PrefixFiles::best(std::span<const int> prompt) const {
  std::pair found(held_.end(), 0);
  if (prompt.size() < 2) return found;
  const auto usable = prompt.first(prompt.size() - 1);
  for (auto at = held_.begin(); at != held_.end(); ++at) {
    const auto& tokens = at->second.tokens;
    const int shared = static_cast<int>(std::ranges::mismatch(tokens, usable).in1 - tokens.begin());
    if (shared < static_cast<int>(tokens.size()) && !at->second.trimmable) continue;
    const bool smaller = found.first != held_.end() && shared == found.second && at->second.bytes < found.first->second.bytes;
    if (shared > found.second || smaller) found = {at, shared};
  }
  return found;
}

engine::PrefixStore::Found PrefixFiles::find(std::span<const int> prompt) noexcept {
  const auto [at, tokens] = best(prompt);
  if (at == held_.end() || tokens < static_cast<int>(least_tokens)) return {};
  return {tokens, at->second.bytes};
}

engine::PrefixStore::Loaded PrefixFiles::load(std::span<const int> prompt) noexcept {
  const auto [at, tokens] = best(prompt);
  if (at == held_.end()) return {};
  const auto path = options_.folder / at->first;
  auto entry = at->second;
  try {
    // Another process may have written it anew, or something else of the same name.
    const auto name = at->first;
    held_.erase(at);
    if (!read_file(name) || held_.at(name).tokens != entry.tokens) return {};
    auto caches = cache::load_prompt_file(path, model_.description());
    if (cache::prompt_tokens(caches) != static_cast<int>(entry.tokens.size()) || cache::trimmable(caches) != entry.trimmable) {
      throw Error(Code::bad_weights, path.string(), "holds other tokens than it says");
    }
    std::error_code ignored;
    fs::last_write_time(path, fs::file_time_type::clock::now(), ignored);  // the order of use, for all processes
    const auto cache = runner_.adopt(std::move(caches));
    loaded_tokens_ = std::move(entry.tokens);
    return {cache, loaded_tokens_};
  } catch (const std::exception& e) {
    held_.erase(path.filename().string());
    std::error_code ignored;
    if (fs::exists(path, ignored)) warn(fmt::format("{}: {}; ignored", path.string(), e.what()));
  }
  return {};
}

/** Under the lock. The least recently used give way until so many bytes more fit; false when they never do. */
bool PrefixFiles::make_room(int64_t bytes) {
  if (bytes > options_.bytes) return false;
  auto files = files_of(options_.folder);
  std::ranges::sort(files, {}, &File::used);
  int64_t total = bytes;
  for (const auto& file : files) total += file.bytes;
  for (const auto& file : files) {
    if (total <= options_.bytes) return true;
    const auto name = file.path.filename().string();
    std::error_code error;
    if (!is_ours(name) || !fs::remove(file.path, error)) continue;
    held_.erase(name);
    total -= file.bytes;
  }
  return total <= options_.bytes;
}

void PrefixFiles::save(engine::CacheId cache, std::span<const int> tokens) noexcept {
  try {
    save_or_throw(cache, tokens);
  } catch (const std::exception& e) {
    warn(fmt::format("{}: {}; a prefix is not kept", options_.folder.string(), e.what()));
  }
}

void PrefixFiles::save_or_throw(engine::CacheId cache, std::span<const int> tokens) {
  if (tokens.size() < least_tokens) return;
  // What adds less than a quarter to a stored one is not worth its bytes.
  for (const auto& [name, held] : held_) {
    const auto shared = static_cast<std::size_t>(std::ranges::mismatch(held.tokens, tokens).in2 - tokens.begin());
    if (shared == tokens.size() ? held.trimmable || held.tokens.size() == shared : held.trimmable && shared >= tokens.size() / 4 * 3)
      return;
  }
  const auto& caches = runner_.caches(cache);
  const bool trimmable = cache::trimmable(caches);
  const auto text = fmt::format("{}", fmt::join(tokens, " "));
  const auto most_bytes = cache::total_bytes(caches) + static_cast<int64_t>(text.size() + 65536 + caches.size() * 2048);
  const FolderLock lock(options_.folder);
  if (!lock.held()) return;
  if (!make_room(most_bytes)) {
    throw Error(Code::bad_request, "prefix cache",
                fmt::format("{} tokens may take {} bytes, of {} for the folder", tokens.size(), most_bytes, options_.bytes));
  }
  const auto hash = hash_bytes(tokens.data(), tokens.size_bytes(), hash_bytes(fingerprint_.data(), fingerprint_.size()));
  const auto name = fmt::format("prefix-{:016x}.safetensors", hash);
  const auto path = options_.folder / name;
  cache::save_prompt_file(path, caches, model_.description(),
                          {{model_key, fingerprint_}, {tokens_key, text}, {trimmable_key, trimmable ? "1" : "0"}});
  held_.insert_or_assign(name, Held{{tokens.begin(), tokens.end()}, trimmable, static_cast<int64_t>(fs::file_size(path))});
}

}  // namespace mlxlm::gen
