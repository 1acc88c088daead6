// Inner loops for Arm with dot products of bytes; CMakeLists.txt gives this file its flags.
#if defined(__aarch64__)
#define MLXLM_ISA_FUNCTION isa_dotprod
#define MLXLM_ISA_NAME "neon-dotprod"
#include "kernels/cpu/isa.inl"
#endif
