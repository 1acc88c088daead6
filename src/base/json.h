// JSON as this project reads it: key order kept, errors as mlxlm::Error with the file and the place.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace mlxlm {

using json = nlohmann::ordered_json;

/** Parses text; `where` names the source in errors. Accepts NaN, Infinity and -Infinity as Python's json does.
 *  Throws Error(bad_config): syntax error (with line and column), nesting deeper than 512. */
json parse_json(std::string_view text, std::string_view where);

/** Throws Error(not_found), Error(io), Error(bad_config). */
json read_json_file(const std::filesystem::path& path);

/** dump() that never throws: invalid UTF-8 is replaced by U+FFFD. indent < 0: one line. */
std::string to_text(const json& value, int indent = -1);

}  // namespace mlxlm
