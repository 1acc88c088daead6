// A callable language model: description + weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include <mlx/array.h>

#include "arch/model.h"
#include "cache/cache.h"
#include "plan/plan.h"
#include "weights/weights.h"

namespace mlxlm::model {

namespace mx = mlx::core;

enum class Rows { all, last };

/** Thread: the one that owns MLX. */
class CausalModel {
 public:
  virtual ~CausalModel() = default;
  /** tokens [B,L] int32 -> logits [B,L,V] (or [B,1,V] for Rows::last), in the model's dtype. Advances each cache by L.
   *  `caches` may be empty: then nothing is remembered. */
  virtual mx::array forward(const mx::array& tokens, cache::Caches& caches, Rows rows = Rows::all) = 0;
  virtual const arch::Model& description() const = 0;
  /** Bytes of all parameters as they lie in memory. */
  virtual int64_t weight_bytes() const = 0;
};

/** Builds the graph executor. Consumes the tensors. Throws Error(bad_weights). */
std::unique_ptr<CausalModel> make_graph_model(arch::Model description, weights::Tensors tensors,
                                              const std::map<std::string, plan::Quant>& quant);

struct Loaded {
  std::unique_ptr<CausalModel> model;
  json config;               // config.json merged with generation_config.json
  json gguf_metadata;        // null unless a GGUF file
  std::filesystem::path path;
};

/** config.json merged with generation_config.json (its eos_token_id wins) and hoisted quantization. Reference: mlx_lm/utils.py load_config */
json load_config(const std::filesystem::path& folder);

/** A folder with config.json and model*.safetensors, or a .gguf file. Throws every Error of the rooms below. */
Loaded load(const std::filesystem::path& path);

}  // namespace mlxlm::model
