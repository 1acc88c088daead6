// Markers of thinking and of tool calls, inferred from a vocabulary and a chat template.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace mlxlm::text {

struct ThinkingMarkers {
  std::string start, end;  // empty = none
};
struct ToolMarkers {
  std::string parser, start, end;  // parser empty = none
};

using HasToken = std::function<bool(std::string_view)>;

/** Reference: mlx_lm/tokenizer_utils.py _infer_thinking. */
ThinkingMarkers infer_thinking(const HasToken& has_token);
/** Reference: mlx_lm/tokenizer_utils.py _infer_tool_parser. */
ToolMarkers infer_tools(std::string_view chat_template, const HasToken& has_token);
/** The markers of a parser by its name; Error(unsupported) for an unknown one. */
ToolMarkers tool_markers(std::string_view parser);

}  // namespace mlxlm::text
