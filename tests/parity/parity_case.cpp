// Builds the models of golden files.
#include "parity_case.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <set>

#include <fmt/format.h>
#include <mlx/io.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <unistd.h>

#include "arch/registry.h"
#include "base/error.h"
#include "base/text_util.h"
#include "tiny_weights.h"

namespace mlxlm::tests {
namespace {

fs::path folder() {
  return fs::path(MLXLM_TEST_DATA) / "parity";
}

mx::Dtype dtype_named(const std::string& name) {
  if (name == "f32") return mx::float32;
  if (name == "f16") return mx::float16;
  if (name == "bf16") return mx::bfloat16;
  throw Error(Code::internal, "golden", "dtype " + name);
}

bool ends_with_any(const std::string& name, const std::vector<std::string>& suffixes) {
  return std::ranges::any_of(suffixes, [&](const auto& suffix) { return name.ends_with(suffix); });
}

mx::array generated(const std::string& name, const std::vector<int>& shape, uint32_t seed) {
  const auto values = tiny_weights(name, shape, seed);
  return mx::array(values.data(), mx::Shape(shape.begin(), shape.end()), mx::float32);
}

/** The tensors of a published checkpoint, by the names and shapes that the golden lists. */
weights::Tensors stored_tensors(const json& listed, const arch::Model& description, mx::Dtype dtype, uint32_t seed) {
  weights::Tensors tensors;
  for (const auto& [name, spec] : listed.items()) {
    const bool fp8 = spec.is_object();
    const auto value = generated(name, (fp8 ? spec.at("shape") : spec).get<std::vector<int>>(), seed);
    const bool keep = ends_with_any(name, description.keep_f32);
    tensors.insert_or_assign(name, fp8 ? mx::to_fp8(value) : keep ? value : mx::astype(value, dtype));
  }
  return tensors;
}

void quantize(weights::Tensors& tensors, const std::string& path, const plan::Quant& q) {
  const auto parts = mx::quantize(tensors.at(path + ".weight"), q.group_size, q.bits, q.mode, std::nullopt, mx::Device::cpu);
  const char* leaves[] = {".weight", ".scales", ".biases"};
  for (std::size_t i = 0; i < parts.size(); ++i) tensors.insert_or_assign(path + leaves[i], parts[i]);
}

/** As mlx_lm quantizes a model: every matrix that the groups divide, but those that the golden lists as dense. */
void quantize_all(weights::Tensors& tensors, const arch::Model& description, const plan::QuantConfig& config, const json& info) {
  const auto dense = info.value("dense", std::set<std::string>{});
  for (const auto& t : plan::tensors(description)) {
    const bool can = t.role == plan::Role::matrix || t.role == plan::Role::stacked || t.role == plan::Role::embedding;
    if (!can || dense.contains(t.path) || t.shape.back() % config.global->group_size != 0 || !tensors.contains(t.name())) continue;
    if (tensors.contains(t.path + ".scales")) continue;
    const auto named = config.by_path.find(t.path);
    quantize(tensors, t.path, named != config.by_path.end() && named->second ? *named->second : *config.global);
  }
}

/** Through files, as a user gives an adapter. */
weights::LowRanks adapter_of(const json& info, Checkpoint& made, uint32_t seed) {
  const auto folder = fs::path(testing::TempDir()) / fmt::format("adapter-{}", getpid());
  fs::create_directories(folder);
  weights::Tensors tensors;
  for (const auto& [name, shape] : info.at("shapes").items()) {
    const std::string source = name.ends_with(".m") ? name + ".weight" : name;
    tensors.insert_or_assign(name, generated(source, shape.get<std::vector<int>>(), seed));
  }
  weights::save_safetensors(folder / "adapters.safetensors", tensors);
  const json config{{"fine_tune_type", info.at("type")},
                    {"num_layers", info.at("layers")},
                    {"lora_parameters", {{"rank", 4}, {"scale", info.at("scale")}}}};
  std::ofstream(folder / "adapter_config.json") << config.dump();
  auto adapters = weights::apply_adapter(folder, made.tensors, made.description);
  for (auto& [path, adapter] : adapters) mx::eval(adapter.a, adapter.b);
  fs::remove_all(folder);
  return adapters;
}

}  // namespace

std::vector<int> Golden::tokens(const std::string& key) const {
  const auto& a = answers.at(key);
  return {a.data<int32_t>(), a.data<int32_t>() + a.size()};
}

std::vector<std::vector<float>> Golden::rows(const std::string& key) const {
  return to_rows(mx::expand_dims(answers.at(key), 0));
}

std::vector<std::string> golden_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder())) {
    if (entry.path().extension() == ".safetensors") names.push_back(entry.path().stem().string());
  }
  std::ranges::sort(names);
  return names;
}

std::string test_name(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::ranges::replace_if(name, [](char c) { return !std::isalnum(static_cast<unsigned char>(c)); }, '_');
  return name;
}

Golden load_golden(const std::string& name) {
  // MLX's own reader, so that a fault of ours does not show as a difference of logits.
  auto [tensors, metadata] = mx::load_safetensors((folder() / (name + ".safetensors")).string(), mx::Device::cpu);
  Golden golden{.name = name, .info = parse_json(metadata.at("case"), name), .answers = {}};
  for (auto& [key, value] : tensors) {
    mx::eval(value);
    golden.answers.insert_or_assign(key, value);
  }
  return golden;
}

Checkpoint make_checkpoint(const json& config, const json& info) {
  Checkpoint made{.description = arch::build(arch::Config(config)), .tensors = {}, .quant = {}};
  const auto& m = made.description;
  const auto dtype = dtype_named(info.at("dtype"));
  const auto seed = info.at("seed").get<uint32_t>();
  const auto quantization = plan::parse_quantization(config);
  if (info.contains("checkpoint")) {
    made.tensors = stored_tensors(info.at("checkpoint"), m, dtype, seed);
    if (const auto suffix = info.value("stored_quantized", std::string()); !suffix.empty()) {
      std::vector<std::string> paths;
      for (const auto& [name, value] : made.tensors) {
        if (name.ends_with(suffix)) paths.push_back(name.substr(0, name.size() - std::string_view(".weight").size()));
      }
      for (const auto& path : paths) quantize(made.tensors, path, {.mode = "affine", .bits = 4, .group_size = 32});
    }
  } else {
    for (const auto& t : plan::tensors(m)) {
      if (info.value("without_head", false) && t.path == m.head) continue;
      const auto value = generated(t.name(), t.shape, seed);
      made.tensors.insert_or_assign(t.name(), ends_with_any(t.name(), m.keep_f32) ? value : mx::astype(value, dtype));
    }
  }
  weights::apply_rules(made.tensors, m);
  if (quantization.global) quantize_all(made.tensors, m, quantization, info);
  for (auto& [name, value] : made.tensors) {
    value = mx::contiguous(value);
    mx::eval(value);
  }
  made.quant = weights::check(made.tensors, m, quantization, "golden");
  if (info.contains("adapter")) made.adapters = adapter_of(info.at("adapter"), made, seed);
  return made;
}

std::unique_ptr<model::CausalModel> make_model(Checkpoint checkpoint) {
  const char* wanted = std::getenv("MLXLM_TEST_EXECUTOR");
  const auto executor = wanted != nullptr && std::string(wanted) == "graph" ? model::Executor::graph : model::Executor::best;
  return model::make_model(
      std::move(checkpoint.description), std::move(checkpoint.tensors), checkpoint.quant,
      {.executor = executor, .adapters = std::move(checkpoint.adapters), .quantize_activations = checkpoint.quantize_activations});
}

uint32_t checksum(const weights::Tensors& tensors) {
  uint32_t crc = 0;
  for (const auto& [name, value] : tensors) crc = crc32(value.data<uint8_t>(), value.nbytes(), crc);
  return crc;
}

mx::array batch_of(const std::vector<int>& tokens) {
  return mx::array(tokens.data(), {1, static_cast<int>(tokens.size())}, mx::int32);
}

std::vector<std::vector<float>> to_rows(const mx::array& logits, int b) {
  auto values = mx::contiguous(mx::astype(logits, mx::float32));
  mx::eval(values);
  const int length = values.shape(1), vocab = values.shape(2);
  std::vector<std::vector<float>> rows;
  for (int l = 0; l < length; ++l) {
    const float* at = values.data<float>() + (int64_t(b) * length + l) * vocab;
    rows.emplace_back(at, at + vocab);
  }
  return rows;
}

std::vector<float> last_row(const mx::array& logits, int b) {
  return to_rows(logits, b).back();
}

std::vector<float> row_of(const mx::array& logits, int r) {
  return to_rows(mx::expand_dims(logits, 0)).at(r);
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  constexpr double infinite = std::numeric_limits<double>::infinity();
  if (a.size() != b.size() || b.empty()) return infinite;
  const auto [low, high] = std::ranges::minmax(b);
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) return infinite;
    worst = std::max(worst, std::abs(double(a[i]) - b[i]));
  }
  return high > low ? worst / (double(high) - low) : infinite;
}

int argmax(const std::vector<float>& row) {
  return static_cast<int>(std::ranges::max_element(row) - row.begin());
}

double lead(const std::vector<float>& row) {
  auto sorted = row;
  std::ranges::sort(sorted);
  return (double(sorted.back()) - sorted[sorted.size() - 2]) / (double(sorted.back()) - sorted.front());
}

}  // namespace mlxlm::tests
