// One file a prefix, written beside and renamed; the tokens and the model stand in its metadata.
#include "gen/prefix_files.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>

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
const char* const space_key = "prefix_space";  // absent = 0

uint64_t hash_bytes(const void* data, std::size_t size, uint64_t hash = 14695981039346656037ull) {
  const auto* p = static_cast<const uint8_t*>(data);
  for (std::size_t i = 0; i < size; ++i) hash = (hash ^ p[i]) * 1099511628211ull;
  return hash;
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
  clean_folder();
  read_folder();
  writer_.emplace(options_.folder, options_.bytes);
}

PrefixFiles::~PrefixFiles() {
  writer_->finish();
  settle();
}

void PrefixFiles::warn(const std::string& text) const {
  if (!warned_ && options_.warn) options_.warn(text);
  warned_ = true;  // one is enough: nothing is lost but time
}

/** Removes what dead writers left, and what is beyond the budget. */
void PrefixFiles::clean_folder() {
  const FolderLock lock(options_.folder);
  if (!lock.held()) return;
  for (const auto& file : prefix_files(options_.folder)) {
    const bool old = fs::file_time_type::clock::now() - file.used > std::chrono::hours(1);
    std::error_code ignored;
    if (!file.whole && (old || file.writer == ::getpid() || (::kill(file.writer, 0) != 0 && errno == ESRCH)))
      fs::remove(file.path, ignored);
  }
  std::vector<std::string> removed;
  make_room_in_folder(options_.folder, options_.bytes, 0, removed);
}

void PrefixFiles::read_folder() {
  for (const auto& file : prefix_files(options_.folder)) {
    if (file.whole) read_file(file.path.filename().string());
  }
}

/** Throws Error(bad_weights). */
PrefixFiles::Held PrefixFiles::read_held(const fs::path& path, const std::map<std::string, std::string>& metadata) const {
  const auto text = [&](const char* key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  auto tokens = parse_tokens(text(tokens_key));
  if (!tokens || tokens->empty()) throw Error(Code::bad_weights, path.string(), "its tokens cannot be read");
  Held held{.tokens = std::move(*tokens), .trimmable = text(trimmable_key) == "1"};
  const auto space = text(space_key);
  const auto [stop, error] = std::from_chars(space.data(), space.data() + space.size(), held.space);
  if (!space.empty() && (error != std::errc() || stop != space.data() + space.size())) {
    throw Error(Code::bad_weights, path.string(), "what its caches are like cannot be read");
  }
  return held;
}

/** False when it is not there, broken or of another model. */
bool PrefixFiles::read_file(const std::string& name) {
  const auto path = options_.folder / name;
  try {
    const auto metadata = cache::read_prompt_metadata(path);
    const auto of = metadata.find(model_key);
    if (of == metadata.end() || !metadata.contains(tokens_key)) throw Error(Code::bad_weights, path.string(), "is no stored prefix");
    if (of->second != fingerprint_) return false;
    auto held = read_held(path, metadata);
    std::error_code error;
    held.bytes = static_cast<int64_t>(fs::file_size(path, error));
    if (error) return false;
    held_.insert_or_assign(name, std::move(held));
    return true;
  } catch (const Error& e) {
    if (e.code() != Code::not_found) warn(fmt::format("{}; ignored", e.what()));
  } catch (const std::exception& e) {
    warn(fmt::format("{}: {}; ignored", path.string(), e.what()));
  }
  return false;
}

/** Learns what the writer has done. */
void PrefixFiles::settle() {
  for (auto& done : writer_->take_done()) {
    for (const auto& name : done.removed) held_.erase(name);
    auto written = pending_.extract(done.name);
    if (done.bytes > 0 && written) {
      written.mapped().bytes = done.bytes;
      held_.insert_or_assign(done.name, std::move(written.mapped()));
    }
    if (!done.problem.empty()) warn(fmt::format("{}: {}; a prefix is not kept", options_.folder.string(), done.problem));
  }
}

std::pair<PrefixFiles::Files::const_iterator, int> PrefixFiles::best(std::span<const int> prompt, uint64_t space) const {
  std::pair found(held_.end(), 0);
  if (prompt.size() < 2) return found;
  const auto usable = prompt.first(prompt.size() - 1);
  for (auto at = held_.begin(); at != held_.end(); ++at) {
    if (at->second.space != space) continue;
    const auto& tokens = at->second.tokens;
    const int shared = static_cast<int>(std::ranges::mismatch(tokens, usable).in1 - tokens.begin());
    if (shared < static_cast<int>(tokens.size()) && !at->second.trimmable) continue;
    const bool smaller = found.first != held_.end() && shared == found.second && at->second.bytes < found.first->second.bytes;
    if (shared > found.second || smaller) found = {at, shared};
  }
  return found;
}

engine::PrefixStore::Found PrefixFiles::find(std::span<const int> prompt, uint64_t space) noexcept {
  settle();
  const auto [at, tokens] = best(prompt, space);
  if (at == held_.end() || tokens < static_cast<int>(least_tokens)) return {};
  return {tokens, at->second.bytes};
}

engine::PrefixStore::Loaded PrefixFiles::load(std::span<const int> prompt, uint64_t space) noexcept {
  settle();
  const auto [at, tokens] = best(prompt, space);
  if (at == held_.end()) return {};
  const auto path = options_.folder / at->first;
  auto entry = at->second;
  try {
    // Another process may have written it anew, or something else of the same name.
    const auto name = at->first;
    held_.erase(at);
    if (!read_file(name) || held_.at(name).tokens != entry.tokens || held_.at(name).space != space) return {};
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

void PrefixFiles::save(engine::CacheId cache, std::span<const int> tokens, uint64_t space) noexcept {
  try {
    settle();
    save_or_throw(cache, tokens, space);
  } catch (const std::exception& e) {
    warn(fmt::format("{}: {}; a prefix is not kept", options_.folder.string(), e.what()));
  }
}

/** What adds less than a quarter to a stored one is not worth its bytes. */
bool PrefixFiles::is_needless(std::span<const int> tokens, uint64_t space) const {
  const auto serves = [&](const auto& item) {
    const auto& held = item.second;
    if (held.space != space) return false;
    const auto shared = static_cast<std::size_t>(std::ranges::mismatch(held.tokens, tokens).in2 - tokens.begin());
    return shared == tokens.size() ? held.trimmable || held.tokens.size() == shared : held.trimmable && shared >= tokens.size() / 4 * 3;
  };
  return std::ranges::any_of(held_, serves) || std::ranges::any_of(pending_, serves);
}

void PrefixFiles::save_or_throw(engine::CacheId cache, std::span<const int> tokens, uint64_t space) {
  if (tokens.size() < least_tokens || is_needless(tokens, space)) return;
  const auto& caches = runner_.caches(cache);
  const bool trimmable = cache::trimmable(caches);
  const auto bytes = cache::total_bytes(caches);
  const auto text = fmt::format("{}", fmt::join(tokens, " "));
  cache::PromptMetadata metadata{{model_key, fingerprint_}, {tokens_key, text}, {trimmable_key, trimmable ? "1" : "0"}};
  if (space != 0) metadata[space_key] = std::to_string(space);
  auto content = cache::prompt_file_bytes(caches, model_.description(), std::move(metadata));
  if (static_cast<int64_t>(content.size()) > options_.bytes) {
    throw Error(Code::bad_request, "prefix cache",
                fmt::format("{} tokens take {} bytes, of {} for the folder", tokens.size(), content.size(), options_.bytes));
  }
  auto hash = hash_bytes(tokens.data(), tokens.size_bytes(), hash_bytes(fingerprint_.data(), fingerprint_.size()));
  if (space != 0) hash = hash_bytes(&space, sizeof(space), hash);
  const auto name = fmt::format("prefix-{:016x}.safetensors", hash);
  pending_.insert_or_assign(name, Held{{tokens.begin(), tokens.end()}, space, trimmable, bytes});
  writer_->add({name, std::move(content)});
}

}  // namespace mlxlm::gen
