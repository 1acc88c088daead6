// Caches to files and back. Reference: mlx_lm/models/cache.py save_prompt_cache, load_prompt_cache
#include "cache/prompt_file.h"

#include <algorithm>
#include <charconv>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/layer_shape.h"
#include "cache/restore.h"
#include "cache/rows.h"
#include "weights/weights.h"

namespace mlxlm::cache {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t most_layers = 100'000;
const char* const tokens_key = "tokens";  // ours: caches of recurrent layers do not tell their length

[[noreturn]] void bad(const fs::path& file, const std::string& problem) {
  throw Error(Code::bad_weights, file.string(), problem);
}

/** "12.0.1" -> 12 and "0.1". */
struct Position {
  std::size_t first = 0;
  std::string rest{};
};
std::optional<Position> split_position(const std::string& path) {
  Position p;
  const char *begin = path.data(), *end = begin + path.size();
  const auto [at, error] = std::from_chars(begin, end, p.first);
  if (error != std::errc() || p.first >= most_layers || (at != end && *at != '.')) return std::nullopt;
  if (at != end) p.rest.assign(at + 1, end);
  return p;
}

/** The strings of __metadata__, cut into the three parts of its first number. */
using Sections = std::array<std::map<std::string, std::string>, 3>;
Sections read_sections(const fs::path& file, const json& metadata) {
  Sections sections;
  if (!metadata.is_object()) bad(file, "metadata is not an object; is it a prompt cache?");
  for (const auto& [key, value] : metadata.items()) {
    if (key == "format") continue;  // some writers of safetensors add it
    const auto at = split_position(key);
    if (!at || at->first > 2 || !value.is_string()) bad(file, "metadata '" + key.substr(0, 60) + "' is not that of a prompt cache");
    sections[at->first][at->rest] = value.get<std::string>();
  }
  if (sections[1].empty() && sections[2].empty()) bad(file, "got no metadata of a prompt cache; is it one?");
  return sections;
}

/** mlx_lm 0.32: [user's, classes, scalars], the scalars beginning with "". Before: [state, user's, classes]. */
bool is_older_layout(const Sections& sections) {
  const auto marker = sections[2].find("0");
  return marker == sections[2].end() || !marker->second.empty();
}

std::vector<std::string> read_classes(const fs::path& file, const std::map<std::string, std::string>& section) {
  std::vector<std::string> classes(section.size());
  for (const auto& [path, name] : section) {
    const auto at = split_position(path);
    if (!at || !at->rest.empty() || at->first >= classes.size()) bad(file, "the list of cache classes has gaps");
    classes[at->first] = name;
  }
  if (classes.empty()) bad(file, "got no caches");
  return classes;
}

int64_t to_number(const fs::path& file, const std::string& path, const mx::array& stored) {
  if (stored.size() != 1 || !mx::issubdtype(stored.dtype(), mx::integer)) bad(file, path + ": wanted one whole number");
  auto value = mx::astype(stored, mx::int64);
  mx::eval(value);
  return value.item<int64_t>();
}

int64_t to_number(const fs::path& file, const std::string& path, const std::string& text) {
  int64_t value = 0;
  const auto [at, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || at != text.data() + text.size())
    bad(file, path + ": got '" + text.substr(0, 40) + "', wanted a whole number");
  return value;
}

/** Names of state items that are not arrays, by path: "scalar", "string" or "none". */
std::map<std::string, std::string> read_scalars(const fs::path& file, const std::map<std::string, std::string>& section) {
  std::map<std::string, std::string> kinds;
  for (const auto& [path, value] : section) {
    if (!path.ends_with(".0")) continue;
    const auto kind = section.find(path.substr(0, path.size() - 1) + "1");
    if (kind == section.end()) bad(file, "a scalar of the metadata has no type");
    kinds[value] = kind->second;
  }
  return kinds;
}

std::vector<Stored> read_new(const fs::path& file, const weights::Tensors& tensors, const Sections& sections) {
  const auto classes = read_classes(file, sections[1]);
  const auto kinds = read_scalars(file, sections[2]);
  std::vector<Stored> list(classes.size());
  for (std::size_t i = 0; i < classes.size(); ++i) list[i].kind = classes[i];
  for (const auto& [path, value] : tensors) {
    const auto at = split_position(path);
    if (!at || at->first >= list.size()) bad(file, path.substr(0, 60) + ": belongs to no cache");
    auto& stored = list[at->first];
    const auto kind = kinds.find(path);
    if (kind == kinds.end())
      stored.arrays.emplace(at->rest, value);
    else if (kind->second == "none")
      stored.arrays.emplace(at->rest, std::nullopt);
    else if (kind->second == "scalar")
      stored.numbers.emplace(at->rest, to_number(file, path, value));
    else if (kind->second != "string")
      bad(file, path + ": type '" + kind->second.substr(0, 40) + "' is not known");
  }
  return list;
}

/** Where the older layout's list of strings has what the newer one's state has. */
std::vector<std::string> older_numbers(const std::string& kind) {
  if (kind == "QuantizedKVCache") return {"2", "3", "4"};
  if (kind == "RotatingKVCache") return {"3", "4", "2", "5"};
  return {};
}

std::vector<Stored> read_older(const fs::path& file, const weights::Tensors& tensors, const Sections& sections) {
  const auto classes = read_classes(file, sections[2]);
  std::vector<Stored> list(classes.size());
  for (std::size_t i = 0; i < classes.size(); ++i) {
    list[i].kind = classes[i];
    const auto names = older_numbers(classes[i]);
    for (std::size_t n = 0; n < names.size(); ++n) {
      const auto path = fmt::format("{}.{}", i, n);
      const auto text = sections[0].find(path);
      if (text == sections[0].end()) bad(file, "metadata 0." + path + " is missing");
      list[i].numbers[names[n]] = to_number(file, path, text->second);
    }
  }
  for (const auto& [path, value] : tensors) {
    const auto at = split_position(path);
    if (!at || at->first >= list.size()) bad(file, path.substr(0, 60) + ": belongs to no cache");
    auto& stored = list[at->first];
    stored.arrays.emplace(stored.kind == "ArraysCache" ? "0." + at->rest : at->rest, value);
    if (stored.kind == "KVCache" && value.ndim() == 4) stored.numbers["2"] = value.shape(2);
  }
  return list;
}

std::optional<int> noted_tokens(const PromptMetadata& metadata) {
  const auto found = metadata.find(tokens_key);
  int value = 0;
  if (found == metadata.end()) return std::nullopt;
  const auto& text = found->second;
  const auto [at, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && at == text.data() + text.size() && value >= 0 ? std::optional(value) : std::nullopt;
}

/** All layers have seen the same tokens; recurrent ones learn it from the others. */
void set_lengths(const fs::path& file, Caches& caches, const PromptMetadata& metadata) {
  std::optional<int> length;
  for (const auto& c : caches) {
    if (!dynamic_cast<AttentionCache*>(c.get())) continue;
    if (length && *length != c->offset())
      bad(file, fmt::format("its layers have seen {} and {} tokens, wanted the same", *length, c->offset()));
    length = c->offset();
  }
  if (!length) length = noted_tokens(metadata);
  for (const auto& c : caches) {
    if (auto* recurrent = dynamic_cast<RecurrentCache*>(c.get())) recurrent->advance(length.value_or(0));
  }
}

}  // namespace

void save_prompt_file(const fs::path& file, const Caches& caches, PromptMetadata metadata) {
  weights::Tensors tensors;
  std::map<std::string, std::string> strings{{"2.0", ""}};
  int index = 0, scalars = 0;
  const auto note = [&](const std::string& path, const char* kind) {
    ++scalars;
    strings[fmt::format("2.{}.0", scalars)] = path;
    strings[fmt::format("2.{}.1", scalars)] = kind;
  };
  for (const auto& c : caches) {
    if (!c) continue;
    const auto stored = c->stored();
    strings[fmt::format("1.{}", index)] = stored.kind;
    for (const auto& [at, array] : stored.arrays) {
      const auto path = fmt::format("{}.{}", index, at);
      if (!array) note(path, "none");
      tensors.insert_or_assign(path, array ? *array : mx::zeros({0}, mx::float32));
    }
    for (const auto& [at, number] : stored.numbers) {
      const auto path = fmt::format("{}.{}", index, at);
      note(path, "scalar");
      tensors.insert_or_assign(path, mx::array(static_cast<int32_t>(number)));
    }
    ++index;
  }
  metadata[tokens_key] = std::to_string(prompt_tokens(caches));
  for (const auto& [key, value] : metadata) strings["0." + key] = value;
  weights::save_safetensors(file, tensors, strings);
}

PromptMetadata read_prompt_metadata(const fs::path& file) {
  const auto sections = read_sections(file, weights::load_safetensors(file).metadata);
  return sections[is_older_layout(sections) ? 1 : 0];
}

Caches load_prompt_file(const fs::path& file, const arch::Model& model) {
  const auto checkpoint = weights::load_safetensors(file);
  const auto sections = read_sections(file, checkpoint.metadata);
  const bool older = is_older_layout(sections);
  const auto list = older ? read_older(file, checkpoint.tensors, sections) : read_new(file, checkpoint.tensors, sections);
  const auto shapes = layer_shapes(model);
  const auto remembering = std::ranges::count_if(shapes, [](const LayerShape& s) { return s.layer.kind != plan::CacheKind::none; });
  if (static_cast<std::size_t>(remembering) != list.size()) {
    bad(file, fmt::format("got caches of {} layers, wanted {}; is it of another model?", list.size(), remembering));
  }
  Caches caches;
  std::size_t next = 0;
  for (const auto& shape : shapes) {
    if (shape.layer.kind == plan::CacheKind::none) {
      caches.push_back(nullptr);
      continue;
    }
    caches.push_back(restore(list[next], shape, fmt::format("{}: cache {}", file.string(), next)));
    ++next;
  }
  set_lengths(file, caches, sections[older ? 1 : 0]);
  return caches;
}

int prompt_tokens(const Caches& caches) {
  int tokens = 0;
  for (const auto& c : caches) tokens = std::max(tokens, c ? c->offset() : 0);
  return tokens;
}

void check_prompt_quantization(const Caches& caches, int bits, int group_size) {
  for (const auto& c : caches) {
    const auto* held = dynamic_cast<const QuantizedCache*>(c.get());
    if (held == nullptr) continue;
    if (bits != 0 && bits != held->bits()) {
      throw Error(Code::bad_request, "--kv-bits", fmt::format("got {}, but the prompt cache is quantized to {} bits", bits, held->bits()));
    }
    if (group_size != 0 && group_size != held->group_size()) {
      throw Error(Code::bad_request, "--kv-group-size",
                  fmt::format("got {}, but the prompt cache has groups of {}", group_size, held->group_size()));
    }
  }
}

int64_t total_bytes(const Caches& caches) {
  int64_t total = 0;
  for (const auto& c : caches) total += c ? c->bytes() : 0;
  return total;
}

bool trimmable(const Caches& caches) {
  return std::ranges::all_of(caches, [](const CachePtr& c) { return !c || c->trimmable(); });
}

int trim(Caches& caches, int n) {
  if (!trimmable(caches)) return 0;
  int trimmed = 0;
  for (const auto& c : caches) trimmed = c ? c->trim(n) : trimmed;
  return trimmed;
}

Caches copy(const Caches& caches) {
  Caches copied;
  for (const auto& c : caches) copied.push_back(c ? c->copy() : nullptr);
  return copied;
}

}  // namespace mlxlm::cache
