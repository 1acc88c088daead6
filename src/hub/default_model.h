// The model that is used when none is named.
#pragma once

#include <filesystem>

#include "hub/hub.h"

namespace mlxlm::hub {

/** Reference: mlx_lm/generate.py DEFAULT_MODEL */
inline constexpr const char* kDefaultRepo = "mlx-community/Llama-3.2-3B-Instruct-4bit";
inline constexpr const char* kEmbeddedName = "SmolLM2-135M-Instruct.gguf";

/** $MLXLM_DEFAULT_MODEL if set; else kDefaultRepo from the cache, or from the hub if it answers within seconds; else the embedded model
 *  beside the program or in ~/.cache/mlx-lm.cpp. Throws Error(not_found) saying how to get one. */
std::filesystem::path resolve_default(const ResolveOptions& options = {});

}  // namespace mlxlm::hub
