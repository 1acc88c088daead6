// From a folder or a file to a callable model. Reference: mlx_lm/utils.py load_config, load_model
#include "arch/config.h"
#include "arch/registry.h"
#include "base/error.h"
#include "model/causal_model.h"

namespace mlxlm::model {
namespace {

namespace fs = std::filesystem;

/** As Python sees it. */
bool truthy(const json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number()) return value.get<double>() != 0;
  if (value.is_string()) return !value.get_ref<const std::string&>().empty();
  return !value.empty();
}

/** The seam for the methods of other tools: until their conversion is here, a clear refusal. */
void refuse_foreign_quantization(const json& config, const std::string& where) {
  const auto it = config.find("quantization_config");
  if (config.contains("quantization") || it == config.end() || !it->is_object()) return;
  const auto method = it->find("quant_method");
  if (method == it->end()) return;
  const std::string name = method->is_string() ? method->get<std::string>() : to_text(*method);
  if (name == "fp8") return;  // dequantized by the architecture's rules
  throw Error(Code::unsupported, where, "quantization_config.quant_method: got '" + name + "', which is not supported yet");
}

Loaded build(json config, weights::Tensors tensors, const fs::path& path, const std::string& where, const LoadOptions& options) {
  refuse_foreign_quantization(config, where);
  const arch::Config reader(config, where);
  auto description = arch::build(reader);
  weights::apply_rules(tensors, description);
  const auto quant = weights::check(tensors, description, plan::parse_quantization(config), path.string());
  Loaded loaded;
  BuildOptions build{.executor = options.executor, .adapters = {}, .quantize_activations = options.quantize_activations};
  if (!options.adapter.empty()) build.adapters = weights::apply_adapter(options.adapter, tensors, description);
  loaded.model = make_model(std::move(description), std::move(tensors), quant, build);
  loaded.config = std::move(config);
  loaded.path = path;
  return loaded;
}

}  // namespace

json load_config(const fs::path& folder) {
  const auto path = folder / "config.json";
  if (!fs::exists(path)) throw Error(Code::not_found, folder.string(), "got no config.json");
  json config = read_json_file(path);
  if (!config.is_object()) throw Error(Code::bad_config, path.string(), "wanted a JSON object");
  if (const auto generation = folder / "generation_config.json"; fs::exists(generation)) {
    try {
      const json extra = read_json_file(generation);
      if (extra.is_object() && extra.contains("eos_token_id") && truthy(extra["eos_token_id"]))
        config["eos_token_id"] = extra["eos_token_id"];
    } catch (const Error&) {
      // As in the reference: a generation config that does not parse is as if it were absent.
    }
  }
  if (!config.contains("quantization_config") && config.contains("text_config") && config["text_config"].is_object() &&
      config["text_config"].contains("quantization_config")) {
    config["quantization_config"] = config["text_config"]["quantization_config"];
  }
  return config;
}

Loaded load(const fs::path& path, const LoadOptions& options) {
  if (!fs::exists(path)) throw Error(Code::not_found, path.string(), "no such folder or file");
  if (fs::is_regular_file(path)) {
    auto gguf = weights::load_gguf(path, true, [&](const weights::Gguf& g) {
      if (options.on_config) options.on_config(g.config, g.metadata);
    });
    auto loaded = build(std::move(gguf.config), std::move(gguf.checkpoint.tensors), path, path.string(), options);
    loaded.gguf_metadata = std::move(gguf.metadata);
    return loaded;
  }
  json config = load_config(path);
  if (options.on_config) options.on_config(config, nullptr);
  return build(std::move(config), weights::load_folder(path).tensors, path, (path / "config.json").string(), options);
}

}  // namespace mlxlm::model
