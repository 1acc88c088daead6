// Facts derived from a description: tensors, caches, sizes. No MLX, no weights.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "arch/model.h"
#include "base/json.h"

namespace mlxlm::plan {

/** What a parameter is to the loader: only `matrix`, `stacked` and `embedding` can be quantized. */
enum class Role { matrix, stacked, embedding, vector, other };

/** One parameter in its unquantized form. Linear weights are [out, in], stacked experts [X, out, in]. */
struct Tensor {
  std::string path;  // module path: "model.layers.0.self_attn.q_proj"; the tensor is path + "." + leaf
  std::string leaf;  // "weight", "bias", "A_log", ...; "" = the path itself is the tensor's name
  std::vector<int> shape;
  Role role = Role::other;
  std::string name() const { return leaf.empty() ? path : path + "." + leaf; }
};

/** Every parameter of the model, in order of layers. A tied head is not listed. */
std::vector<Tensor> tensors(const arch::Model& model);

enum class CacheKind { none, full, rotating, chunked, recurrent };

/** What one op of a layer remembers. */
struct LayerCache {
  CacheKind kind = CacheKind::none;
  int window_tokens = 0;         // rotating; chunked: of a chunk
  int64_t values_per_token = 0;  // all but recurrent: numbers stored for a token (k and v together)
  int64_t values_fixed = 0;      // recurrent: numbers stored whatever the length
  int states = 0;                // recurrent: arrays that hold them
  int layer = 0;
};

bool remembers(const arch::Op& op);

/** One entry for each op that remembers, in order of layers, steps and ops; one of kind none for a layer where none does. A sequence's
 * caches are in this order. */
std::vector<LayerCache> cache_layout(const arch::Model& model);

/** Quantization of one module. */
struct Quant {
  std::string mode = "affine";  // affine, mxfp4, mxfp8, nvfp4
  int bits = 4;
  int group_size = 64;
};

/** config["quantization"] of MLX checkpoints: global values and overrides by module path.
 *  Reference: mlx_lm/utils.py load_model, infer_quant_config */
struct QuantConfig {
  std::optional<Quant> global{};                          // absent = not quantized
  std::map<std::string, std::optional<Quant>> by_path{};  // nullopt = this module is not quantized (False)
};

/** Throws Error(bad_config) for unknown modes, bits or group sizes. A null group size means the mode's default. */
QuantConfig parse_quantization(const json& config);

/** (64,4) affine, (32,4) mxfp4, (16,4) nvfp4, (32,8) mxfp8: group size and bits. */
Quant mode_default(const std::string& mode);

struct Summary {
  int64_t parameters = 0;         // as trained
  int64_t active_parameters = 0;  // used for one token: chosen experts only
  int64_t cache_values_per_token = 0;
  int64_t cache_values_fixed = 0;
};
Summary summarize(const arch::Model& model);

/** Frequencies of the rotation, one a pair: angle = position * frequency. Length rope.dims / 2.
 *  `tokens`: length of the context, for longrope with a short factor. Reference: mlx_lm/models/rope_utils.py */
std::vector<float> rope_frequencies(const arch::Rope& rope, int tokens = 0);

}  // namespace mlxlm::plan
