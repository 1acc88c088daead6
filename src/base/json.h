// JSON as this project reads it: key order kept, errors as mlxlm::Error with the file and the place.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace mlxlm {

using json = nlohmann::ordered_json;

/** Parses text; `where` names the source in errors. Accepts NaN, Infinity and -Infinity as Python's json does.
 *  Throws Error(bad_config): syntax error (with line and column), nesting deeper than 512. */
json parse_json(std::string_view text, std::string_view where);

/** Throws Error(not_found), Error(io), Error(bad_config). */
json read_json_file(const std::filesystem::path& path);

/** A long list of texts as one binary value, which costs a small part of the time and memory of an array of strings. `encoded`: of each
 * text, its length in 8 bytes and then the text, as GGUF has it. */
json packed_texts(std::span<const std::byte> encoded);
/** The texts of such a value or of an array of strings; they live as long as `list`. Throws Error(bad_config) for anything else. */
std::vector<std::string_view> texts_of(const json& list, std::string_view where);

/** dump() that never throws: invalid UTF-8 is replaced by U+FFFD. indent < 0: one line. */
std::string to_text(const json& value, int indent = -1);

}  // namespace mlxlm
