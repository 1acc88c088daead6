// Caches to files and back. Reference: mlx_lm/models/cache.py save_prompt_cache, load_prompt_cache
#include "cache/prompt_file.h"

#include <algorithm>
#include <charconv>
#include <set>

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

/** What a file has for one layer: a cache, or a CacheList of several. */
struct StoredLayer {
  bool list = false;
  std::vector<Stored> parts{};
};
constexpr const char* list_kind = "CacheList";
constexpr std::size_t most_parts = 16;

std::vector<StoredLayer> layers_of(const std::vector<std::string>& classes) {
  std::vector<StoredLayer> layers;
  for (const auto& kind : classes) {
    if (kind == list_kind)
      layers.push_back({.list = true});
    else
      layers.push_back({.parts = {Stored{.kind = kind}}});
  }
  return layers;
}

/** The cache that "j.." of a list's state belongs to. */
Stored& part_at(const fs::path& file, StoredLayer& layer, const Position& at) {
  if (at.first >= most_parts) bad(file, fmt::format("got more than {} caches in a layer", most_parts));
  if (at.first >= layer.parts.size()) layer.parts.resize(at.first + 1);
  return layer.parts[at.first];
}

/** Of code points. */
std::string to_text(const fs::path& file, const std::string& path, const mx::array& stored) {
  constexpr std::size_t most = 100;
  if (stored.ndim() != 1 || stored.size() > most || !mx::issubdtype(stored.dtype(), mx::integer)) bad(file, path + ": wanted a short text");
  auto codes = mx::contiguous(mx::astype(stored, mx::int32));
  mx::eval(codes);
  std::string text;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const int code = codes.data<int>()[i];
    if (code < 0x20 || code > 0x7E) bad(file, path + ": wanted a name in ASCII");
    text += static_cast<char>(code);
  }
  return text;
}

std::vector<StoredLayer> read_new(const fs::path& file, const weights::Tensors& tensors, const Sections& sections) {
  auto layers = layers_of(read_classes(file, sections[1]));
  const auto kinds = read_scalars(file, sections[2]);
  for (const auto& [path, value] : tensors) {
    const auto at = split_position(path);
    if (!at || at->first >= layers.size()) bad(file, path.substr(0, 60) + ": belongs to no cache");
    auto& layer = layers[at->first];
    const auto kind = kinds.find(path);
    const std::string type = kind == kinds.end() ? "" : kind->second;
    auto rest = at->rest;
    Stored* stored = layer.list ? nullptr : &layer.parts[0];
    if (layer.list) {  // j.0.* is the state of its cache j, j.1 the name of that one's class
      const auto part = split_position(rest);
      if (!part) bad(file, path.substr(0, 60) + ": belongs to no cache");
      stored = &part_at(file, layer, *part);
      if (part->rest == "1" && type == "string") {
        stored->kind = to_text(file, path, value);
        continue;
      }
      if (!part->rest.starts_with("0.")) bad(file, path.substr(0, 60) + ": belongs to no cache");
      rest = part->rest.substr(2);
    }
    if (type.empty())
      stored->arrays.emplace(rest, value);
    else if (type == "none")
      stored->arrays.emplace(rest, std::nullopt);
    else if (type == "scalar")
      stored->numbers.emplace(rest, to_number(file, path, value));
    else
      bad(file, path + ": type '" + type.substr(0, 40) + "' is not known here");
  }
  return layers;
}

/** Where the older layout's list of strings has what the newer one's state has. */
std::vector<std::string> older_numbers(const std::string& kind) {
  if (kind == "QuantizedKVCache") return {"2", "3", "4"};
  if (kind == "RotatingKVCache") return {"3", "4", "2", "5"};
  if (kind == "ChunkedKVCache") return {"3", "4"};
  return {};
}

/** `at`: where the strings of one cache begin. */
void read_older_numbers(const fs::path& file, const Sections& sections, const std::string& at, Stored& stored) {
  const auto names = older_numbers(stored.kind);
  for (std::size_t n = 0; n < names.size(); ++n) {
    const auto path = fmt::format("{}.{}", at, n);
    const auto text = sections[0].find(path);
    if (text == sections[0].end()) bad(file, "metadata 0." + path + " is missing");
    stored.numbers[names[n]] = to_number(file, path, text->second);
  }
  // It takes all rows of a buffer for tokens, whatever came before them.
  if (stored.kind == "ChunkedKVCache" && stored.numbers["4"] != 0) bad(file, "its version does not tell how long a chunk is");
}

void add_older_array(Stored& stored, const std::string& path, const mx::array& value) {
  stored.arrays.emplace(stored.kind == "ArraysCache" ? "0." + path : path, value);
  const bool counted = stored.kind == "KVCache" || stored.kind == "ChunkedKVCache";
  if (counted && value.ndim() == 4) stored.numbers["2"] = value.shape(2);
}

std::vector<StoredLayer> read_older(const fs::path& file, const weights::Tensors& tensors, const Sections& sections) {
  auto layers = layers_of(read_classes(file, sections[2]));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (!layers[i].list) {
      read_older_numbers(file, sections, std::to_string(i), layers[i].parts[0]);
      continue;
    }
    for (std::size_t j = 0; j < most_parts; ++j) {
      const auto name = sections[0].find(fmt::format("{}.0.{}", i, j));
      if (name == sections[0].end()) break;
      layers[i].parts.push_back({.kind = name->second});
      read_older_numbers(file, sections, fmt::format("{}.1.{}", i, j), layers[i].parts.back());
    }
  }
  for (const auto& [path, value] : tensors) {
    const auto at = split_position(path);
    if (!at || at->first >= layers.size()) bad(file, path.substr(0, 60) + ": belongs to no cache");
    auto& layer = layers[at->first];
    const auto part = layer.list ? split_position(at->rest) : std::optional(Position{0, at->rest});
    if (!part || part->first >= layer.parts.size()) bad(file, path.substr(0, 60) + ": belongs to no cache");
    add_older_array(layer.parts[part->first], part->rest, value);
  }
  return layers;
}

/** Nothing for a text of somebody else that is no number. */
std::optional<int> noted_tokens(const fs::path& file, const PromptMetadata& metadata) {
  const auto found = metadata.find(tokens_key);
  if (found == metadata.end()) return std::nullopt;
  const auto& text = found->second;
  int64_t value = 0;
  const auto [at, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::invalid_argument || at != text.data() + text.size()) return std::nullopt;
  if (error != std::errc() || value < 0 || value > most_tokens)
    bad(file, fmt::format("metadata 0.{}: got {}, wanted 0 to {}", tokens_key, text.substr(0, 40), most_tokens));
  return static_cast<int>(value);
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
  if (!length) length = noted_tokens(file, metadata);
  for (const auto& c : caches) {
    if (auto* recurrent = dynamic_cast<RecurrentCache*>(c.get())) recurrent->advance(length.value_or(0));
  }
}

struct Content {
  weights::Tensors tensors{};
  std::map<std::string, std::string> strings{};
  std::map<std::string, std::vector<mx::array>> parts{};  // of tensors that lie in several places, see Stored
  std::vector<std::shared_ptr<const void>> lent{};
};

Content content_of(const Caches& caches, const arch::Model& model, PromptMetadata metadata) {
  check_fits(caches, model);
  const auto layout = plan::cache_layout(model);
  Content content{.strings = {{"2.0", ""}}};
  auto& [tensors, strings, parts, lent] = content;
  int index = 0, scalars = 0;
  const auto add = [&](const std::string& path, const mx::array& value, const char* kind) {
    tensors.insert_or_assign(path, value);
    if (kind == nullptr) return;
    ++scalars;
    strings[fmt::format("2.{}.0", scalars)] = path;
    strings[fmt::format("2.{}.1", scalars)] = kind;
  };
  const auto add_state = [&](const std::string& at, const Stored& stored) {
    for (const auto& [path, array] : stored.arrays) {
      add(at + path, array ? *array : mx::zeros({0}, mx::float32), array ? nullptr : "none");
    }
    for (const auto& [path, number] : stored.numbers) add(at + path, mx::array(static_cast<int32_t>(number)), "scalar");
    for (const auto& [path, list] : stored.parts) parts.emplace(at + path, list);
    lent.insert(lent.end(), stored.lent.begin(), stored.lent.end());
  };
  for (std::size_t i = 0, end = 0; i < caches.size(); i = end) {
    for (end = i + 1; end < caches.size() && layout[end].layer == layout[i].layer;) ++end;
    if (!caches[i]) continue;
    if (end - i == 1) {
      const auto stored = caches[i]->stored();
      strings[fmt::format("1.{}", index)] = stored.kind;
      add_state(fmt::format("{}.", index), stored);
    } else {
      strings[fmt::format("1.{}", index)] = list_kind;
    }
    for (std::size_t part = i; end - i > 1 && part < end; ++part) {
      const auto stored = caches[part]->stored();
      const auto at = fmt::format("{}.{}.", index, part - i);
      add_state(at + "0.", stored);
      std::vector<int> codes(stored.kind.begin(), stored.kind.end());
      add(at + "1", mx::array(codes.data(), {static_cast<int>(codes.size())}, mx::int32), "string");
    }
    ++index;
  }
  metadata[tokens_key] = std::to_string(prompt_tokens(caches));
  for (const auto& [key, value] : metadata) strings["0." + key] = value;
  return content;
}

std::span<const std::byte> bytes_at(const mx::array& a, std::size_t offset, std::size_t count) {
  return {reinterpret_cast<const std::byte*>(a.data<char>()) + offset, count};
}

/** Whether rows of a head lie one after the other, as in a buffer with room for more. */
bool has_dense_heads(const mx::array& a) {
  return a.ndim() == 4 && (a.shape(3) == 1 || a.strides(3) == 1) && (a.shape(2) == 1 || a.strides(2) == a.shape(3));
}

/** Where the bytes of parts, joined along the third axis, are, in the order of a file. */
void add_pieces(const std::vector<mx::array>& parts, std::vector<std::span<const std::byte>>& pieces) {
  if (parts.size() == 1 && parts[0].flags().row_contiguous) return pieces.push_back(bytes_at(parts[0], 0, parts[0].nbytes()));
  for (int b = 0; b < parts[0].shape(0); ++b) {
    for (int head = 0; head < parts[0].shape(1); ++head) {
      for (const auto& a : parts) {
        const auto at = static_cast<std::size_t>(b * a.strides(0) + head * a.strides(1)) * a.itemsize();
        pieces.push_back(bytes_at(a, at, static_cast<std::size_t>(a.shape(2)) * a.shape(3) * a.itemsize()));
      }
    }
  }
}

}  // namespace

void save_prompt_file(const fs::path& file, const Caches& caches, const arch::Model& model, PromptMetadata metadata) {
  const auto content = content_of(caches, model, std::move(metadata));
  weights::save_safetensors(file, content.tensors, content.strings);
}

PromptFilePieces prompt_file_pieces(const Caches& caches, const arch::Model& model, PromptMetadata metadata) {
  struct Owner {
    std::vector<mx::array> arrays{};
    std::vector<std::shared_ptr<const void>> lent{};
  };
  auto content = content_of(caches, model, std::move(metadata));
  PromptFilePieces pieces{.start = weights::safetensors_start("prompt cache", content.tensors, content.strings)};
  auto owner = std::make_shared<Owner>(Owner{.lent = std::move(content.lent)});
  std::vector<std::vector<mx::array>> tensors;
  std::vector<mx::array> all;
  for (const auto& [name, value] : content.tensors) {
    const auto parts = content.parts.find(name);
    tensors.push_back(parts == content.parts.end() ? std::vector{value} : std::move(parts->second));
    all.insert(all.end(), tensors.back().begin(), tensors.back().end());
  }
  mx::eval(all);  // of cuts of buffers: no copies
  for (auto& parts : tensors) {
    for (auto& a : parts) {
      if ((parts.size() > 1 || !a.flags().row_contiguous) && !has_dense_heads(a)) {
        a = mx::contiguous(a);
        mx::eval(a);
        pieces.copied_bytes += static_cast<int64_t>(a.nbytes());
      }
    }
    add_pieces(parts, pieces.rest);
    owner->arrays.insert(owner->arrays.end(), parts.begin(), parts.end());
  }
  pieces.owner = std::move(owner);
  return pieces;
}

PromptMetadata read_prompt_metadata(const fs::path& file) {
  const auto sections = read_sections(file, weights::load_safetensors(file).metadata);
  return sections[is_older_layout(sections) ? 1 : 0];
}

Caches load_prompt_file(const fs::path& file, const arch::Model& model) {
  const auto checkpoint = weights::load_safetensors(file);
  const auto sections = read_sections(file, checkpoint.metadata);
  const bool older = is_older_layout(sections);
  const auto layers = older ? read_older(file, checkpoint.tensors, sections) : read_new(file, checkpoint.tensors, sections);
  const auto shapes = layer_shapes(model);
  std::set<int> remembering;
  for (const auto& shape : shapes) {
    if (shape.layer.kind != plan::CacheKind::none) remembering.insert(shape.layer.layer);
  }
  if (remembering.size() != layers.size()) {
    bad(file, fmt::format("got caches of {} layers, wanted {}; is it of another model?", layers.size(), remembering.size()));
  }
  Caches caches;
  std::size_t next = 0;
  for (std::size_t i = 0, end = 0; i < shapes.size(); i = end) {
    for (end = i + 1; end < shapes.size() && shapes[end].layer.layer == shapes[i].layer.layer;) ++end;
    if (shapes[i].layer.kind == plan::CacheKind::none) {
      caches.push_back(nullptr);
      continue;
    }
    const auto& layer = layers[next];
    const auto where = fmt::format("{}: cache {}", file.string(), next++);
    if (layer.parts.size() != end - i || layer.list != (end - i > 1)) {
      throw Error(
          Code::bad_weights, where,
          fmt::format("got {} of {}, wanted {}; is it of another model?", layer.list ? "a list" : "one", layer.parts.size(), end - i));
    }
    for (std::size_t part = i; part < end; ++part) {
      const auto& stored = layer.parts[part - i];
      caches.push_back(restore(stored, shapes[part], layer.list ? fmt::format("{}.{}", where, part - i) : where));
    }
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
    const auto* attention = dynamic_cast<const AttentionCache*>(c.get());
    const auto* held = attention == nullptr ? nullptr : dynamic_cast<const QuantizedCache*>(&attention->inner());
    if (held == nullptr) continue;
    if (bits != 0 && bits != held->bits()) {
      throw Error(Code::bad_request, "kv_bits", fmt::format("got {}, but the prompt cache is quantized to {} bits", bits, held->bits()));
    }
    if (group_size != 0 && group_size != held->group_size()) {
      throw Error(Code::bad_request, "kv_group_size",
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
  if (!trimmable(caches) && std::ranges::any_of(caches, [n](const CachePtr& c) { return c && c->trimmable_tokens() < n; })) return 0;
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
