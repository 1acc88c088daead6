// Inner loops for Arm with dot products of signed and unsigned bytes; CMakeLists.txt gives this file its flags.
#if defined(__aarch64__)
#define MLXLM_ISA_FUNCTION isa_i8mm
#define MLXLM_ISA_NAME "neon-i8mm"
#include "kernels/cpu/isa.inl"
#endif
