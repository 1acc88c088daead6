// Fine-tuned adapters: LoRA, DoRA and full. Reference: mlx_lm/tuner/utils.py load_adapters
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "weights/weights.h"

namespace mlxlm::weights {

/** What a low-rank adapter adds to the linear map of its module: y + scale * (x a) b, and for DoRA each output times m / |row of the new
 * weight|. */
struct LowRank {
  mx::array a, b;                // [in, r], [r, out]
  std::optional<mx::array> m{};  // [out], DoRA only
  float scale = 1.f;
};
using LowRanks = std::map<std::string, LowRank>;  // by module path

/** Reads FOLDER/adapter_config.json and adapters.safetensors. Full fine-tuning replaces tensors; else what maps get is returned.
 *  `tensors` are those of the checked checkpoint. Throws Error(not_found), Error(bad_config), Error(bad_weights) that names the tensor,
 *  Error(unsupported) for adapters of experts and embeddings. */
LowRanks apply_adapter(const std::filesystem::path& folder, Tensors& tensors, const arch::Model& model);

}  // namespace mlxlm::weights
