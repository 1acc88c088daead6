// Sorted, prompts that begin alike are neighbours: the inner nodes of their trie are found in one pass with a stack.
#include "gen/shared_prefix.h"

#include <algorithm>
#include <numeric>

namespace mlxlm::gen {
namespace {

/** An inner node: tokens up to it, and the first of the prompts that pass through it. */
struct Node {
  int tokens;
  std::size_t first;
};

int common(std::span<const int> a, std::span<const int> b) {
  return static_cast<int>(std::ranges::mismatch(a, b).in1 - a.begin());
}

}  // namespace

std::vector<std::vector<int>> shared_prefixes(const std::vector<std::span<const int>>& prompts, int least_tokens) {
  std::vector<std::vector<int>> found(prompts.size());
  if (prompts.empty()) return found;
  const auto usable = [&](std::size_t i) { return prompts[i].first(prompts[i].empty() ? 0 : prompts[i].size() - 1); };
  std::vector<std::size_t> order(prompts.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, [&](auto a, auto b) { return std::ranges::lexicographical_compare(usable(a), usable(b)); });
  std::vector<Node> open;  // from the root down to the prompt at hand
  for (std::size_t k = 0; k < order.size(); ++k) {
    const int next = k + 1 < order.size() ? common(usable(order[k]), usable(order[k + 1])) : 0;
    auto first = order[k];
    while (!open.empty() && open.back().tokens > next) {
      const auto node = open.back();
      open.pop_back();
      first = std::min(first, node.first);
      if (node.tokens >= least_tokens) found[first].push_back(node.tokens);
    }
    if (next == 0) continue;
    if (open.empty() || open.back().tokens < next)
      open.push_back({next, first});
    else
      open.back().first = std::min(open.back().first, first);
  }
  for (auto& lengths : found) std::ranges::sort(lengths);
  return found;
}

}  // namespace mlxlm::gen
