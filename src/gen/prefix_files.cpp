// One file a prefix, written beside and renamed; the tokens and the model stand in its metadata.
#include "gen/prefix_files.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/prompt_file.h"
#include "cache/quantized.h"

namespace mlxlm::gen {

namespace fs = std::filesystem;
using engine::FolderLock, engine::prefix_files, engine::make_room_in_folder;

namespace {

constexpr std::size_t least_tokens = 64;  // fewer are computed again as fast
const char* const model_key = "prefix_model";
const char* const tokens_key = "prefix_tokens";
const char* const trimmable_key = "prefix_trimmable";
const char* const options_key = "prefix_options";  // absent = the usual ones; else four numbers: what tells apart kinds of caches

uint64_t hash_bytes(const void* data, std::size_t size, uint64_t hash = 14695981039346656037ull) {
  const auto* p = static_cast<const uint8_t*>(data);
  for (std::size_t i = 0; i < size; ++i) hash = (hash ^ p[i]) * 1099511628211ull;
  return hash;
}

std::optional<std::vector<int>> parse_numbers(const std::string& text) {
  std::vector<int> numbers;
  for (const char *at = text.data(), *end = at + text.size(); at != end;) {
    int number = 0;
    const auto [stop, error] = std::from_chars(at, end, number);
    if (error != std::errc() || number < 0 || (stop != end && *stop != ' ')) return std::nullopt;
    numbers.push_back(number);
    at = stop == end ? end : stop + 1;
  }
  return numbers;
}

std::string to_text(const engine::CacheOptions& o) {
  return fmt::format("{} {} {} {}", o.max_kv_size_tokens, o.kv_bits, o.kv_group_size, o.quantized_from_tokens);
}

std::optional<engine::CacheOptions> parse_options(const std::string& text) {
  if (text.empty()) return engine::CacheOptions{};
  const auto numbers = parse_numbers(text);
  if (!numbers || numbers->size() != 4) return std::nullopt;
  const auto& n = *numbers;
  return engine::CacheOptions{.max_kv_size_tokens = n[0], .kv_bits = n[1], .kv_group_size = n[2], .quantized_from_tokens = n[3]};
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
  try {
    writer_->finish();
    settle();
  } catch (const std::exception& e) {
    warn(e.what());
  }
}

void PrefixFiles::warn(const std::string& text) const noexcept {
  if (std::exchange(warned_, true) || !options_.warn) return;  // one is enough: nothing is lost but time
  try {
    options_.warn(text);
  } catch (...) {
    // No request may end of a warning.
  }
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
  auto tokens = parse_numbers(text(tokens_key));
  if (!tokens || tokens->empty()) throw Error(Code::bad_weights, path.string(), "its tokens cannot be read");
  const auto options = parse_options(text(options_key));
  if (!options) throw Error(Code::bad_weights, path.string(), "what its caches are like cannot be read");
  Held held{std::move(*tokens), *options, engine::prefix_space(*options), text(trimmable_key) == "1"};
  const auto name = name_of(held);
  if (path.filename() != name) throw Error(Code::bad_weights, path.string(), fmt::format("holds what belongs into {}", name));
  return held;
}

/** One name for each model, run of tokens and kind of cache. */
std::string PrefixFiles::name_of(const Held& held) const {
  auto hash = hash_bytes(held.tokens.data(), held.tokens.size() * sizeof(int), hash_bytes(fingerprint_.data(), fingerprint_.size()));
  if (held.space != 0) hash = hash_bytes(&held.space, sizeof(held.space), hash);
  return fmt::format("prefix-{:016x}.safetensors", hash);
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
  try {
    settle();
    const auto [at, tokens] = best(prompt, space);
    if (at != held_.end() && tokens >= static_cast<int>(least_tokens)) return {tokens, at->second.bytes};
  } catch (const std::exception& e) {
    warn(fmt::format("{}: {}; ignored", options_.folder.string(), e.what()));
  }
  return {};
}

/** What the metadata says must be so: a wrong cache would give wrong answers. Throws Error(bad_weights). */
void PrefixFiles::check_content(const fs::path& path, const Held& held, const cache::Caches& caches) const {
  const auto& o = held.options;
  const int tokens = static_cast<int>(held.tokens.size());
  if (cache::prompt_tokens(caches) != tokens || cache::trimmable(caches) != held.trimmable) {
    throw Error(Code::bad_weights, path.string(), "holds other tokens than it says");
  }
  const auto fresh = cache::make_caches(model_.description(), o.max_kv_size_tokens);
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const auto* attention = dynamic_cast<const cache::AttentionCache*>(caches[i].get());
    if (attention == nullptr) continue;
    const auto& wanted = dynamic_cast<const cache::AttentionCache&>(*fresh.at(i));
    const auto* quantized = dynamic_cast<const cache::QuantizedCache*>(&attention->inner());
    const bool is_due = o.kv_bits > 0 && tokens >= o.quantized_from_tokens && wanted.can_quantize();
    const bool fits = is_due ? quantized != nullptr && quantized->bits() == o.kv_bits && quantized->group_size() == o.kv_group_size
                             : quantized == nullptr;
    if (fits && attention->max_size() == wanted.max_size()) continue;
    throw Error(Code::bad_weights, path.string(), fmt::format("cache {} is of another kind than it says", i));
  }
}

engine::PrefixStore::Loaded PrefixFiles::load_or_throw(const std::string& name, Held entry) {
  const auto path = options_.folder / name;
  // Another process may have written it anew, or something else of the same name.
  held_.erase(name);
  if (!read_file(name)) return {};
  const auto& now = held_.at(name);
  if (now.tokens != entry.tokens || now.space != entry.space) return {};
  auto caches = cache::load_prompt_file(path, model_.description());
  check_content(path, now, caches);
  std::error_code ignored;
  fs::last_write_time(path, fs::file_time_type::clock::now(), ignored);  // the order of use, for all processes
  const auto cache = runner_.adopt(std::move(caches));
  runner_.adapt(cache, now.options);
  loaded_tokens_ = std::move(entry.tokens);
  return {cache, loaded_tokens_};
}

engine::PrefixStore::Loaded PrefixFiles::load(std::span<const int> prompt, uint64_t space) noexcept {
  std::string name;
  try {
    settle();
    const auto [at, tokens] = best(prompt, space);
    if (at == held_.end()) return {};
    name = at->first;
    return load_or_throw(name, at->second);
  } catch (const std::exception& e) {
    held_.erase(name);
    const auto path = options_.folder / name;
    std::error_code ignored;
    if (fs::exists(path, ignored)) warn(fmt::format("{}: {}; ignored", path.string(), e.what()));
  }
  return {};
}

int64_t PrefixFiles::unwritten_bytes() noexcept {
  return writer_->held_bytes();
}

void PrefixFiles::shrink_unwritten(int64_t bytes) noexcept {
  writer_->shrink_to(bytes);
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
  Held held{{tokens.begin(), tokens.end()}, runner_.options(cache), space, cache::trimmable(caches)};
  if (engine::prefix_space(held.options) != space) throw Error(Code::internal, "prefix cache", "got a cache of another kind");
  cache::PromptMetadata metadata{
      {model_key, fingerprint_}, {tokens_key, fmt::format("{}", fmt::join(tokens, " "))}, {trimmable_key, held.trimmable ? "1" : "0"}};
  if (space != 0) metadata[options_key] = to_text(held.options);
  auto content = cache::prompt_file_pieces(caches, model_.description(), std::move(metadata));
  auto size = static_cast<int64_t>(content.start.size());
  for (const auto& piece : content.rest) size += static_cast<int64_t>(piece.size());
  if (size > options_.bytes) {
    throw Error(Code::bad_request, "prefix cache",
                fmt::format("{} tokens take {} bytes, of {} for the folder", tokens.size(), size, options_.bytes));
  }
  const auto name = name_of(held);
  const auto in_memory = cache::total_bytes(caches) + content.copied_bytes + static_cast<int64_t>(content.start.size());
  pending_.insert_or_assign(name, std::move(held));
  writer_->add({name, std::move(content.start), std::move(content.rest), std::move(content.owner), in_memory});
}

}  // namespace mlxlm::gen
