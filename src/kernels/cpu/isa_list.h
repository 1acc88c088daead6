// The instruction sets that this machine runs.
#pragma once

#include <utility>
#include <vector>

#include "kernels/cpu/isa.h"

namespace mlxlm::kernels::cpu {

/** The best first, by their names in MLXLM_CPU_ISA. */
std::vector<std::pair<const char*, const Isa& (*)()>> isas_here();

}  // namespace mlxlm::kernels::cpu
