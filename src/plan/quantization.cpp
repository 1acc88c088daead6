// config["quantization"] as data. Reference: mlx_lm/utils.py load_model
#include <set>

#include "base/error.h"
#include "plan/plan.h"

namespace mlxlm::plan {
namespace {

[[noreturn]] void fail(const std::string& at, const std::string& problem) {
  throw Error(Code::bad_config, "config.json: quantization" + at + ": " + problem);
}

int integer(const json& object, const char* key, int fallback, const std::string& at) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return fallback;
  if (!it->is_number_integer()) fail(at + "." + key, "got " + to_text(*it) + ", wanted an integer");
  const auto value = it->get<int64_t>();
  if (value < 1 || value > 1024) fail(at + "." + key, "got " + std::to_string(value) + ", out of range");
  return static_cast<int>(value);
}

Quant parse_one(const json& object, const Quant& base, const std::string& at) {
  Quant q = base;
  if (const auto it = object.find("mode"); it != object.end() && !it->is_null()) {
    if (!it->is_string()) fail(at + ".mode", "got " + to_text(*it) + ", wanted a string");
    const std::string mode = it->get<std::string>();
    if (mode != "affine" && mode != "mxfp4" && mode != "mxfp8" && mode != "nvfp4") {
      fail(at + ".mode", "got '" + mode + "', wanted affine, mxfp4, mxfp8 or nvfp4");
    }
    if (mode != q.mode) q = mode_default(mode);
  }
  const Quant usual = mode_default(q.mode);
  q.bits = integer(object, "bits", usual.bits, at);
  q.group_size = integer(object, "group_size", usual.group_size, at);
  if (q.mode == "affine") {
    const bool bits = q.bits >= 2 && q.bits <= 8 && q.bits != 7;
    if (!bits) fail(at + ".bits", "got " + std::to_string(q.bits) + ", wanted 2, 3, 4, 5, 6 or 8");
    if (q.group_size != 32 && q.group_size != 64 && q.group_size != 128) {
      fail(at + ".group_size", "got " + std::to_string(q.group_size) + ", wanted 32, 64 or 128");
    }
  } else if (q.bits != usual.bits || q.group_size != usual.group_size) {
    fail(at, "got " + std::to_string(q.bits) + " bits in groups of " + std::to_string(q.group_size) + ", wanted " +
                 std::to_string(usual.bits) + " in groups of " + std::to_string(usual.group_size) + " for " + q.mode);
  }
  return q;
}

/** quantization_config of checkpoints that other tools packed: their tensors need unpacking that is not here. */
void refuse_foreign(const json& config) {
  static const std::set<std::string> foreign = {"awq",      "gptq",  "bitnet", "bitsandbytes", "compressed-tensors",
                                                "modelopt", "mxfp4", "mxfp8"};
  const json* found = &config;
  if (!config.contains("quantization_config") && config.contains("text_config") && config["text_config"].is_object()) {
    found = &config["text_config"];
  }
  const auto it = found->find("quantization_config");
  if (it == found->end() || !it->is_object() || !it->contains("quant_method") || !(*it)["quant_method"].is_string()) return;
  const auto method = (*it)["quant_method"].get<std::string>();
  if (foreign.contains(method)) {
    throw Error(Code::unsupported, "config.json: quantization_config.quant_method: got '" + method +
                                       "', wanted an unquantized, fp8 (128x128 blocks) or MLX checkpoint");
  }
}

}  // namespace

Quant mode_default(const std::string& mode) {
  if (mode == "mxfp4") return {mode, 4, 32};
  if (mode == "mxfp8") return {mode, 8, 32};
  if (mode == "nvfp4") return {mode, 4, 16};
  return {"affine", 4, 64};
}

QuantConfig parse_quantization(const json& config) {
  QuantConfig parsed;
  const auto it = config.find("quantization");
  if (it == config.end() || it->is_null()) {
    if (config.is_object()) refuse_foreign(config);
    return parsed;
  }
  if (!it->is_object()) fail("", "got " + to_text(*it) + ", wanted an object");
  parsed.global = parse_one(*it, mode_default("affine"), "");
  for (const auto& [key, value] : it->items()) {
    if (value.is_object()) {
      parsed.by_path[key] = parse_one(value, mode_default("affine"), "." + key);
    } else if (value.is_boolean() && key != "global_scale") {
      if (value.get<bool>())
        parsed.by_path[key] = *parsed.global;
      else
        parsed.by_path[key] = std::nullopt;
    }
  }
  return parsed;
}

}  // namespace mlxlm::plan
