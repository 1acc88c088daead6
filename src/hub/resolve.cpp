// Finds a model locally or in the cache, or downloads it. Reference: mlx_lm/utils.py _download, huggingface_hub's cache
#include <algorithm>
#include <array>

#include <fmt/format.h>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/text_util.h"
#include "hub/download.h"
#include "hub/hub.h"
#include "hub/layout.h"

namespace mlxlm::hub {

namespace fs = std::filesystem;

namespace {

std::string trimmed(std::string text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.pop_back();
  return text;
}

/** Shards that an index names must all be there; without one, any model*.safetensors will do. */
bool has_weights(const fs::path& snapshot) {
  const auto index = snapshot / "model.safetensors.index.json";
  if (fs::exists(index)) {
    try {
      const json content = read_json_file(index);
      const auto map = content.find("weight_map");
      if (map == content.end() || !map->is_object() || map->empty()) return false;
      return std::ranges::all_of(map->items(), [&](const auto& item) {
        return item.value().is_string() && fs::exists(snapshot / item.value().template get<std::string>());
      });
    } catch (const Error&) {
      return false;
    }
  }
  for (const auto& entry : fs::directory_iterator(snapshot)) {
    if (glob_match("model*.safetensors", entry.path().filename().string()) && fs::exists(entry.path())) return true;
  }
  return false;
}

bool is_complete(const fs::path& snapshot) {
  if (!fs::exists(snapshot / "config.json")) return false;
  const bool tokenizer = std::ranges::any_of(std::array{"tokenizer.json", "tokenizer.model", "tiktoken.model", "tokenizer_config.json"},
                                             [&](const char* name) { return fs::exists(snapshot / name); });
  return tokenizer && has_weights(snapshot);
}

bool looks_like_path(const std::string& name) {
  return name.starts_with('/') || name.starts_with('.') || name.starts_with('~');
}

}  // namespace

std::optional<fs::path> find_cached(const std::string& repo, const std::string& revision) {
  if (!is_repo_name(repo) || !is_revision(revision)) return std::nullopt;
  try {
    const auto folder = repo_folder(repo);
    std::string commit = revision;
    const auto ref = folder / "refs" / revision;
    if (fs::is_regular_file(ref)) commit = trimmed(read_text_file(ref));
    if (!is_revision(commit)) return std::nullopt;
    const auto snapshot = folder / "snapshots" / commit;
    if (fs::is_directory(snapshot) && is_complete(snapshot)) return snapshot;
  } catch (const fs::filesystem_error& e) {
    throw Error(Code::io, repo, e.what());
  }
  return std::nullopt;
}

fs::path resolve(const std::string& path_or_repo, const ResolveOptions& options) {
  if (path_or_repo.empty()) throw Error(Code::not_found, "model", "got an empty name, wanted a folder, a .gguf file or org/name");
  std::error_code ignored;
  if (path_or_repo.find('\0') == std::string::npos && fs::exists(path_or_repo, ignored)) return path_or_repo;
  if (looks_like_path(path_or_repo) || !is_repo_name(path_or_repo)) {
    throw Error(Code::not_found, path_or_repo, "no such folder, and not a repository name (wanted org/name)");
  }
  if (!is_revision(options.revision)) {
    throw Error(Code::bad_request, path_or_repo, fmt::format("revision: got '{}', wanted a branch, tag or commit", options.revision));
  }
  if (auto snapshot = find_cached(path_or_repo, options.revision)) return *snapshot;
  if (options.offline || offline()) {
    throw Error(
        Code::not_found, path_or_repo,
        fmt::format("no such folder, and not a repository in the cache {} (offline: nothing is downloaded)", cache_root().string()));
  }
  return download(path_or_repo, options);
}

}  // namespace mlxlm::hub
