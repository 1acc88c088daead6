// Renders the whole conversation each turn; the model sees only what the caches do not hold yet.
// mlx_lm instead feeds each message alone into one cache, repeating the system prompt (mlx_lm/chat.py main).
#include "cli/conversation.h"

#include <algorithm>
#include <climits>

#include <fmt/format.h>
#include <mlx/memory.h>

#include "base/error.h"
#include "gen/memory.h"

namespace mlxlm::cli {

namespace {

/** A message of a file, or why it is none. */
json checked_message(const json& value, std::size_t index) {
  const auto fail = [&](const char* what) { throw Error(Code::bad_request, fmt::format("message {}", index), what); };
  if (!value.is_object()) fail("wanted an object with role and content");
  const auto role = value.find("role"), content = value.find("content");
  if (role == value.end() || !role->is_string()) fail("has no role, wanted system, user or assistant");
  if (content == value.end() || !content->is_string()) fail("has no content, wanted a text");
  const auto& name = role->get_ref<const std::string&>();
  if (name != "system" && name != "user" && name != "assistant") fail("has an unknown role, wanted system, user or assistant");
  if (name == "system" && index > 0) fail("is a system message, wanted that only as the first");
  return {{"role", name}, {"content", *content}};
}

}  // namespace

Conversation::Conversation(Session& session, gen::Options options, json variables)
    : session_(session), options_(std::move(options)), variables_(std::move(variables)) {
  if (!session.tokenizer.has_chat_template()) {
    throw Error(Code::unsupported, "chat",
                "the model has no chat template; wanted one that was made for conversations, or mlx-lm generate");
  }
}

std::vector<int> Conversation::render(bool for_answer) const {
  text::TemplateOptions options;
  options.add_generation_prompt = for_answer;
  options.extra = variables_;
  return session_.tokenizer.encode(session_.tokenizer.apply_chat_template(to_json(), options), false);
}

void Conversation::drop_caches() {
  caches_.clear();
  held_.clear();
}

std::size_t Conversation::keep_snapshot(const std::vector<int>& prompt) {
  drop_caches();
  for (auto s = snapshots_.rbegin(); s != snapshots_.rend(); ++s) {
    if (s->tokens.size() >= prompt.size() || !std::equal(s->tokens.begin(), s->tokens.end(), prompt.begin())) continue;
    for (const auto& c : s->caches) caches_.push_back(c ? c->copy() : nullptr);
    held_ = s->tokens;
    break;
  }
  return held_.size();
}

int Conversation::snapshot_point(const std::vector<int>& prompt) const {
  const int64_t answer = options_.max_tokens < 0 ? INT_MAX / 2 : options_.max_tokens;
  const auto to_come = static_cast<int>(std::min<int64_t>(INT_MAX / 2, static_cast<int64_t>(prompt.size() - held_.size()) + answer));
  const auto goes_back = [&](const cache::CachePtr& c) { return !c || c->can_rewind(to_come, false); };
  if (std::ranges::all_of(caches_, goes_back)) return 0;
  const auto messages = render(false);
  return static_cast<int>(std::ranges::mismatch(messages, prompt).in2 - prompt.begin());
}

bool Conversation::has_room_for_snapshot(int64_t prompt_tokens, int64_t tokens) {
  const auto& model = *session_.loaded.model;
  const auto fits = [&](int64_t bytes) {
    const auto free = gen::available_bytes();
    return !free || bytes <= *free;
  };
  const auto needed = gen::prompt_bytes(model, prompt_tokens, options_, caches_);
  if (!snapshots_.empty() && !fits(needed)) {
    snapshots_.clear();
    mlx::core::clear_cache();
  }
  return fits(needed + gen::prompt_bytes(model, tokens, options_, {}));
}

void Conversation::take_snapshot() {
  constexpr std::size_t most = 2;  // one to go on from, and one if the last message is taken back
  if (snapshots_.size() == most) snapshots_.erase(snapshots_.begin());
  Snapshot s{held_, {}};
  for (const auto& c : caches_) s.caches.push_back(c ? c->copy() : nullptr);
  snapshots_.push_back(std::move(s));
}

std::size_t Conversation::keep_common_prefix(const std::vector<int>& prompt) {
  const auto most = std::min(held_.size(), prompt.empty() ? 0 : prompt.size() - 1);
  const auto common = static_cast<std::size_t>(
      std::mismatch(held_.begin(), held_.begin() + static_cast<std::ptrdiff_t>(most), prompt.begin()).first - held_.begin());
  const auto surplus = static_cast<int>(held_.size() - common);
  const auto fits = [&](const cache::CachePtr& c) { return !c || surplus == 0 || c->trimmable(); };
  if (!std::ranges::all_of(caches_, fits)) return keep_snapshot(prompt);
  for (const auto& c : caches_) {
    if (!c || surplus == 0) continue;
    if (c->trim(surplus) != surplus) return keep_snapshot(prompt);
  }
  held_.resize(common);
  return common;
}

Conversation::Turn Conversation::answer(const std::string& message, const std::function<void(const std::string& text)>& on_text) {
  messages_.push_back({{"role", "user"}, {"content", message}});
  try {
    const auto prompt = render();
    const auto reused = keep_common_prefix(prompt);
    if (caches_.empty()) caches_ = cache::make_caches(session_.loaded.model->description(), options_.max_kv_size_tokens);
    const int point = snapshot_point(prompt);
    const bool keeps = has_room_for_snapshot(static_cast<int64_t>(prompt.size() - reused), point);
    const int boundary = keeps ? point - static_cast<int>(reused) : 0;
    const std::vector<int> rest(prompt.begin() + static_cast<std::ptrdiff_t>(reused), prompt.end());
    std::string text;
    auto options = options_;
    options.context = held_;
    options.draft_memory = &drafts_;
    options.prefill_boundary = std::max(0, boundary);
    if (options.sampler.seed) *options.sampler.seed += turns_;  // each turn draws other numbers
    ++turns_;
    options.on_prefill = [&](int processed, int total) {
      held_.resize(reused);
      held_.insert(held_.end(), rest.begin(), rest.begin() + processed);
      if (boundary > 0 && processed == boundary) take_snapshot();
      if (options_.on_prefill) options_.on_prefill(processed, total);
    };
    const auto on_response = [&](const gen::Response& r) {
      if (r.generation_tokens > 0) held_.push_back(r.token);
      text += r.text;
      if (!r.text.empty()) on_text(r.text);
      return true;
    };
    const auto last = gen::stream_generate(*session_.loaded.model, session_.tokenizer, rest, options, on_response, &caches_);
    if (text.empty() && last.finish == gen::Finish::cancelled) {
      messages_.erase(messages_.size() - 1);
    } else {
      messages_.push_back({{"role", "assistant"}, {"content", text}});
    }
    return {last, static_cast<int>(reused)};
  } catch (...) {
    messages_.erase(messages_.size() - 1);
    drop_caches();
    snapshots_.clear();
    throw;
  }
}

json Conversation::to_json() const {
  json all = json::array();
  if (system_) all.push_back({{"role", "system"}, {"content", *system_}});
  for (const auto& m : messages_) all.push_back(m);
  return all;
}

void Conversation::from_json(const json& value) {
  const json* list = &value;
  if (value.is_object() && value.contains("messages")) list = &value["messages"];
  if (!list->is_array()) throw Error(Code::bad_request, "conversation", "wanted a list of messages");
  std::optional<std::string> system;
  json messages = json::array();
  for (std::size_t i = 0; i < list->size(); ++i) {
    auto m = checked_message((*list)[i], i);
    if (m["role"] == "system") {
      system = m["content"].get<std::string>();
    } else {
      messages.push_back(std::move(m));
    }
  }
  std::swap(system_, system);
  std::swap(messages_, messages);
  try {
    messages_.push_back({{"role", "user"}, {"content", "?"}});  // would the template take a next message?
    render();
    messages_.erase(messages_.size() - 1);
  } catch (...) {
    std::swap(system_, system);
    std::swap(messages_, messages);
    throw;
  }
}

}  // namespace mlxlm::cli
