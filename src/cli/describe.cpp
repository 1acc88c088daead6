// mlx-lm describe: what a model is and needs, from its config and the headers of its files; no weight is loaded.
#include <array>
#include <utility>

#include <fmt/format.h>

#include "arch/registry.h"
#include "base/error.h"
#include "base/text_util.h"
#include "cli/command.h"
#include "model/causal_model.h"
#include "plan/plan.h"
#include "weights/weights.h"

namespace mlxlm::cli {

namespace {

struct Arguments {
  std::string model;
  bool json = false;
};

constexpr int kCacheValueBytes = 2;  // 16-bit activations

const char* cache_name(plan::CacheKind kind) {
  switch (kind) {
    case plan::CacheKind::none:
      return "none";
    case plan::CacheKind::full:
      return "full";
    case plan::CacheKind::rotating:
      return "rotating";
    case plan::CacheKind::chunked:
      return "chunked";
    case plan::CacheKind::recurrent:
      return "recurrent";
  }
  return "";
}

/** Layers by kind of cache, in order of first appearance. */
json cache_kinds(const arch::Model& model) {
  json kinds = json::object();
  for (const auto& layer : plan::cache_layout(model)) {
    auto& count = kinds[cache_name(layer.kind)];
    count = count.is_null() ? 1 : count.get<int>() + 1;
  }
  return kinds;
}

struct Source {
  json config;
  int64_t weight_bytes = 0;
  std::size_t tensors = 0;
};

Source read_source(const std::filesystem::path& path) {
  if (std::filesystem::is_regular_file(path)) {
    const auto gguf = weights::load_gguf(path, /*with_tensors=*/false);
    return {gguf.config, static_cast<int64_t>(std::filesystem::file_size(path)), 0};
  }
  Source source{model::load_config(path), 0, 0};
  try {
    for (const auto& tensor : weights::list_folder(path)) {
      source.weight_bytes += tensor.bytes;
      ++source.tensors;
    }
  } catch (const Error& e) {
    if (e.code() != Code::not_found) throw;  // a config alone can be described too
  }
  return source;
}

json describe(const std::filesystem::path& path) {
  const auto source = read_source(path);
  const arch::Config config(source.config);
  const auto model = arch::build(config);
  const auto summary = plan::summarize(model);
  const auto quant = plan::parse_quantization(source.config);
  json out{{"path", path.string()},
           {"model_type", model.model_type},
           {"layers", model.layers.size()},
           {"width", model.width},
           {"vocabulary", model.vocab},
           {"context_tokens", model.context_tokens},
           {"parameters", summary.parameters},
           {"active_parameters", summary.active_parameters},
           {"weight_bytes", source.weight_bytes},
           {"bits_per_weight",
            summary.parameters > 0 ? static_cast<double>(source.weight_bytes) * 8 / static_cast<double>(summary.parameters) : 0.0}};
  if (quant.global) {
    out["quantization"] = {{"mode", quant.global->mode}, {"bits", quant.global->bits}, {"group_size", quant.global->group_size}};
  } else {
    out["quantization"] = nullptr;
  }
  out["caches"] = cache_kinds(model);
  out["cache_bytes_per_token"] = summary.cache_values_per_token * kCacheValueBytes;
  out["cache_bytes_fixed"] = summary.cache_values_fixed * kCacheValueBytes;
  out["unread_keys"] = config.unread_keys();
  return out;
}

/** 1234567, "B" -> "1.235 MB". */
std::string human(double value, const char* suffix = "") {
  constexpr std::array<std::pair<double, const char*>, 4> kUnits{{{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}}};
  for (const auto& [unit, name] : kUnits) {
    if (value >= unit) return fmt::format("{:.3f} {}{}", value / unit, name, suffix);
  }
  return fmt::format("{:.0f}{}{}", value, *suffix ? " " : "", suffix);
}

std::string caches_text(const json& kinds) {
  std::vector<std::string> parts;
  for (const auto& [kind, count] : kinds.items()) parts.push_back(fmt::format("{} {}", count.get<int>(), kind));
  return join(parts);
}

void print_text(const json& d) {
  const auto line = [](const char* name, const std::string& value) { fmt::print("{:<18}{}\n", name, value); };
  const auto& q = d["quantization"];
  line("Model", d["path"].get<std::string>());
  line("Architecture", d["model_type"].get<std::string>());
  line("Layers", fmt::format("{} (caches: {})", d["layers"].get<int>(), caches_text(d["caches"])));
  line("Width", fmt::format("{}", d["width"].get<int>()));
  line("Vocabulary", fmt::format("{}", d["vocabulary"].get<int>()));
  line("Context", d["context_tokens"].get<int>() > 0 ? fmt::format("{} tokens", d["context_tokens"].get<int>()) : "not stated");
  line("Parameters",
       fmt::format("{}, {} used for each token", human(d["parameters"].get<double>()), human(d["active_parameters"].get<double>())));
  if (d["weight_bytes"].get<int64_t>() > 0) {
    line("Weights",
         fmt::format("{}, {:.3f} bits a weight", human(d["weight_bytes"].get<double>(), "B"), d["bits_per_weight"].get<double>()));
  } else {
    line("Weights", "none in this folder");
  }
  line("Quantization", q.is_null() ? "none"
                                   : fmt::format("{}, {} bits, groups of {}", q["mode"].get<std::string>(), q["bits"].get<int>(),
                                                 q["group_size"].get<int>()));
  line("Cache", fmt::format("{} a token and {} fixed, in 16 bits", human(d["cache_bytes_per_token"].get<double>(), "B"),
                            human(d["cache_bytes_fixed"].get<double>(), "B")));
  const auto unread = d["unread_keys"].get<std::vector<std::string>>();
  line("Unread keys", unread.empty() ? "none" : join(unread));
}

int run(const Arguments& a) {
  const auto description = describe(find_model(a.model));
  if (a.json) {
    fmt::print("{}\n", to_text(description));
  } else {
    print_text(description);
  }
  return 0;
}

}  // namespace

void add_describe(CLI::App& app, Action& action) {
  auto a = std::make_shared<Arguments>();
  auto& c = *app.add_subcommand("describe", "Say what a model is and needs, without loading its weights");
  c.add_option("MODEL,--model", a->model, "Folder, .gguf file or repository (org/name); the default model when not given");
  c.add_flag("--json", a->json, "Print one JSON object");
  c.footer("Example:\n  mlx-lm describe mlx-community/Llama-3.2-3B-Instruct-4bit");
  c.callback([a, &action] { action = [a] { return run(*a); }; });
}

}  // namespace mlxlm::cli
