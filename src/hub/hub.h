// "org/name" or a path -> a local folder. The cache's layout is huggingface_hub's.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

namespace mlxlm::hub {

struct Progress {
  std::string file;
  int64_t done_bytes = 0, total_bytes = 0;  // total 0 = unknown
};

struct ResolveOptions {
  std::string revision = "main";
  bool offline = false;  // also HF_HUB_OFFLINE=1
  std::function<void(const Progress&)> on_progress{};
};

/** A path that exists is returned as it is. Else the snapshot in the cache (HF_HUB_CACHE, HF_HOME, ~/.cache/huggingface/hub); else a
 * download from HF_ENDPOINT of the files mlx_lm asks for, resumed when interrupted. Throws Error(not_found): "NAME: no such folder, and not
 * a repository ...", Error(network), Error(io). */
std::filesystem::path resolve(const std::string& path_or_repo, const ResolveOptions& options = {});

/** The snapshot folder if it is complete in the cache; no network. */
std::optional<std::filesystem::path> find_cached(const std::string& repo, const std::string& revision = "main");

}  // namespace mlxlm::hub
