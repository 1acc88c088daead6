// Names and folders of the hub's cache. Layout: huggingface_hub (models--org--name/{refs,snapshots,blobs}).
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace mlxlm::hub {

/** "org/name" of letters, digits, '-', '_' and '.', with no ".." and no leading '.' or '-'. */
bool is_repo_name(std::string_view name);
/** A branch, tag or commit that is safe as a relative path. */
bool is_revision(std::string_view revision);
/** A file name of a repository that stays inside its folder. */
bool is_safe_file(std::string_view file);

/** HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub or ~/.cache/huggingface/hub. */
std::filesystem::path cache_root();
std::filesystem::path repo_folder(const std::string& repo);
/** HF_ENDPOINT without a trailing slash, or https://huggingface.co. */
std::string endpoint();
/** HF_TOKEN or "". Throws Error(bad_request) if it could not be a header. */
std::string token();
/** HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set to 1, true, yes or on. */
bool offline();

/** Percent-encoded; '/' is kept. */
std::string url_path(std::string_view path);
/** A variable of the environment; "" when unset. */
std::string environment(const char* name);

}  // namespace mlxlm::hub
