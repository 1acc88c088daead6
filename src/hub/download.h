// Repository -> snapshot in the cache.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "hub/hub.h"

namespace mlxlm::hub {

/** What a hub says about a revision. */
struct Listing {
  std::string commit;
  std::vector<std::string> files;  // those that mlx_lm asks for, sorted
};

/** Throws Error(not_found) when there is no such repository or access is refused, Error(network). */
Listing list_repository(const std::string& repo, const std::string& revision, int connect_timeout_ms = 10000, int read_timeout_ms = 30000);

/** Downloads what is missing. A file is written as blobs/ETAG.incomplete, continued when it exists, and renamed when whole. */
std::filesystem::path download(const std::string& repo, const ResolveOptions& options);

}  // namespace mlxlm::hub
