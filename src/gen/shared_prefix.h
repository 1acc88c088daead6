// Which beginnings the prompts of a batch have in common, and who is the first to compute each.
#pragma once

#include <span>
#include <vector>

namespace mlxlm::gen {

/** For each prompt the lengths, ascending, at which to keep a copy of its cache: there others, which come later, go on as it does not. Each
 * is at least `least_tokens`, and leaves every prompt that can use it at least one token. With prompts computed in this order and copies
 * kept, no common beginning is computed twice. */
std::vector<std::vector<int>> shared_prefixes(const std::vector<std::span<const int>>& prompts, int least_tokens);

}  // namespace mlxlm::gen
