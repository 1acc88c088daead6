// Tables of thinking and tool-call markers. Reference: mlx_lm/tokenizer_utils.py, mlx_lm/tool_parsers/
#include "text/markers.h"

#include <utility>

#include "base/error.h"

namespace mlxlm::text {
namespace {

constexpr std::pair<std::string_view, std::string_view> kThinkTokens[] = {
    {"<think>", "</think>"},
    {"<longcat_think>", "</longcat_think>"},
    {"<|think:start|>", "<|think:end|>"},
};

struct ToolFormat {
  std::string_view parser, start, end;
};
constexpr ToolFormat kToolFormats[] = {
    {"minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>"},
    {"gemma4", "<|tool_call>", "<tool_call|>"},
    {"function_gemma", "<start_function_call>", "<end_function_call>"},
    {"longcat", "<longcat_tool_call>", "</longcat_tool_call>"},
    {"glm47", "<tool_call>", "</tool_call>"},
    {"laguna", "<tool_call>", "</tool_call>"},
    {"pythonic", "<|tool_call_start|>", "<|tool_call_end|>"},
    {"qwen3_coder", "<tool_call>", "</tool_call>"},
    {"kimi_k2", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"},
    {"kimi_k3", "<|open|>tools<|sep|>", "<|close|>tools<|sep|>"},
    {"minicpm5", "<function name=", "</function>"},
    {"mistral", "[TOOL_CALLS]", ""},
    {"muse_spark", "<atem:function_calls>", "</atem:function_calls>"},
    {"json_tools", "<tool_call>", "</tool_call>"},
};

bool is_xtml(const HasToken& has_token) {
  return has_token("<|open|>") && has_token("<|close|>") && has_token("<|sep|>") && has_token("<|end_of_msg|>");
}

std::string_view parser_of_template(std::string_view chat_template) {
  const auto has = [&](std::string_view text) { return chat_template.find(text) != std::string_view::npos; };
  if (has("<minimax:tool_call>")) return "minimax_m2";
  if (has("<|tool_call>") && has("<tool_call|>")) return "gemma4";
  if (has("<start_function_call>")) return "function_gemma";
  if (has("<longcat_tool_call>")) return "longcat";
  if (has("<arg_key>")) return "glm47";
  if (has("<|tool_list_start|>") || has("<|tool_call_start|>")) return "pythonic";
  if (has("<tool_call>\\n<function=") || has("<tool_call>\n<function=")) return "qwen3_coder";
  if (has("<|tool_calls_section_begin|>")) return "kimi_k2";
  if (has("<function name=\"") && has("<param name=\"")) return "minicpm5";
  if (has("[TOOL_CALLS]")) return "mistral";
  if (has("<atem:function_calls>")) return "muse_spark";
  if (has("<tool_call>") && has("tool_call.name")) return "json_tools";
  return {};
}

}  // namespace

ThinkingMarkers infer_thinking(const HasToken& has_token) {
  for (const auto& [start, end] : kThinkTokens)
    if (has_token(start) && has_token(end)) return {std::string(start), std::string(end)};
  if (has_token("<|channel>") && has_token("<channel|>")) return {"<|channel>thought", "<channel|>"};
  if (is_xtml(has_token)) return {"<|open|>think<|sep|>", "<|close|>think<|sep|>"};
  return {};
}

ToolMarkers infer_tools(std::string_view chat_template, const HasToken& has_token) {
  if (const auto parser = parser_of_template(chat_template); !parser.empty()) return tool_markers(parser);
  if (is_xtml(has_token)) return tool_markers("kimi_k3");
  if (has_token("<|tool_call_start|>") && has_token("<|tool_call_end|>")) return tool_markers("pythonic");
  return {};
}

ToolMarkers tool_markers(std::string_view parser) {
  for (const auto& format : kToolFormats)
    if (format.parser == parser) return {std::string(format.parser), std::string(format.start), std::string(format.end)};
  throw Error(Code::unsupported, "tool_parser_type", "got '" + std::string(parser) + "', which is no known tool parser");
}

}  // namespace mlxlm::text
