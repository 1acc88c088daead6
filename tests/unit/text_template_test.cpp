// Chat templates: the cases of tests/cases/templates, sources of a folder, continue_final_message, contents.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/files.h"
#include "text/chat_template.h"

namespace {

using namespace mlxlm;
using namespace mlxlm::text;
namespace fs = std::filesystem;

struct Case {
  std::string source, expected;
  json context;
};

Case read_case(const fs::path& path) {
  const std::string text = read_text_file(path), first = "=== template\n", second = "\n=== context\n", third = "\n=== expected\n";
  const auto a = text.find(second), b = text.find(third);
  EXPECT_TRUE(text.starts_with(first) && a != std::string::npos && b != std::string::npos && text.ends_with('\n')) << path;
  const auto context = text.substr(a + second.size(), b - a - second.size()), expected = text.substr(b + third.size());
  return {text.substr(first.size(), a - first.size()), expected.substr(0, expected.size() - 1), parse_json(context, path.string())};
}

std::string error_of(const std::function<void()>& body, Code wanted) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), wanted) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  ADD_FAILURE() << "no error";
  return {};
}

ChatTemplates templates(const std::string& source) {
  ChatTemplates out;
  out.set(json(source));
  return out;
}

const json kHello = json::array({{{"role", "user"}, {"content", "Hi"}}});

TEST(ChatTemplate, CasesRenderAsTransformersDoes) {
  int count = 0;
  for (const auto& entry : fs::directory_iterator(fs::path(MLXLM_TEST_DATA) / "../cases/templates")) {
    if (entry.path().extension() != ".txt") continue;
    SCOPED_TRACE(entry.path().filename().string());
    const Case c = read_case(entry.path());
    ++count;
    if (c.context.contains("_raises")) {
      const auto message = error_of([&] { JinjaTemplate(c.source).render(c.context); }, Code::bad_template);
      EXPECT_NE(message.find(c.context["_raises"].get<std::string>()), std::string::npos) << message;
    } else {
      EXPECT_EQ(JinjaTemplate(c.source).render(c.context), c.expected);
    }
  }
  EXPECT_GE(count, 15);
}

TEST(ChatTemplate, RaisedMessageIsTheTemplatesOwn) {
  EXPECT_EQ(error_of([] { JinjaTemplate("{{ raise_exception('no\\nsystem') }}").render(json::object()); }, Code::bad_template),
            "chat template: no system");
}

TEST(ChatTemplate, StrftimeNow) {
  const std::string year = JinjaTemplate("{{ strftime_now('%Y') }}").render(json::object());
  EXPECT_EQ(year.size(), 4u);
  EXPECT_GE(std::stoi(year), 2024);
}

TEST(ChatTemplate, NamedTemplates) {
  ChatTemplates t;
  t.set(json::array({{{"name", "default"}, {"template", "plain"}}, {{"name", "tool_use"}, {"template", "tools"}}}));
  EXPECT_EQ(t.render({.messages = kHello}), "plain");
  EXPECT_EQ(t.render({.messages = kHello, .tools = json::array({json::object()})}), "tools");
  EXPECT_EQ(t.default_source(), "plain");
  error_of([&] { t.set(json(3)); }, Code::bad_config);
  error_of([&] { t.set(json::array({1})); }, Code::bad_config);
  error_of([&] { ChatTemplates().render({.messages = kHello}); }, Code::bad_template);
}

TEST(ChatTemplate, FolderOrder) {
  const fs::path folder = fs::path(::testing::TempDir()) / "mlxlm_text_template_order";
  fs::remove_all(folder);
  fs::create_directories(folder);
  const json config = {{"chat_template", "config"}};
  std::ofstream(folder / "chat_template.json") << R"({"chat_template": "file"})";
  EXPECT_EQ(ChatTemplates::from_folder(folder, json::object()).default_source(), "file");
  EXPECT_EQ(ChatTemplates::from_folder(folder, config).default_source(), "config");
  std::ofstream(folder / "chat_template.jinja") << "jinja";
  EXPECT_EQ(ChatTemplates::from_folder(folder, config).default_source(), "jinja");
  fs::remove_all(folder);
}

TEST(ChatTemplate, ContinueFinalMessage) {
  const json chat = json::array({{{"role", "user"}, {"content", "Hi"}}, {{"role", "assistant"}, {"content", "Sure: "}}});
  const auto plain = templates("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}");
  EXPECT_EQ(plain.render({.messages = chat, .continue_final_message = true}), "<user>Hi</><assistant>Sure: ");
  const auto trimming = templates("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}");
  EXPECT_EQ(trimming.render({.messages = chat, .continue_final_message = true}), "<user>Hi</><assistant>Sure:");
  const auto dropping = templates("{{ messages[0].content }}");
  error_of([&] { dropping.render({.messages = chat, .continue_final_message = true}); }, Code::bad_request);
  error_of([&] { plain.render({.messages = json::array(), .continue_final_message = true}); }, Code::bad_request);
}

TEST(ChatTemplate, Contents) {
  const auto t = templates("{% for m in messages %}{{ m.content }}{% endfor %}");
  const auto of = [](json content) { return json::array({{{"role", "user"}, {"content", std::move(content)}}}); };
  const json parts = json::array({{{"type", "text"}, {"text", "a"}}, {{"type", "text"}, {"text", "b"}}});
  EXPECT_EQ(t.render({.messages = of(parts)}), "ab");
  EXPECT_EQ(t.render({.messages = of(nullptr)}), "None");
  error_of([&] { t.render({.messages = of(json::array({{{"type", "image_url"}}}))}); }, Code::unsupported);
  error_of([&] { t.render({.messages = of(json::array({{{"type", "text"}}}))}); }, Code::bad_request);
  error_of([&] { t.render({.messages = of(json::array({3}))}); }, Code::bad_request);
  error_of([&] { t.render({.messages = json("x")}); }, Code::bad_request);
  error_of([&] { t.render({.messages = json::array({"x"})}); }, Code::bad_request);
}

}  // namespace
