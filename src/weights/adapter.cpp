// Reads adapters and checks each tensor against the model that it was given for.
#include "weights/adapter.h"

#include <sstream>

#include <mlx/utils.h>

#include "base/error.h"
#include "base/text_util.h"

namespace mlxlm::weights {
namespace {

namespace fs = std::filesystem;

std::string shown(const mx::Shape& shape) {
  std::ostringstream out;
  out << shape;
  return out.str();
}

struct Config {
  std::string type = "lora";
  float scale = 1.f;
};

Config read_config(const fs::path& path) {
  const json config = read_json_file(path);
  const std::string where = path.string();
  if (!config.is_object()) throw Error(Code::bad_config, where, "wanted a JSON object");
  Config made;
  if (const auto it = config.find("fine_tune_type"); it != config.end()) {
    if (it->is_string()) made.type = it->get<std::string>();
    if (!it->is_string() || (made.type != "lora" && made.type != "dora" && made.type != "full")) {
      throw Error(Code::bad_config, where + ": fine_tune_type", "got " + to_text(*it) + ", wanted lora, dora or full");
    }
  }
  if (made.type == "full") return made;
  const auto parameters = config.find("lora_parameters");
  const bool has_scale = parameters != config.end() && parameters->is_object() && parameters->contains("scale");
  if (!has_scale) {
    const bool alpha = parameters != config.end() && parameters->is_object() && parameters->contains("alpha");
    throw Error(Code::bad_config, where + ": lora_parameters",
                alpha ? "got 'alpha', wanted 'scale' (alpha / rank)" : "got no 'scale'; is this an adapter of mlx_lm?");
  }
  if (!(*parameters)["scale"].is_number()) throw Error(Code::bad_config, where + ": lora_parameters.scale", "wanted a number");
  made.scale = (*parameters)["scale"].get<float>();
  return made;
}

void replace_all_of(Tensors& tensors, Tensors given, const std::string& where) {
  for (auto& [name, value] : given) {
    const auto it = tensors.find(name);
    if (it == tensors.end()) throw Error(Code::bad_weights, where + ": " + name, "the model has no such tensor");
    if (it->second.shape() != value.shape()) {
      throw Error(Code::bad_weights, where + ": " + name, "shape " + shown(value.shape()) + ", wanted " + shown(it->second.shape()));
    }
    it->second = value;
  }
}

/** The parts of a module that an adapter has to fit. */
std::map<std::string, plan::Tensor> modules_of(const arch::Model& model) {
  std::map<std::string, plan::Tensor> modules;
  for (auto& t : plan::tensors(model)) {
    if (t.leaf == "weight" && t.role != plan::Role::vector) modules.emplace(t.path, t);
  }
  return modules;
}

mx::array take(Tensors& given, const std::string& name, const mx::Shape& wanted, const std::string& where) {
  const auto it = given.find(name);
  if (it == given.end()) throw Error(Code::bad_weights, where + ": " + name, "missing");
  auto value = it->second;
  given.erase(it);
  bool fits = value.ndim() == wanted.size() && mx::issubdtype(value.dtype(), mx::floating);
  for (std::size_t i = 0; fits && i < wanted.size(); ++i) fits = wanted[i] < 0 || value.shape(static_cast<int>(i)) == wanted[i];
  if (!fits)
    throw Error(Code::bad_weights, where + ": " + name, "shape " + shown(value.shape()) + ", wanted " + shown(wanted) + " (-1 = the rank)");
  return value;
}

}  // namespace

LowRanks apply_adapter(const fs::path& folder, Tensors& tensors, const arch::Model& model) {
  const auto config_path = folder / "adapter_config.json", weights_path = folder / "adapters.safetensors";
  if (!fs::exists(folder)) throw Error(Code::not_found, folder.string(), "no such adapter folder");
  for (const auto& path : {config_path, weights_path}) {
    if (!fs::exists(path)) throw Error(Code::not_found, path.string(), "no such file");
  }
  const auto config = read_config(config_path);
  auto given = load_safetensors(weights_path).tensors;
  const std::string where = weights_path.string();
  if (config.type == "full") {
    replace_all_of(tensors, std::move(given), where);
    return {};
  }
  const auto modules = modules_of(model);
  LowRanks adapters;
  while (!given.empty()) {
    const std::string name = given.begin()->first;
    const auto dot = name.rfind('.');
    const std::string path = name.substr(0, dot), leaf = dot == std::string::npos ? "" : name.substr(dot + 1);
    const auto module = modules.find(path);
    if (module == modules.end() || (leaf != "lora_a" && leaf != "lora_b" && leaf != "m")) {
      std::vector<std::string> known;
      for (const auto& [known_path, tensor] : modules) known.push_back(known_path);
      const auto near = nearest_names(path, known);
      throw Error(Code::bad_weights, where + ": " + name,
                  "not an adapter of this model" + (near.empty() ? "" : "; nearest modules: " + join(near)));
    }
    if (module->second.role != plan::Role::matrix)
      throw Error(Code::unsupported, where + ": " + name, "adapters of experts and embeddings");
    const auto& shape = module->second.shape;
    auto a = take(given, path + ".lora_a", {shape[1], -1}, where);
    auto b = take(given, path + ".lora_b", {a.shape(1), shape[0]}, where);
    LowRank made{a, b, std::nullopt, config.scale};
    if (config.type == "dora") made.m = take(given, path + ".m", {shape[0]}, where);
    adapters.emplace(path, std::move(made));
  }
  return adapters;
}

}  // namespace mlxlm::weights
