// JSON text to values, with Python's extensions and bounded nesting.
#include "base/json.h"

#include <cstddef>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "base/files.h"

namespace mlxlm {
namespace {

constexpr int max_depth = 512;

bool is_word_char(char c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_';
}

/** Copies `text` to `out` with NaN, Infinity and -Infinity outside strings tagged as objects, if there are any: returns whether.
 *  Throws on nesting that is too deep, which the recursive destructor of a DOM could not survive. */
bool python_numbers_to_json(std::string_view text, std::string_view where, std::string& out) {
  static constexpr std::string_view words[] = {"NaN", "-Infinity", "Infinity"};
  static constexpr std::string_view tags[] = {R"({"__float__":"NaN"})", R"({"__float__":"-Infinity"})", R"({"__float__":"Infinity"})"};
  bool in_string = false, changed = false;
  int depth = 0;
  std::size_t copied = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      in_string = c != '"';
      continue;
    }
    if (c == '"') in_string = true;
    if ((c == '{' || c == '[') && ++depth > max_depth) {
      throw Error(Code::bad_config, where, "nested deeper than " + std::to_string(max_depth) + " levels");
    }
    if (c == '}' || c == ']') --depth;
    if (c != 'N' && c != 'I' && c != '-') continue;
    for (std::size_t w = 0; w < std::size(words); ++w) {
      const std::size_t end = i + words[w].size();
      const bool whole = (i == 0 || !is_word_char(text[i - 1])) && (end >= text.size() || !is_word_char(text[end]));
      if (!whole || text.substr(i, words[w].size()) != words[w]) continue;
      out.append(text.substr(copied, i - copied)).append(tags[w]);
      copied = end;
      i = end - 1;
      changed = true;
      break;
    }
  }
  if (changed) out.append(text.substr(copied));
  return changed;
}

/** {"__float__": "Infinity"} -> the number. Depth is bounded by the parser's check. */
void untag_floats(json& value) {
  if (value.is_object() && value.size() == 1 && value.begin().key() == "__float__" && value.begin()->is_string()) {
    const std::string tag = value.begin()->get<std::string>();
    if (tag == "NaN")
      value = std::numeric_limits<double>::quiet_NaN();
    else if (tag == "Infinity")
      value = std::numeric_limits<double>::infinity();
    else if (tag == "-Infinity")
      value = -std::numeric_limits<double>::infinity();
    return;
  }
  if (value.is_structured()) {
    for (auto& child : value) untag_floats(child);
  }
}

std::string line_and_column(std::string_view text, std::size_t byte) {
  std::size_t line = 1, column = 1;
  for (std::size_t i = 0; i + 1 < byte && i < text.size(); ++i) {
    if (text[i] == '\n') {
      ++line;
      column = 1;
    } else {
      ++column;
    }
  }
  return "line " + std::to_string(line) + ", column " + std::to_string(column);
}

}  // namespace

json parse_json(std::string_view text, std::string_view where) {
  std::string rewritten;
  const bool changed = python_numbers_to_json(text, where, rewritten);
  const std::string_view source = changed ? std::string_view(rewritten) : text;
  try {
    json value = json::parse(source);
    if (changed || text.find("__float__") != std::string_view::npos) untag_floats(value);
    return value;
  } catch (const json::parse_error& e) {
    if (text.find_first_not_of(" \t\r\n") == std::string_view::npos) throw Error(Code::bad_config, where, "empty, wanted JSON");
    throw Error(Code::bad_config, where, "broken JSON at " + line_and_column(source, e.byte));
  } catch (const json::exception& e) {
    throw Error(Code::bad_config, where, std::string("broken JSON: ") + e.what());
  }
}

json read_json_file(const std::filesystem::path& path) {
  return parse_json(read_text_file(path), path.string());
}

std::string to_text(const json& value, int indent) {
  return value.dump(indent, ' ', false, json::error_handler_t::replace);
}

json packed_texts(std::span<const std::byte> encoded) {
  const auto* begin = reinterpret_cast<const uint8_t*>(encoded.data());
  return json::binary(std::vector<uint8_t>(begin, begin + encoded.size()));
}

std::vector<std::string_view> texts_of(const json& list, std::string_view where) {
  std::vector<std::string_view> texts;
  if (list.is_binary()) {
    const auto& bytes = list.get_binary();
    for (std::size_t at = 0; at < bytes.size();) {
      uint64_t length = 0;
      if (bytes.size() - at >= sizeof length) std::memcpy(&length, bytes.data() + at, sizeof length);
      if (bytes.size() - at < sizeof length || length > bytes.size() - at - sizeof length)
        throw Error(Code::bad_config, std::string(where), "its last text is cut off");
      texts.emplace_back(reinterpret_cast<const char*>(bytes.data()) + at + sizeof length, length);
      at += sizeof length + length;
    }
    return texts;
  }
  if (!list.is_array()) throw Error(Code::bad_config, std::string(where), "missing, wanted an array");
  for (const auto& text : list) {
    if (!text.is_string()) throw Error(Code::bad_config, std::string(where), "got an item that is no string");
    texts.push_back(text.get_ref<const std::string&>());
  }
  return texts;
}

}  // namespace mlxlm
