// Which inner loops run here.
#include <cstdlib>
#include <string>

#include <mlx/device.h>

#include "base/error.h"
#include "kernels/cpu/isa_list.h"
#include "kernels/cpu/kernels.h"

namespace mlxlm::kernels::cpu {
namespace {

const Isa& choose() {
  const char* wanted = std::getenv("MLXLM_CPU_ISA");
  const std::string name = wanted == nullptr ? "" : wanted;
  std::string known;
  for (const auto& [kind, table] : isas_here()) {
    if (name.empty() || name == kind) return table();
    known += (known.empty() ? "" : ", ") + std::string(kind);
  }
  throw Error(Code::unsupported, "MLXLM_CPU_ISA", "got '" + name + "', wanted one of this machine's: " + known);
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

namespace {
Precision wanted_precision = Precision::standard;
}
void set_precision(Precision precision) {
  wanted_precision = precision;
}
Precision precision() {
  return wanted_precision;
}
int digits_of_activations(bool output_layer) {
  return wanted_precision == Precision::fast && !output_layer ? 1 : 2;
}

std::string isa_name() {
  return isa().name;
}

bool active() {
  return mx::default_device() == mx::Device::cpu;
}

}  // namespace mlxlm::kernels::cpu
