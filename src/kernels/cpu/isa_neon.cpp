// Inner loops for any 64-bit Arm; CMakeLists.txt gives this file its flags.
#if defined(__aarch64__)
#define MLXLM_ISA_FUNCTION isa_neon
#define MLXLM_ISA_NAME "neon"
#include "kernels/cpu/isa.inl"
#endif
