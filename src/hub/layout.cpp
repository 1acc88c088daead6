// Names that come from users and servers are checked here before they become paths.
#include "hub/layout.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include <fmt/format.h>

#include "base/error.h"
#include "base/text_util.h"

namespace mlxlm::hub {

namespace {

bool is_name_char(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
}

bool is_name(std::string_view name) {
  return !name.empty() && name.size() <= 96 && name.front() != '.' && name.front() != '-' && std::ranges::all_of(name, is_name_char) &&
         name.find("..") == std::string_view::npos && name.find("--") == std::string_view::npos;
}

bool is_relative_path(std::string_view path) {
  if (path.empty() || path.size() > 512 || path.front() == '/' || path.back() == '/') return false;
  for (const auto& part : split(path, '/')) {
    if (part.empty() || part == "." || part == "..") return false;
  }
  return std::ranges::none_of(path, [](char c) { return c == '\\' || c == '\0' || static_cast<unsigned char>(c) < 0x20; });
}

}  // namespace

bool is_repo_name(std::string_view name) {
  const auto slash = name.find('/');
  return slash != std::string_view::npos && is_name(name.substr(0, slash)) && is_name(name.substr(slash + 1));
}

bool is_revision(std::string_view revision) {
  return is_relative_path(revision) && std::ranges::all_of(revision, [](char c) { return is_name_char(c) || c == '/'; });
}

bool is_safe_file(std::string_view file) {
  return is_relative_path(file);
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::filesystem::path cache_root() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (const auto value = environment(name); !value.empty()) return value;
  }
  if (const auto home = environment("HF_HOME"); !home.empty()) return std::filesystem::path(home) / "hub";
  if (const auto cache = environment("XDG_CACHE_HOME"); !cache.empty()) return std::filesystem::path(cache) / "huggingface" / "hub";
  return std::filesystem::path(environment("HOME")) / ".cache" / "huggingface" / "hub";
}

std::filesystem::path repo_folder(const std::string& repo) {
  const auto slash = repo.find('/');
  return cache_root() / ("models--" + repo.substr(0, slash) + "--" + repo.substr(slash + 1));
}

std::string endpoint() {
  std::string url = environment("HF_ENDPOINT");
  if (url.empty()) url = "https://huggingface.co";
  while (url.ends_with('/')) url.pop_back();
  return url;
}

std::string token() {
  const std::string value = environment("HF_TOKEN");
  if (std::ranges::any_of(value, [](unsigned char c) { return c <= 0x20 || c >= 0x7f; })) {
    throw Error(Code::bad_request, "HF_TOKEN", "contains a space or a control character, wanted a token");
  }
  return value;
}

bool offline() {
  for (const char* name : {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}) {
    std::string value = environment(name);
    std::ranges::transform(value, value.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
    if (value == "1" || value == "ON" || value == "YES" || value == "TRUE") return true;
  }
  return false;
}

std::string url_path(std::string_view path) {
  std::string out;
  for (const char c : path) {
    if (is_name_char(c) || c == '~' || c == '/') {
      out += c;
    } else {
      out += fmt::format("%{:02X}", static_cast<unsigned char>(c));
    }
  }
  return out;
}

}  // namespace mlxlm::hub
