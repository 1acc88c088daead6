// Inner loops for generic; CMakeLists.txt gives this file its flags.
#define MLXLM_ISA_FUNCTION isa_generic
#define MLXLM_ISA_NAME "generic"
#include "kernels/cpu/isa.inl"
