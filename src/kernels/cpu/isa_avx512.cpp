// Inner loops for avx512-vnni; CMakeLists.txt gives this file its flags.
#if defined(__x86_64__)
#define MLXLM_ISA_FUNCTION isa_avx512
#define MLXLM_ISA_NAME "avx512-vnni"
#include "kernels/cpu/isa.inl"
#endif
