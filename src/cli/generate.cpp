// mlx-lm generate: one prompt, one answer, streamed. Reference: mlx_lm/generate.py main
#include <cctype>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <optional>

#include <fmt/format.h>

#include "api/session.h"
#include "base/error.h"
#include "base/utf8.h"
#include "cache/prompt_file.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "gen/generate.h"
#include "gen/memory.h"
#include "gen/speculative.h"

namespace mlxlm::cli {

namespace {

/** The options as the command line spells them; defaults are the reference's. */
struct Arguments {
  std::string model, adapter_path, prompt = "hello", chat_template_config, verbose = "True", prompt_cache_file, cpu_precision = "default";
  std::vector<std::string> extra_eos, images, stop;
  std::optional<std::string> system_prompt, prefill_response;
  bool trust_remote_code = false, ignore_chat_template = false, default_chat_template = false, quantize_activations = false, json = false;
  int max_tokens = 100, prefill_step_size = 2048, threads = 0;
  sample::SamplerOptions sampler;
  CacheFlags cache;
  std::optional<int64_t> seed;
  DraftFlags drafts;
};

void refuse_unsupported(const Arguments& a) {
  const auto refuse = [](bool given, const char* option, const char* why = "not supported yet") {
    if (given) throw Error(Code::unsupported, option, why);
  };
  refuse(!a.images.empty(), "--image", "the model takes text only, wanted no images");
}

/** Reference: mlx_lm/generate.py str2bool */
bool is_true(std::string text) {
  for (auto& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text != "false" && text != "f";
}

std::string replace_all(std::string text, std::string_view from, std::string_view to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) text.replace(at, from.size(), to);
  return text;
}

/** The text of --prompt: "-" is stdin, otherwise \n and \t are escapes. */
std::string read_prompt(const std::string& argument) {
  if (argument != "-") return replace_all(replace_all(argument, "\\n", "\n"), "\\t", "\t");
  std::string text(std::istreambuf_iterator<char>(std::cin), {});
  if (std::cin.bad()) throw Error(Code::io, "stdin", "could not be read");
  return text;
}

/** The end of a templated prompt, from where the user's text begins: what comes before it is in the cache of --prompt-cache-file. */
std::string without_cached(const text::Tokenizer& tokenizer, const std::string& whole, json messages,
                           const text::TemplateOptions& options) {
  const std::string mark = "<query>";
  for (auto& message : messages) {
    if (message["role"] == "user") message["content"] = mark;
  }
  const auto at = tokenizer.apply_chat_template(messages, options).find(mark);
  if (at == std::string::npos || at > whole.size()) {
    throw Error(Code::bad_template, "chat template",
                "does not show the message as it is, which --prompt-cache-file needs; wanted --ignore-chat-template");
  }
  return whole.substr(at);
}

std::vector<int> prompt_tokens(const Arguments& a, const text::Tokenizer& tokenizer, const std::string& text, const json& variables) {
  std::vector<int> tokens;
  if (!a.ignore_chat_template && tokenizer.has_chat_template()) {
    if (text.empty() && !a.system_prompt && !a.prefill_response) {
      throw Error(Code::bad_request, "prompt", "got an empty text, wanted a message");
    }
    json messages = json::array();
    if (a.system_prompt) messages.push_back({{"role", "system"}, {"content", *a.system_prompt}});
    messages.push_back({{"role", "user"}, {"content", text}});
    if (a.prefill_response) messages.push_back({{"role", "assistant"}, {"content", *a.prefill_response}});
    text::TemplateOptions options;
    options.add_generation_prompt = !a.prefill_response;
    options.continue_final_message = a.prefill_response.has_value();
    options.extra = variables;
    auto whole = tokenizer.apply_chat_template(messages, options);
    if (!a.prompt_cache_file.empty()) whole = without_cached(tokenizer, whole, messages, options);
    tokens = tokenizer.encode(whole, false);
  } else {
    tokens = tokenizer.encode(text, true);
  }
  if (tokens.empty()) throw Error(Code::bad_request, "prompt", "got an empty text, wanted at least one token");
  return tokens;
}

/** The model that a prompt cache names, unless --model names it too. */
std::string model_of_cache(const Arguments& a, const cache::PromptMetadata& metadata) {
  const auto found = metadata.find("model");
  const std::string named = found == metadata.end() ? "" : found->second;
  if (a.model.empty() || named.empty() || a.model == named) return a.model.empty() ? named : a.model;
  std::error_code ignored;
  if (std::filesystem::equivalent(a.model, named, ignored)) return a.model;
  throw Error(Code::bad_request, "--model", fmt::format("got {}, but {} was made with {}", a.model, a.prompt_cache_file, named));
}

/** cache_prompt --eos-token. */
void add_cached_eos(text::Tokenizer& tokenizer, const cache::PromptMetadata& metadata) {
  const auto found = metadata.find("tokenizer_config");
  if (found == metadata.end()) return;
  const auto config = parse_json(found->second, "tokenizer_config of the prompt cache");
  if (config.is_object() && config.contains("eos_token") && config["eos_token"].is_string()) tokenizer.add_eos_token(config["eos_token"]);
}

/** The caches of --prompt-cache-file; none without it. */
cache::Caches open_caches(const Arguments& a, const arch::Model& model) {
  if (a.prompt_cache_file.empty()) return {};
  gen::check_available_for(a.prompt_cache_file, static_cast<int64_t>(std::filesystem::file_size(a.prompt_cache_file)));
  auto caches = cache::load_prompt_file(a.prompt_cache_file, model);
  cache::check_prompt_quantization(caches, a.cache.kv_bits.value_or(0), a.cache.kv_group_size.value_or(0));
  return caches;
}

/** What can be known before a model is loaded. */
gen::Options to_options(const Arguments& a) {
  gen::Options options;
  options.max_tokens = a.max_tokens;
  options.sampler = a.sampler;
  if (a.seed) {
    if (*a.seed < 0) throw Error(Code::bad_request, "seed", fmt::format("got {}, wanted 0 or more", *a.seed));
    options.sampler.seed = static_cast<uint64_t>(*a.seed);
  }
  sample::check(options.sampler);
  check_max_tokens(a.max_tokens);
  options.max_kv_size_tokens = a.cache.max_kv_size_tokens();
  check_at_least("prefill_step_size", a.prefill_step_size, 1);
  options.kv_quantization = a.cache.quantization();
  options.prefill_step_tokens = a.prefill_step_size;
  options.stop = a.stop;
  options.draft_tokens = a.drafts.num_tokens;
  options.ngram_draft_tokens = a.drafts.ngram_tokens;
  options.cancel = &InterruptGuard::flag();
  return options;
}

void print_json(const std::string& text, const std::vector<int>& tokens, const gen::Response& last, const std::string& model) {
  const json result{{"model", model},
                    {"text", to_valid_utf8(text)},
                    {"tokens", tokens},
                    {"finish_reason", gen::finish_name(last.finish)},
                    {"prompt_tokens", last.prompt_tokens},
                    {"prompt_tps", last.prompt_tokens_per_s},
                    {"generation_tokens", last.generation_tokens},
                    {"generation_tps", last.generation_tokens_per_s},
                    {"drafted_tokens", last.drafted_tokens},
                    {"accepted_tokens", last.accepted_tokens},
                    {"peak_memory_gb", last.peak_memory_gb}};
  fmt::print("{}\n", to_text(result));
}

void print_statistics(bool any_text, const gen::Response& last) {
  fmt::print("==========\n");
  if (!any_text) {
    fmt::print("No text generated for this prompt\n");
    if (last.finish != gen::Finish::cancelled) return;
  }
  fmt::print("Prompt: {} tokens, {:.3f} tokens-per-sec\n", last.prompt_tokens, last.prompt_tokens_per_s);
  fmt::print("Generation: {} tokens, {:.3f} tokens-per-sec\n", last.generation_tokens, last.generation_tokens_per_s);
  if (last.drafted_tokens > 0) {
    fmt::print("Drafts: {} tokens, {} accepted ({:.1f} %)\n", last.drafted_tokens, last.accepted_tokens,
               100.0 * last.accepted_tokens / last.drafted_tokens);
  }
  fmt::print("Peak memory: {:.3f} GB\n", last.peak_memory_gb);
}

int run(const Arguments& a) {
  refuse_unsupported(a);
  auto options = to_options(a);
  const auto variables = template_variables(a.chat_template_config);
  const auto text = read_prompt(a.prompt);
  use_threads(a.threads);

  set_cpu_precision(a.cpu_precision);
  cache::PromptMetadata cached;
  if (!a.prompt_cache_file.empty()) cached = cache::read_prompt_metadata(a.prompt_cache_file);
  const auto path = find_model(model_of_cache(a, cached));
  StatusLine line;
  line.show(fmt::format("Loading {}", path.string()));
  auto session =
      open_session(path, {.executor = model::Executor::best, .adapter = a.adapter_path, .quantize_activations = a.quantize_activations});
  const auto draft = open_draft_model(a.drafts, session.tokenizer);
  if (draft) options.draft_model = draft->loaded.model.get();
  line.clear();
  auto caches = open_caches(a, session.loaded.model->description());
  add_cached_eos(session.tokenizer, cached);
  for (const auto& token : a.extra_eos) session.tokenizer.add_eos_token(token);
  const auto prompt = prompt_tokens(a, session.tokenizer, text, variables);
  const auto& eos = session.tokenizer.eos_token_ids();
  if (a.sampler.xtc_probability > 0.f) options.sampler.xtc_special_tokens = xtc_special_tokens(session.tokenizer);
  options.on_prefill = show_prompt_on(line);

  const bool verbose = is_true(a.verbose) && !a.json;
  if (verbose) fmt::print("==========\n");
  std::fflush(stdout);
  std::string answer;
  std::vector<int> tokens;
  const InterruptGuard guard;
  const auto last = gen::stream_generate(
      *session.loaded.model, session.tokenizer, prompt, options,
      [&](const gen::Response& r) {
        answer += r.text;
        if (r.generation_tokens > 0 && !eos.contains(r.token)) tokens.push_back(r.token);
        if (!a.json && !r.text.empty()) {
          std::fwrite(r.text.data(), 1, r.text.size(), stdout);
          if (std::fflush(stdout) != 0) throw Error(Code::io, "stdout", "could not be written");
        }
        return true;
      },
      a.prompt_cache_file.empty() ? nullptr : &caches);
  line.clear();
  if (a.json) {
    print_json(answer, tokens, last, path.string());
  } else {
    fmt::print("\n");
    if (verbose) print_statistics(!answer.empty(), last);
  }
  return last.finish == gen::Finish::cancelled ? exit_status(Code::cancelled) : 0;
}

void add_answer(CLI::App& c, Arguments& a) {
  c.add_option("-m,--max-tokens", a.max_tokens, "Most tokens to generate; -1 = no limit")->capture_default_str();
  add_sampling(c, a.sampler);
  c.add_option("--seed", a.seed, "Seed of the sampler; random when not given");
  c.add_option("--stop", a.stop, "Texts that end the answer");
}

void add_cache(CLI::App& c, Arguments& a) {
  add_max_kv_size(c, a.cache);
  c.add_option("--prefill-step-size", a.prefill_step_size, "Prompt tokens processed at a time")->capture_default_str();
  c.add_option("--prompt-cache-file", a.prompt_cache_file, "Cache of the prompt's beginning, made by cache_prompt");
  c.add_flag("--quantize-activations", a.quantize_activations, "Round activations to the format of the weights, mxfp8 or nvfp4; also -qa");
  add_kv_bits(c, a.cache);
  add_quantized_kv_start(c, a.cache);
  add_drafts(c, a.drafts);
  add_threads(c, a.threads);
}

}  // namespace

void add_generate(CLI::App& app, Action& action) {
  auto a = std::make_shared<Arguments>();
  auto& c = *app.add_subcommand("generate", "Generate text from a prompt");
  add_model(c, a->model, a->trust_remote_code);
  c.add_option("--adapter-path", a->adapter_path, "Folder of a trained adapter (LoRA, DoRA or full)");
  c.add_option("--extra-eos-token", a->extra_eos, "Tokens, or their ids, that also end the answer");
  c.add_option("--system-prompt", a->system_prompt, "System message for the chat template");
  c.add_option("-p,--prompt", a->prompt, "Message to the model; \\n and \\t are escapes; '-' reads stdin")->capture_default_str();
  c.add_option("--image", a->images, "Image files (models that take images are not supported yet)");
  c.add_option("--prefill-response", a->prefill_response, "Beginning of the answer, to be continued");
  add_answer(c, *a);
  c.add_flag("--ignore-chat-template", a->ignore_chat_template, "Use the prompt as it is");
  c.add_flag("--use-default-chat-template", a->default_chat_template, "Accepted for compatibility, without effect");
  c.add_option("--chat-template-config", a->chat_template_config, "JSON object of further variables for the chat template");
  c.add_option("--verbose", a->verbose, "False or F: print the answer only")->capture_default_str();
  add_cache(c, *a);
  add_cpu_precision(c, a->cpu_precision);
  c.add_flag("--json", a->json, "Print one JSON object: text, tokens, finish_reason, counts and speeds");
  c.footer("Example:\n  mlx-lm generate --model org/name --prompt \"Why is the sky blue?\" --max-tokens 200 --temp 0.7");
  c.callback([a, &action] { action = [a] { return run(*a); }; });
}

}  // namespace mlxlm::cli
