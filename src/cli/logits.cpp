// mlx-lm logits: the logits of given tokens as a safetensors file, for comparison with other implementations.
#include <algorithm>
#include <charconv>

#include <fmt/format.h>
#include <mlx/memory.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "base/text_util.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "model/causal_model.h"
#include "weights/weights.h"

namespace mlxlm::cli {

namespace {

namespace mx = mlx::core;

struct Arguments {
  std::string model, tokens, out, cpu_precision = "default";
  bool cached = false;
  int chunk = 0, threads = 0;
};

std::vector<int> parse_tokens(const std::string& text, int vocab) {
  std::vector<int> tokens;
  for (const auto& part : split(text, ',')) {
    int token = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), token);
    if (error != std::errc{} || end != part.data() + part.size() || token < 0 || token >= vocab) {
      throw Error(Code::bad_request, "--tokens",
                  fmt::format("got '{}', wanted integers from 0 to {}, separated by commas", part, vocab - 1));
    }
    tokens.push_back(token);
  }
  return tokens;
}

int run(const Arguments& a) {
  if (a.chunk < 0) throw Error(Code::bad_request, "--chunk", fmt::format("got {}, wanted 0 (all at once) or more", a.chunk));
  use_threads(a.threads);
  set_cpu_precision(a.cpu_precision);
  auto loaded = model::load(find_model(a.model));
  const auto& description = loaded.model->description();
  const auto tokens = parse_tokens(a.tokens, description.vocab);
  const int total = static_cast<int>(tokens.size());
  const int step = a.cached ? 1 : a.chunk > 0 ? a.chunk : total;
  cache::Caches caches;
  if (step < total) caches = cache::make_caches(description);
  std::vector<mx::array> rows;
  for (int begin = 0; begin < total; begin += step) {
    const int count = std::min(step, total - begin);
    auto logits = loaded.model->forward(mx::array(tokens.data() + begin, {1, count}, mx::int32), caches);
    rows.push_back(mx::astype(mx::squeeze(logits, 0), mx::float32));
    mx::eval(rows.back());
  }
  auto all = mx::contiguous(mx::concatenate(rows, 0));
  mx::eval(all);
  weights::save_safetensors(a.out, {{"logits", all}});
  return 0;
}

}  // namespace

void add_logits(CLI::App& app, Action& action) {
  auto a = std::make_shared<Arguments>();
  auto& c = *app.add_subcommand("logits", "Write the float32 logits [tokens, vocabulary] of given tokens to a .safetensors file");
  c.add_option("--model", a->model, "Folder, .gguf file or repository (org/name)");
  c.add_option("--tokens", a->tokens, "Token ids separated by commas")->required();
  c.add_option("--out", a->out, "File to write")->required();
  c.add_flag("--cached", a->cached, "One token at a time through the cache");
  c.add_option("--chunk", a->chunk, "Tokens at a time through the cache; 0 = all at once")->capture_default_str();
  add_threads(c, a->threads);
  add_cpu_precision(c, a->cpu_precision);
  c.footer("Example:\n  mlx-lm logits --model FOLDER --tokens 5,17,3 --out logits.safetensors");
  c.callback([a, &action] { action = [a] { return run(*a); }; });
}

}  // namespace mlxlm::cli
