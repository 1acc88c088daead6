// Inner loops for avx2; CMakeLists.txt gives this file its flags.
#if defined(__x86_64__)
#define MLXLM_ISA_FUNCTION isa_avx2
#define MLXLM_ISA_NAME "avx2"
#include "kernels/cpu/isa.inl"
#endif
