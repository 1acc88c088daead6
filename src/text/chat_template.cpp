// Chat templates by transformers' rules. Reference: transformers/utils/chat_template_utils.py, mlx_lm/server.py (contents joined)
#include "text/chat_template.h"

#include <array>
#include <string_view>

#include "base/files.h"
#include "base/text_util.h"

namespace mlxlm::text {
namespace {

constexpr std::string_view kTag = "CONTINUE_FINAL_MESSAGE_TAG";
constexpr std::string_view kPythonSpace = " \t\n\r\v\f";

/** Content parts joined to the string that templates of text models expect. */
json joined_content(const json& content) {
  if (!content.is_array()) return content;
  std::string out;
  for (const auto& part : content) {
    if (part.is_string()) {
      out += part.get_ref<const std::string&>();
      continue;
    }
    const std::string type = part.is_object() && part.contains("type") && part["type"].is_string() ? part["type"].get<std::string>() : "";
    if (type.find("image") != std::string::npos || type.find("audio") != std::string::npos || type.find("video") != std::string::npos)
      throw Error(Code::unsupported, "messages", "got a content part of type '" + type + "': image given to a text model");
    if (type != "text" || !part.contains("text") || !part["text"].is_string())
      throw Error(Code::bad_request, "messages", "got a content part of type '" + type + "', wanted {\"type\": \"text\", \"text\": ...}");
    out += part["text"].get_ref<const std::string&>();
  }
  return out;
}

json checked_messages(const json& messages) {
  if (!messages.is_array()) throw Error(Code::bad_request, "messages", "wanted a list");
  json out = json::array();
  for (const auto& message : messages) {
    if (!message.is_object()) throw Error(Code::bad_request, "messages", "wanted a list of objects with \"role\" and \"content\"");
    json copy = message;
    if (copy.contains("content")) copy["content"] = joined_content(copy["content"]);
    out.push_back(std::move(copy));
  }
  return out;
}

std::string stripped(std::string_view text) {
  const auto first = text.find_first_not_of(kPythonSpace);
  if (first == std::string_view::npos) return {};
  return std::string(text.substr(first, text.find_last_not_of(kPythonSpace) - first + 1));
}

/** Marks the end of the last message's content; returns the content. */
std::string mark_final_message(json& messages) {
  if (messages.empty()) throw Error(Code::bad_request, "continue_final_message", "there is no message to continue");
  json& last = messages.back();
  if (!last.contains("content") || !last["content"].is_string())
    throw Error(Code::bad_request, "continue_final_message", "the final message has no text to continue");
  const std::string content = last["content"].get<std::string>();
  last["content"] = content + std::string(kTag) + " ";
  return content;
}

std::string cut_at_final_message(const std::string& rendered, const std::string& content) {
  const auto at = rendered.rfind(kTag);
  if (at == std::string::npos || rendered.find(stripped(content)) == std::string::npos)
    throw Error(Code::bad_request, "continue_final_message", "the final message does not appear in the chat that the template made");
  std::string out = rendered.substr(0, at);
  // A template that trims the message also trimmed the tag's space: then the text's own trailing space goes too.
  if (rendered.compare(at + kTag.size(), 1, " ") != 0) out.resize(out.find_last_not_of(kPythonSpace) + 1);
  return out;
}

}  // namespace

ChatTemplates ChatTemplates::from_folder(const std::filesystem::path& folder, const json& tokenizer_config) {
  namespace fs = std::filesystem;
  ChatTemplates out;
  if (fs::exists(folder / "chat_template.jinja")) {
    out.sources_["default"] = read_text_file(folder / "chat_template.jinja");
  } else if (tokenizer_config.contains("chat_template") && !tokenizer_config["chat_template"].is_null()) {
    out.set(tokenizer_config["chat_template"]);
  } else if (fs::exists(folder / "chat_template.json")) {
    const json file = read_json_file(folder / "chat_template.json");
    if (file.is_object() && file.contains("chat_template")) out.set(file["chat_template"]);
  }
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(folder / "additional_chat_templates", none))
    if (entry.path().extension() == ".jinja") out.sources_[entry.path().stem().string()] = read_text_file(entry.path());
  return out;
}

void ChatTemplates::set(const json& value) {
  if (value.is_string()) {
    sources_["default"] = value.get<std::string>();
    return;
  }
  const auto wrong = [] { return Error(Code::bad_config, "chat_template", "wanted a string or a list of {\"name\", \"template\"}"); };
  if (!value.is_array()) throw wrong();
  for (const auto& item : value) {
    if (!item.is_object() || !item.contains("name") || !item.contains("template") || !item["name"].is_string() ||
        !item["template"].is_string())
      throw wrong();
    sources_[item["name"].get<std::string>()] = item["template"].get<std::string>();
  }
}

std::string ChatTemplates::default_source() const {
  const auto found = sources_.find("default");
  return found == sources_.end() ? std::string() : found->second;
}

const std::string& ChatTemplates::choose(bool with_tools) const {
  if (sources_.empty()) throw Error(Code::bad_template, "chat template", "the model has none");
  if (const auto found = sources_.find("tool_use"); with_tools && found != sources_.end()) return found->second;
  if (const auto found = sources_.find("default"); found != sources_.end()) return found->second;
  if (sources_.size() == 1) return sources_.begin()->second;
  std::vector<std::string> names;
  for (const auto& [name, source] : sources_) names.push_back(name);
  throw Error(Code::bad_template, "chat template", "the model has several and none is named default: " + join(names));
}

std::string ChatTemplates::render(const ChatRequest& request) const {
  const bool with_tools = request.tools.is_array();
  json context = request.variables.is_object() ? request.variables : json::object();
  json messages = checked_messages(request.messages);
  std::string final_content;
  if (request.continue_final_message) final_content = mark_final_message(messages);
  context["messages"] = std::move(messages);
  context["tools"] = with_tools ? request.tools : json(nullptr);
  if (!context.contains("documents")) context["documents"] = nullptr;
  context["add_generation_prompt"] = request.add_generation_prompt && !request.continue_final_message;
  const std::string rendered = JinjaTemplate(choose(with_tools)).render(context);
  return request.continue_final_message ? cut_at_final_message(rendered, final_content) : rendered;
}

}  // namespace mlxlm::text
