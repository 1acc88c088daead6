// Small helpers over names and strings.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace mlxlm {

/** Up to `count` candidates nearest to `name` by edit distance, best first; only plausible ones (distance <= a third of the length, at
 * least 2). */
std::vector<std::string> nearest_names(std::string_view name, const std::vector<std::string>& candidates, int count = 3);

/** "a, b, c" */
std::string join(const std::vector<std::string>& parts, std::string_view separator = ", ");

std::vector<std::string> split(std::string_view text, char separator);

/** Glob with one meaning: `*` matches any run of characters, dots included. */
bool glob_match(std::string_view pattern, std::string_view text);

}  // namespace mlxlm
