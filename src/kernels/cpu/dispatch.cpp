// Which inner loops run here.
#include <cstdlib>
#include <string>

#include <mlx/device.h>

#include "base/error.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"

namespace mlxlm::kernels::cpu {
namespace {

const Isa& choose() {
  const char* wanted = std::getenv("MLXLM_CPU_ISA");
  const std::string name = wanted == nullptr ? "" : wanted;
  if (name == "generic") return isa_generic();
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (name == "avx2" && avx2) return isa_avx2();
  if ((name.empty() || name == "avx512") && avx512) return isa_avx512();
  if (name.empty() && avx2) return isa_avx2();
#endif
  if (!name.empty()) throw Error(Code::unsupported, "MLXLM_CPU_ISA", "got '" + name + "', wanted generic, avx2 or avx512 of this machine");
  return isa_generic();
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

namespace {
Precision wanted_precision = Precision::standard;
}
void set_precision(Precision precision) { wanted_precision = precision; }
Precision precision() { return wanted_precision; }

std::string isa_name() { return isa().name; }

bool active() { return mx::default_device() == mx::Device::cpu; }

}  // namespace mlxlm::kernels::cpu
