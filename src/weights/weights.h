// Files -> named arrays.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <mlx/array.h>

#include "arch/model.h"
#include "base/json.h"
#include "plan/plan.h"

namespace mlxlm::weights {

namespace mx = mlx::core;
using Tensors = std::map<std::string, mx::array>;

/** A checkpoint's tensors. Arrays over mapped files share the mapping and keep it alive; nothing is read until used. */
struct Checkpoint {
  Tensors tensors;
  json metadata = json::object();  // __metadata__ of the first file, or GGUF metadata
  int64_t file_bytes = 0;
};

/** Name, dtype and shape of a tensor in a file, without its data. */
struct TensorInfo {
  std::string name;
  std::string dtype;  // as the file spells it
  std::vector<int64_t> shape;
  int64_t bytes = 0;
};

/** One .safetensors file. The header is checked: length, JSON, dtypes, offsets inside the file, no overlap, sizes = shapes.
 *  Throws Error(bad_weights): file, what was got, what was wanted. CPU: zero copy over the mapping; GPU: lazy load. */
Checkpoint load_safetensors(const std::filesystem::path& file);

/** All model*.safetensors of a folder; with model.safetensors.index.json, a missing shard is an error.
 *  Throws Error(not_found) when there is none. */
Checkpoint load_folder(const std::filesystem::path& folder);

/** Header only. */
std::vector<TensorInfo> list_safetensors(const std::filesystem::path& file);
std::vector<TensorInfo> list_folder(const std::filesystem::path& folder);

/** Writes a .safetensors file atomically; names sorted, metadata strings as given. */
void save_safetensors(const std::filesystem::path& file, const Tensors& tensors, const std::map<std::string, std::string>& metadata = {});

/** What stands before the data in such a file, which follows tensor by tensor in the order of names. The tensors' dtypes and shapes are
 * asked for, not their content. `where` names the file in errors. */
std::string safetensors_start(const std::string& where, const Tensors& tensors, const std::map<std::string, std::string>& metadata = {});

/** Applies rules in order. Throws Error(bad_weights) for gaps in stacked experts. */
void apply_rules(Tensors& tensors, const arch::Model& model);

/** Compares with the plan: a missing or left-over tensor, a wrong shape or dtype is Error(bad_weights) that names it,
 *  what was got and wanted, and the nearest names. Returns the quantization by module path. */
std::map<std::string, plan::Quant> check(const Tensors& tensors, const arch::Model& model, const plan::QuantConfig& config,
                                         const std::string& where);

/** A GGUF file as MLX names it: config.json-like object, tensors under mlx_lm's paths (F32, F16, BF16 as they are; Q4_0, Q4_1, Q8_0 as
 * affine group 32 without loss), and tokenizer metadata for text::Tokenizer::from_gguf. Throws Error(bad_weights), Error(unsupported). */
struct Gguf {
  json config;                           // model_type, sizes, quantization
  std::shared_ptr<const json> metadata;  // all key/values; long arrays included
  Checkpoint checkpoint;
};
/** `described` is called when all but the tensors is known. */
Gguf load_gguf(const std::filesystem::path& file, bool with_tensors = true, const std::function<void(const Gguf&)>& described = {});

}  // namespace mlxlm::weights
