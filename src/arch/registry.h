// model_type -> builder: one sorted table, and the remappings of mlx_lm.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "arch/config.h"
#include "arch/model.h"

namespace mlxlm::arch {

using Build = Model (*)(const Config&);

/** Builds the description of config["model_type"], remapped as mlx_lm does, and checks it (sizes positive, heads divisible, ...).
 *  Throws Error(unsupported) naming the nearest architectures, Error(bad_config). */
Model build(const Config& config);

/** Sorted names that build() knows, remapped ones included. */
std::vector<std::string> architectures();

}  // namespace mlxlm::arch
