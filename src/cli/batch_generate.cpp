// mlx-lm batch_generate: a file of prompts, one JSON object a line, answered together. Reference: mlx_lm/generate.py batch_generate
#include <charconv>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <limits>
#include <optional>

#include <fmt/format.h>

#include "api/session.h"
#include "base/error.h"
#include "base/utf8.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "gen/batch.h"

namespace mlxlm::cli {

namespace {

struct Arguments {
  std::string model, adapter_path, prompts, chat_template_config, prefix_cache_dir, prefix_cache_bytes = "4G";
  std::vector<std::string> extra_eos, stop;
  std::optional<std::string> system_prompt;
  bool trust_remote_code = false, ignore_chat_template = false, strict = false, logprobs = false, quiet = false;
  int max_tokens = 100, prefill_step_size = 512, batch_size = 32, threads = 0;
  engine::Sampling sampling;
  CacheFlags cache;
  DraftFlags drafts;
  std::optional<int64_t> seed;
};

/** A line of the file: an item, or what is wrong with it. */
struct Line {
  int64_t number = 0;
  json id;  // the line's own "id", null if none
  gen::BatchItem item;
  std::string text;  // of "prompt"
  json messages;     // or "messages"
  std::optional<Error> error;
};

template <typename T>
void read_number(const json& line, const char* key, T& value, double least, double most) {
  const auto at = line.find(key);
  if (at == line.end() || at->is_null()) return;
  const bool whole = std::is_integral_v<T>;
  if (!(whole ? at->is_number_integer() : at->is_number())) {
    throw Error(Code::bad_request, key, fmt::format("got {}, wanted {}", to_text(*at), whole ? "a whole number" : "a number"));
  }
  const double got = at->get<double>();
  if (!(got >= least && got <= most))
    throw Error(Code::bad_request, key, fmt::format("got {}, wanted {} to {}", to_text(*at), least, most));
  value = at->get<T>();
}

void read_stop(const json& line, std::vector<std::string>& stop) {
  const auto at = line.find("stop");
  if (at == line.end() || at->is_null()) return;
  stop.clear();
  for (const auto& one : at->is_array() ? *at : json::array({*at})) {
    if (!one.is_string()) throw Error(Code::bad_request, "stop", "wanted a text or a list of texts");
    stop.push_back(one.get<std::string>());
  }
}

void read_logit_bias(const json& line, std::map<int, float>& bias) {
  const auto at = line.find("logit_bias");
  if (at == line.end() || at->is_null()) return;
  if (!at->is_object()) throw Error(Code::bad_request, "logit_bias", "wanted an object of numbers by token");
  for (const auto& [key, value] : at->items()) {
    char* end = nullptr;
    const long token = std::strtol(key.c_str(), &end, 10);
    if (key.empty() || *end != 0 || token < 0 || token > std::numeric_limits<int>::max() || !value.is_number()) {
      throw Error(Code::bad_request, "logit_bias", fmt::format("got '{}': {}, wanted a token's number and a number", key, to_text(value)));
    }
    bias[static_cast<int>(token)] = value.get<float>();
  }
}

void read_fields(const json& line, gen::BatchItem& item) {
  constexpr double big = std::numeric_limits<int>::max(), huge = std::numeric_limits<float>::max();
  auto& s = item.sampling;
  read_number(line, "max_tokens", item.max_tokens, -1, big);
  read_number(line, "max_kv_size", item.max_kv_size_tokens, 0, big);
  read_number(line, "kv_bits", item.kv_quantization.bits, 0, 8);
  read_number(line, "kv_group_size", item.kv_quantization.group_size, 1, big);
  read_number(line, "quantized_kv_start", item.kv_quantization.start_tokens, 0, big);
  read_number(line, "num_draft_tokens", item.drafts.model_tokens, 0, engine::Drafts::most_tokens);
  read_number(line, "ngram_draft_tokens", item.drafts.ngram_tokens, 0, engine::Drafts::most_tokens);
  read_number(line, "temp", s.temperature, 0, huge);
  read_number(line, "temperature", s.temperature, 0, huge);
  read_number(line, "top_p", s.top_p, 0, 1);
  read_number(line, "min_p", s.min_p, 0, 1);
  read_number(line, "top_k", s.top_k, 0, big);
  read_number(line, "min_tokens_to_keep", s.min_tokens_to_keep, 1, big);
  read_number(line, "xtc_probability", s.xtc_probability, 0, 1);
  read_number(line, "xtc_threshold", s.xtc_threshold, 0, 0.5);
  read_number(line, "repetition_penalty", s.repetition_penalty, 0, huge);
  read_number(line, "repetition_context_size", s.repetition_context_size, 0, big);
  read_number(line, "presence_penalty", s.presence_penalty, -huge, huge);
  read_number(line, "presence_context_size", s.presence_context_size, 0, big);
  read_number(line, "frequency_penalty", s.frequency_penalty, -huge, huge);
  read_number(line, "frequency_context_size", s.frequency_context_size, 0, big);
  if (line.contains("seed") && !line.at("seed").is_null()) {
    int64_t seed = 0;
    read_number(line, "seed", seed, 0, 9e15);
    s.seed = static_cast<uint64_t>(seed);
  }
  read_stop(line, item.stop);
  read_logit_bias(line, s.logit_bias);
}

/** What every template takes for granted. */
json checked_messages(const json& messages) {
  if (!messages.is_array() || messages.empty()) throw Error(Code::bad_request, "messages", "wanted a list of messages");
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const auto& message = messages[i];
    const auto where = fmt::format("message {}", i + 1);
    if (!message.is_object()) {
      throw Error(Code::bad_request, where, fmt::format("got a JSON {}, wanted an object with role and content", message.type_name()));
    }
    const auto role = message.find("role");
    if (role == message.end()) throw Error(Code::bad_request, where, "has no role, wanted a text such as \"user\"");
    if (!role->is_string()) {
      throw Error(Code::bad_request, where, fmt::format("got a JSON {} as its role, wanted a text such as \"user\"", role->type_name()));
    }
  }
  return messages;
}

void parse_line(const std::string& text, const gen::BatchItem& defaults, Line& line) {
  const json value = parse_json(text, "JSON");
  if (!value.is_object()) throw Error(Code::bad_request, "JSON", "wanted an object");
  line.id = value.value("id", json());
  line.item = defaults;
  const bool prompt = value.contains("prompt"), messages = value.contains("messages");
  if (prompt == messages) throw Error(Code::bad_request, "prompt", "wanted either \"prompt\" or \"messages\"");
  if (prompt) {
    if (!value.at("prompt").is_string()) throw Error(Code::bad_request, "prompt", "wanted a text");
    line.text = value.at("prompt").get<std::string>();
  } else {
    line.messages = checked_messages(value.at("messages"));
  }
  read_fields(value, line.item);
}

/** One entry a line that is not blank. */
std::vector<Line> read_lines(std::istream& in, const std::string& name, const gen::BatchItem& defaults) {
  std::vector<Line> lines;
  std::string text;
  for (int64_t number = 1; std::getline(in, text); ++number) {
    if (number == 1 && text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);
    if (text.find_first_not_of(" \t\r") == std::string::npos) continue;
    auto& line = lines.emplace_back();
    line.number = number;
    try {
      parse_line(text, defaults, line);
    } catch (const Error& e) {
      std::string what = e.what();
      if (const auto at = what.find("at line 1, "); at != std::string::npos) what.erase(at + 3, 8);  // it is one line, and not the first
      line.error = Error(Code::bad_request, what);
    }
  }
  if (in.bad()) throw Error(Code::io, name, "could not be read");
  return lines;
}

std::vector<int> tokens_of(const Line& line, const Arguments& a, const text::Tokenizer& tokenizer, const json& variables) {
  std::vector<int> tokens;
  if (line.messages.is_null() && (a.ignore_chat_template || !tokenizer.has_chat_template())) {
    tokens = tokenizer.encode(line.text, true);
  } else {
    json messages = line.messages;
    if (messages.is_null()) {
      messages = json::array({{{"role", "user"}, {"content", line.text}}});
      if (line.text.empty() && !a.system_prompt) throw Error(Code::bad_request, "prompt", "got an empty text, wanted a message");
    }
    if (a.system_prompt && messages.front()["role"] != "system") {
      messages.insert(messages.begin(), json{{"role", "system"}, {"content", *a.system_prompt}});
    }
    text::TemplateOptions options;
    options.extra = variables;
    tokens = tokenizer.encode(tokenizer.apply_chat_template(messages, options), false);
  }
  if (tokens.empty()) throw Error(Code::bad_request, "prompt", "got an empty text, wanted at least one token");
  return tokens;
}

json to_json(const Line& line, const gen::BatchAnswer& answer) {
  json result{{"line", line.number}};
  if (!line.id.is_null()) result["id"] = line.id;
  if (answer.error) {
    result["error"] = {{"code", std::string(code_name(answer.error->code()))}, {"message", answer.error->what()}};
    return result;
  }
  result["text"] = to_valid_utf8(answer.text);
  result["tokens"] = answer.tokens;
  if (line.item.sampling.want_logprob) result["logprobs"] = answer.logprobs;
  result["finish_reason"] = gen::finish_name(answer.finish);
  result["prompt_tokens"] = answer.prompt_tokens;
  result["generation_tokens"] = answer.generation_tokens;
  return result;
}

/** Prints results as they come, each when all before it are printed. */
class Printer {
 public:
  explicit Printer(const std::vector<Line>& lines) : lines_(lines), results_(lines.size()) {}
  void take(std::size_t index, const gen::BatchAnswer& answer) {
    if (answer.error) {
      ++failed_;
      fmt::print(stderr, "mlx-lm: line {}: {}\n", lines_[index].number, answer.error->what());
    }
    ++done_;
    results_[index] = answer.finish == gen::Finish::cancelled ? std::string() : to_text(to_json(lines_[index], answer)) + "\n";
    cancelled_ += answer.finish == gen::Finish::cancelled;
    for (; next_ < results_.size() && results_[next_]; ++next_) {
      std::fwrite(results_[next_]->data(), 1, results_[next_]->size(), stdout);
      results_[next_]->clear();
    }
    if (std::fflush(stdout) != 0) throw Error(Code::io, "stdout", "could not be written");
  }
  std::size_t done() const { return done_; }
  int failed() const { return failed_; }
  int cancelled() const { return cancelled_; }

 private:
  const std::vector<Line>& lines_;
  std::vector<std::optional<std::string>> results_;
  std::size_t next_ = 0, done_ = 0;
  int failed_ = 0, cancelled_ = 0;
};

std::string bar(std::size_t done, std::size_t total, const gen::BatchGenerator::Stats& s) {
  constexpr std::size_t width = 24;
  const auto filled = total == 0 ? width : done * width / total;
  return fmt::format("[{}{}] {} of {} prompts, {} tokens, {:.1f} tokens-per-sec", std::string(filled, '#'),
                     std::string(width - filled, '.'), done, total, s.generation_tokens, s.generation_tps());
}

gen::BatchItem to_defaults(const Arguments& a) {
  gen::BatchItem item{
      .max_tokens = a.max_tokens, .sampling = a.sampling, .stop = a.stop, .max_kv_size_tokens = a.cache.max_kv_size_tokens()};
  if (a.seed) {
    if (*a.seed < 0) throw Error(Code::bad_request, "seed", fmt::format("got {}, wanted 0 or more", *a.seed));
    item.sampling.seed = static_cast<uint64_t>(*a.seed);
  }
  check_max_tokens(a.max_tokens);
  item.kv_quantization = a.cache.quantization();
  item.drafts = {.ngram_tokens = a.drafts.ngram_tokens, .model_tokens = a.drafts.model.empty() ? 0 : a.drafts.num_tokens};
  engine::check(item.drafts);
  item.sampling.want_logprob = a.logprobs;
  sample::check(gen::sampler_options(item.sampling));
  sample::check(gen::processor_options(item.sampling));
  return item;
}

std::vector<Line> read_input(const Arguments& a, const gen::BatchItem& defaults) {
  std::vector<Line> lines;
  if (a.prompts == "-") {
    lines = read_lines(std::cin, "stdin", defaults);
  } else {
    std::ifstream file(a.prompts, std::ios::binary);
    if (!file) throw Error(Code::not_found, a.prompts, "could not be opened");
    lines = read_lines(file, a.prompts, defaults);
  }
  return lines;
}

/** The first broken line ends everything. */
void be_strict(const std::vector<Line>& lines) {
  for (const auto& line : lines) {
    if (line.error) throw Error(line.error->code(), fmt::format("line {}", line.number), line.error->what());
  }
}

void encode(std::vector<Line>& lines, const Arguments& a, const text::Tokenizer& tokenizer) {
  const auto variables = template_variables(a.chat_template_config);
  const auto special = xtc_special_tokens(tokenizer);
  for (auto& line : lines) {
    if (line.error) continue;
    try {
      line.item.prompt = tokens_of(line, a, tokenizer, variables);
      if (line.item.sampling.xtc_probability > 0) line.item.sampling.xtc_special_tokens = special;
    } catch (const Error& e) {
      line.error = e;
    } catch (const std::exception& e) {
      line.error = Error(Code::internal, "prompt", e.what());
    }
  }
}

/** "4G" and the like. */
int64_t to_bytes(const std::string& text) {
  int64_t value = 0;
  const char *begin = text.data(), *end = begin + text.size();
  const auto [at, error] = std::from_chars(begin, end, value);
  const std::string_view unit(at, static_cast<std::size_t>(end - at));
  const int shift = unit.empty() ? 0 : unit == "K" ? 10 : unit == "M" ? 20 : unit == "G" ? 30 : -1;
  if (error != std::errc() || value < 0 || shift < 0 || value > (int64_t{1} << 62 >> shift)) {
    throw Error(Code::bad_request, "--prefix-cache-bytes", fmt::format("got '{}', wanted a number of bytes, or one with K, M or G", text));
  }
  return value << shift;
}

/** Answers the good lines and returns the exit status. */
int answer(const std::vector<Line>& lines, const Arguments& a, Session& session, model::CausalModel* draft_model) {
  Printer printer(lines);
  std::vector<gen::BatchItem> items;
  std::vector<std::size_t> index_of;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    if (lines[i].error) {
      printer.take(i, {.error = lines[i].error});
    } else {
      items.push_back(lines[i].item);
      index_of.push_back(i);
    }
  }
  StatusLine status;
  const InterruptGuard guard;
  gen::BatchRun run{.limits = gen::default_limits(a.batch_size), .draft_model = draft_model, .cancel = &InterruptGuard::flag()};
  run.limits.prefill_tokens = a.prefill_step_size;
  run.prefixes = {a.prefix_cache_dir, to_bytes(a.prefix_cache_bytes), [&](const std::string& text) {
                    status.clear();
                    fmt::print(stderr, "warning: {}\n", text);
                  }};
  run.on_answer = [&](std::size_t i, const gen::BatchAnswer& result) {
    status.clear();
    printer.take(index_of[i], result);
  };
  run.on_step = [&](const auto& stats) {
    if (!a.quiet) status.show(bar(printer.done(), lines.size(), stats));
  };
  gen::BatchGenerator::Stats stats;
  gen::batch_generate(*session.loaded.model, session.tokenizer, items, run, &stats);
  status.clear();
  if (!a.quiet) {
    fmt::print(stderr, "Prompts: {} done, {} failed, {} not finished\n", printer.done() - printer.failed() - printer.cancelled(),
               printer.failed(), printer.cancelled());
    fmt::print(stderr, "Prompt: {} tokens\nGeneration: {} tokens, {:.3f} tokens-per-sec over all\n", stats.prompt_tokens,
               stats.generation_tokens, stats.generation_tps());
    if (stats.drafted_tokens > 0) {
      fmt::print(stderr, "Drafts: {} tokens, {} accepted ({:.1f} %)\n", stats.drafted_tokens, stats.accepted_tokens,
                 100.0 * static_cast<double>(stats.accepted_tokens) / static_cast<double>(stats.drafted_tokens));
    }
    fmt::print(stderr, "Peak memory: {:.3f} GB\n", stats.peak_memory_gb);
  }
  if (printer.cancelled() > 0) return exit_status(Code::cancelled);
  return printer.failed() > 0 ? 1 : 0;
}

int run(const Arguments& a) {
  check_at_least("--batch-size", a.batch_size, 1);
  check_at_least("--prefill-step-size", a.prefill_step_size, 1);
  to_bytes(a.prefix_cache_bytes);
  use_threads(a.threads);
  const auto defaults = to_defaults(a);
  auto lines = read_input(a, defaults);
  if (a.strict) be_strict(lines);
  const auto path = find_model(a.model);
  StatusLine line;
  line.show(fmt::format("Loading {}", path.string()));
  auto session = open_session(path, {.executor = model::Executor::best, .adapter = a.adapter_path, .quantize_activations = false});
  const auto draft = open_draft_model(a.drafts, session.tokenizer);
  cache::check_quantization(session.loaded.model->description(), defaults.kv_quantization);
  line.clear();
  for (const auto& token : a.extra_eos) session.tokenizer.add_eos_token(token);
  encode(lines, a, session.tokenizer);
  if (a.strict) be_strict(lines);
  return answer(lines, a, session, draft ? draft->loaded.model.get() : nullptr);
}

void add_answer(CLI::App& c, Arguments& a) {
  c.add_option("-m,--max-tokens", a.max_tokens, "Most tokens of an answer; -1 = no limit")->capture_default_str();
  add_sampling(c, a.sampling);
  c.add_option("--seed", a.seed, "Seed of each line that has none of its own; random when not given");
  c.add_option("--stop", a.stop, "Texts that end an answer");
}

}  // namespace

void add_batch_generate(CLI::App& app, Action& action) {
  auto a = std::make_shared<Arguments>();
  auto& c = *app.add_subcommand("batch_generate", "Answer a file of prompts, many at a time");
  add_model(c, a->model, a->trust_remote_code);
  c.add_option("--adapter-path", a->adapter_path, "Folder of a trained adapter");
  c.add_option("--prompts", a->prompts,
               "JSON lines, each {\"prompt\": text} or {\"messages\": [...]}; '-' reads stdin. A line may have an id and its own "
               "max_tokens, temp, top_p, min_p, top_k, seed, stop, penalties, logit_bias, max_kv_size, kv_bits, "
               "ngram_draft_tokens and so on")
      ->required();
  c.add_option("--extra-eos-token", a->extra_eos, "Tokens, or their ids, that also end an answer");
  c.add_option("--system-prompt", a->system_prompt, "System message for the chat template, where a line has none");
  add_answer(c, *a);
  c.add_flag("--logprobs", a->logprobs, "Also print the log-probability of each token");
  c.add_flag("--ignore-chat-template", a->ignore_chat_template, "Use each \"prompt\" as it is");
  c.add_option("--chat-template-config", a->chat_template_config, "JSON object of further variables for the chat template");
  add_max_kv_size(c, a->cache);
  add_kv_bits(c, a->cache);
  add_quantized_kv_start(c, a->cache);
  add_drafts(c, a->drafts);
  c.add_option("--prefill-step-size", a->prefill_step_size, "Prompt tokens processed at a time")->capture_default_str();
  c.add_option("--prefix-cache-dir", a->prefix_cache_dir, "Folder where beginnings of prompts are kept for later runs");
  c.add_option("--prefix-cache-bytes", a->prefix_cache_bytes, "Most bytes of that folder: a number, or one with K, M or G")
      ->capture_default_str();
  c.add_option("--batch-size", a->batch_size, "Most prompts answered at a time")->capture_default_str();
  add_threads(c, a->threads);
  c.add_flag("--strict", a->strict, "A broken line ends everything before the first answer");
  c.add_flag("--quiet", a->quiet, "No progress and no summary on stderr");
  c.footer("Example:\n  mlx-lm batch_generate --prompts questions.jsonl --max-tokens 200 > answers.jsonl");
  c.callback([a, &action] { action = [a] { return run(*a); }; });
}

}  // namespace mlxlm::cli
