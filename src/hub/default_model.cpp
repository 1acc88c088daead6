// Looks for the default model; a hub out of reach costs at most a few seconds.
#include "hub/default_model.h"

#include <fmt/format.h>
#ifdef __APPLE__
#include <mach-o/dyld.h>
#endif

#include "base/error.h"
#include "hub/download.h"
#include "hub/layout.h"

namespace mlxlm::hub {

namespace fs = std::filesystem;

namespace {

constexpr int kProbeTimeoutMs = 3000;

fs::path program_folder() {
  std::error_code error;
#ifdef __APPLE__
  char buffer[4096];
  uint32_t size = sizeof buffer;
  if (_NSGetExecutablePath(buffer, &size) != 0) return {};
  return fs::canonical(buffer, error).parent_path();
#else
  return fs::read_symlink("/proc/self/exe", error).parent_path();
#endif
}

/** Where the embedded model is looked for, best first. */
std::vector<fs::path> embedded_candidates() {
  std::vector<fs::path> places;
  if (const auto program = program_folder(); !program.empty()) {
    places.push_back(program / ".." / "models" / kEmbeddedName);
    places.push_back(program / "models" / kEmbeddedName);
    places.push_back(program / ".." / "share" / "mlxlm" / kEmbeddedName);
  }
  if (const auto home = environment("HOME"); !home.empty()) {
    places.push_back(fs::path(home) / ".cache" / "mlx-lm.cpp" / kEmbeddedName);
  }
  return places;
}

}  // namespace

fs::path resolve_default(const ResolveOptions& options) {
  if (const auto named = environment("MLXLM_DEFAULT_MODEL"); !named.empty()) return resolve(named, options);
  if (auto cached = find_cached(kDefaultRepo, options.revision)) return *cached;
  std::string reason = "offline";
  if (!options.offline && !offline()) {
    bool reachable = false;
    try {
      list_repository(kDefaultRepo, options.revision, kProbeTimeoutMs, kProbeTimeoutMs);
      reachable = true;
    } catch (const Error& e) {
      reason = e.what();
    }
    if (reachable) return resolve(kDefaultRepo, options);
  }
  std::error_code ignored;
  for (const auto& place : embedded_candidates()) {
    if (fs::is_regular_file(place, ignored)) return fs::weakly_canonical(place, ignored);
  }
  throw Error(
      Code::not_found, "model",
      fmt::format("none named, {} cannot be had ({}), and {} is not installed; wanted --model FOLDER, or run the setup script, or set "
                  "MLXLM_DEFAULT_MODEL",
                  kDefaultRepo, reason, kEmbeddedName));
}

}  // namespace mlxlm::hub
