// mlx-lm [--version] COMMAND: parses, runs one command, and turns every error into one line on stderr and an exit status.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <fmt/format.h>

#include "base/error.h"
#include "base/text_util.h"
#include "cli/command.h"

namespace {

using namespace mlxlm;

const std::vector<std::string> kCommands{"batch_generate", "benchmark", "cache_prompt", "chat", "describe", "generate", "logits"};
// Commands of the reference that are not written yet.
const std::vector<std::string> kLater{"awq",  "convert", "dwq",        "dynamic_quant", "evaluate", "fuse",  "gptq",
                                      "lora", "manage",  "perplexity", "serve",         "server",   "share", "upload"};

int fail(std::string message, int status) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  while (!message.empty() && message.back() == ' ') message.pop_back();
  std::fflush(stdout);
  fmt::print(stderr, "mlx-lm: error: {}\n", message);
  return status;
}

/** Throws unless argv[1] is an option or a command. */
void check_command(const std::string& word) {
  if (word.empty() || word.front() == '-' || std::ranges::find(kCommands, word) != kCommands.end()) return;
  if (std::ranges::find(kLater, word) != kLater.end()) throw Error(Code::unsupported, word, "not supported yet");
  auto nearest = nearest_names(word, kCommands);
  throw Error(Code::bad_request, fmt::format("unknown command '{}'; wanted {}", word, join(nearest.empty() ? kCommands : nearest, " or ")));
}

/** glibc keeps up to 64 MB of what loading a model has freed, unless both limits are set. */
void give_memory_back() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
  mallopt(M_TRIM_THRESHOLD, 4 << 20);
#endif
}

int run(int argc, char** argv) {
  give_memory_back();
  CLI::App app{"Language models on MLX, in C++."};
  app.name("mlx-lm");
  app.set_version_flag("--version", MLXLM_VERSION);
  app.footer("Example:\n  mlx-lm generate --model mlx-community/Llama-3.2-3B-Instruct-4bit --prompt \"Why is the sky blue?\"");
  app.require_subcommand(0, 1);
  cli::Action action;
  cli::add_generate(app, action);
  cli::add_batch_generate(app, action);
  cli::add_chat(app, action);
  cli::add_describe(app, action);
  cli::add_logits(app, action);
  cli::add_cache_prompt(app, action);
  cli::add_benchmark(app, action);

  std::vector<std::string> words;  // CLI11 wants them reversed
  for (int i = argc - 1; i > 0; --i) words.emplace_back(std::strcmp(argv[i], "-qa") == 0 ? "--quantize-activations" : argv[i]);
  if (words.empty()) {
    fmt::print("{}", app.help());
    return fail("no command given; wanted " + join(kCommands, " or "), 1);
  }
  check_command(words.back());
  try {
    app.parse(std::move(words));
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(e);  // --help, --version
    throw Error(Code::bad_request, e.what());
  }
  if (!action) {
    fmt::print("{}", app.help());
    return 0;
  }
  return action();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const int status = run(argc, argv);
    if (std::fflush(stdout) != 0) return fail("stdout: could not be written", 1);
    return status;
  } catch (const Error& e) {
    return fail(e.what(), exit_status(e.code()));
  } catch (const std::bad_alloc&) {
    return fail("out of memory", exit_status(Code::out_of_memory));
  } catch (const std::exception& e) {
    return fail(fmt::format("internal: {}", e.what()), exit_status(Code::internal));
  }
}
