// Inner loops for avx512-vnni with GFNI, and for machines with AMX beside it; CMakeLists.txt gives this file its flags.
#if defined(__x86_64__)
#define MLXLM_ISA_FUNCTION isa_gfni
#define MLXLM_ISA_NAME "avx512-gfni"
#include "kernels/cpu/isa.inl"

namespace mlxlm::kernels::cpu {
#include "kernels/cpu/isa_tiles.inl"
}
#endif
