// mlx-lm cache_prompt: runs a prompt once and keeps its caches in a file. Reference: mlx_lm/cache_prompt.py
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <iterator>

#include <fmt/format.h>

#include "api/session.h"
#include "base/error.h"
#include "base/json.h"
#include "cache/prompt_file.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "gen/generate.h"

namespace mlxlm::cli {

namespace {

/** The options as the command line spells them; defaults are the reference's. */
struct Arguments {
  std::string model, adapter_path, file, prompt;
  std::optional<std::string> eos_token;
  CacheFlags cache;
  int threads = 0;
  bool trust_remote_code = false;
};

/** As one user message that is not over, so that a later prompt continues it. */
std::vector<int> prompt_tokens(const text::Tokenizer& tokenizer, const std::string& text) {
  if (!tokenizer.has_chat_template()) return tokenizer.encode(text, true);
  text::TemplateOptions options;
  options.add_generation_prompt = false;
  options.continue_final_message = true;
  const json messages = json::array({{{"role", "user"}, {"content", text}}});
  return tokenizer.encode(tokenizer.apply_chat_template(messages, options), false);
}

std::string read_prompt(const std::string& argument) {
  if (argument != "-") return argument;
  std::string text(std::istreambuf_iterator<char>(std::cin), {});
  if (std::cin.bad()) throw Error(Code::io, "stdin", "could not be read");
  return text;
}

/** The reference's default is a folder "mlx_model"; where there is none, the default model. */
std::string model_name(const Arguments& a) {
  if (!a.model.empty() || !std::filesystem::exists("mlx_model")) return a.model;
  return "mlx_model";
}

/** Found out before the work is done. */
void check_writable(const std::filesystem::path& file) {
  if (std::filesystem::is_directory(file)) throw Error(Code::io, file.string(), "got a folder, wanted a file to write");
  const auto folder = file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
  if (!std::filesystem::is_directory(folder)) throw Error(Code::not_found, folder.string(), "no such folder");
}

gen::Options to_options(const Arguments& a) {
  gen::Options options;
  options.max_kv_size_tokens = a.cache.max_kv_size_tokens();
  options.kv_quantization = a.cache.quantization();
  options.cancel = &InterruptGuard::flag();
  options.on_prefill = [start = std::chrono::steady_clock::now()](int processed, int) {
    const double seconds = std::max(1e-9, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    fmt::print("\rProcessed {:6d} tokens ({:6.2f} tok/s)", processed, processed / seconds);
    std::fflush(stdout);
  };
  return options;
}

int run(const Arguments& a) {
  use_threads(a.threads);
  check_writable(a.file);
  const auto text = read_prompt(a.prompt);
  auto name = model_name(a);
  const auto path = find_model(name);
  if (name.empty()) name = path.string();
  auto session = open_session(path, {.executor = model::Executor::best, .adapter = a.adapter_path, .quantize_activations = false});
  json tokenizer_config{{"trust_remote_code", a.trust_remote_code}};
  if (a.eos_token) {
    session.tokenizer.add_eos_token(*a.eos_token);  // an unknown one is an error now, not when the file is used
    tokenizer_config["eos_token"] = *a.eos_token;
  }
  const auto prompt = prompt_tokens(session.tokenizer, text);
  const InterruptGuard guard;
  const auto options = to_options(a);
  cache::Caches caches;
  const bool complete = gen::prefill(*session.loaded.model, prompt, options, caches);
  fmt::print("\n");
  if (!complete) return exit_status(Code::cancelled);
  fmt::print("Peak memory: {:.3f} GB\nSaving...\n", gen::peak_memory_gb());
  cache::save_prompt_file(a.file, caches, session.loaded.model->description(),
                          {{"model", name}, {"tokenizer_config", to_text(tokenizer_config)}});
  return 0;
}

}  // namespace

void add_cache_prompt(CLI::App& app, Action& action) {
  auto a = std::make_shared<Arguments>();
  auto& c = *app.add_subcommand("cache_prompt", "Run a prompt once and keep its cache in a file");
  c.add_option("--model", a->model, "Folder, .gguf file or repository (org/name); mlx_model or else the default model when not given");
  c.add_option("--adapter-path", a->adapter_path, "Folder of a trained adapter");
  c.add_flag("--trust-remote-code", a->trust_remote_code, "Accepted for compatibility: no code of a model is ever run");
  c.add_option("--eos-token", a->eos_token, "Token that ends answers to this prompt");
  add_max_kv_size(c, a->cache);
  c.add_option("--prompt-cache-file", a->file, "File to write")->required();
  c.add_option("--prompt", a->prompt, "Message to run; '-' reads stdin")->required();
  add_kv_bits(c, a->cache);
  add_quantized_kv_start(c, a->cache);
  add_threads(c, a->threads);
  c.footer(
      "Example:\n  mlx-lm cache_prompt --prompt-cache-file book.safetensors --prompt - < book.txt\n"
      "  mlx-lm generate --prompt-cache-file book.safetensors --prompt \" What is this about?\"");
  c.callback([a, &action] { action = [a] { return run(*a); }; });
}

}  // namespace mlxlm::cli
