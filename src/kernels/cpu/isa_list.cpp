// The instruction sets that this machine runs.
#include "kernels/cpu/isa_list.h"

#include <cerrno>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlxlm::kernels::cpu {

#if defined(__x86_64__) && defined(__linux__)
namespace {

/** Whether the processor has AMX and the kernel lets this process use it. */
bool tiles_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;  // AMX-TILE, AMX-INT8
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;  // the state of tiles is saved
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/** Some virtual machines report AMX and then raise an illegal instruction, so another process tries it. */
bool tiles_work() {
  if (!tiles_granted()) return false;
  const pid_t child = fork();
  if (child < 0) return false;
  if (child == 0) {
    signal(SIGILL, SIG_DFL);
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    _exit(try_tiles() ? 0 : 1);
  }
  int status = -1;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return false;
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace
#elif defined(__aarch64__)
namespace {

/** Dot products of bytes, and those of unsigned with signed ones. */
std::pair<bool, bool> arm_features() {
#if defined(__linux__)
  return {(getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0, (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0};
#elif defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
#else
  return {false, false};
#endif
}

}  // namespace
#endif

std::vector<std::pair<const char*, const Isa& (*)()>> isas_here() {
  std::vector<std::pair<const char*, const Isa& (*)()>> isas;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  const bool gfni = avx512 && __builtin_cpu_supports("gfni");
#if defined(__linux__)
  static const bool amx = gfni && tiles_work();
  if (amx) isas.emplace_back("amx", isa_amx);
#endif
  if (gfni) isas.emplace_back("gfni", isa_gfni);
  if (avx512) isas.emplace_back("avx512", isa_avx512);
  if (avx2) isas.emplace_back("avx2", isa_avx2);
#elif defined(__aarch64__)
  const auto [dotprod, i8mm] = arm_features();
  if (dotprod && i8mm) isas.emplace_back("i8mm", isa_i8mm);
  if (dotprod) isas.emplace_back("dotprod", isa_dotprod);
  isas.emplace_back("neon", isa_neon);
#endif
  isas.emplace_back("generic", isa_generic);
  return isas;
}

}  // namespace mlxlm::kernels::cpu
