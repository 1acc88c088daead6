// Reads the limits of host and control group; sizes caches from the plan.
#include "gen/memory.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>

#include <fmt/format.h>
#include <mlx/device.h>
#include <mlx/memory.h>
#include <sys/resource.h>

#include "base/error.h"
#include "cache/prompt_file.h"
#include "plan/plan.h"

namespace mlxlm::gen {

namespace mx = mlx::core;

namespace {

std::optional<int64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;  // "max" fails to parse: no limit
  return std::nullopt;
}

/** A field of a "name value" or "name: value kB" file. */
std::optional<int64_t> read_field(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  int64_t value = 0;
  while (file >> word) {
    if (word == name && file >> value) return value;
  }
  return std::nullopt;
}

/** Page cache counts as used by the group but is given back under pressure. */
std::optional<int64_t> group_available(const std::string& folder, const char* limit_file, const char* usage_file, const char* cache_field) {
  const auto limit = read_number(folder + "/" + limit_file), used = read_number(folder + "/" + usage_file);
  if (!limit || !used || *limit > (int64_t{1} << 60)) return std::nullopt;
  return std::max<int64_t>(0, *limit - *used + read_field(folder + "/memory.stat", cache_field).value_or(0));
}

std::optional<int64_t> cgroup_available() {
  std::optional<int64_t> least;
  const auto take = [&](std::optional<int64_t> value) {
    if (value) least = least ? std::min(*least, *value) : *value;
  };
  take(group_available("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"));
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("0::")) continue;
    std::string group = line.substr(3);
    while (true) {
      take(group_available("/sys/fs/cgroup" + group, "memory.max", "memory.current", "inactive_file"));
      const auto slash = group.rfind('/');
      if (slash == std::string::npos || group.empty()) break;
      group.resize(slash);
    }
  }
  return least;
}

}  // namespace

std::optional<int64_t> available_bytes() {
  if (const char* text = std::getenv("MLXLM_MEMORY_BYTES")) {
    char* end = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    if (end == text || *end || value < 0) {
      throw Error(Code::bad_request, "MLXLM_MEMORY_BYTES", fmt::format("got '{}', wanted a number of bytes", text));
    }
    return value;
  }
  if (mx::default_device() == mx::Device::gpu) {
    return std::max<int64_t>(0, static_cast<int64_t>(mx::get_memory_limit()) - static_cast<int64_t>(mx::get_active_memory()));
  }
  auto free = read_field("/proc/meminfo", "MemAvailable:");
  if (free) *free *= 1024;
  const auto group = cgroup_available();
  if (free && group) return std::min(*free, *group);
  return free ? free : group;
}

int64_t peak_resident_bytes() {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#ifdef __APPLE__
  return usage.ru_maxrss;
#else
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
#endif
}

namespace {

/** Bytes of `tokens` tokens in the caches, quantized or not. */
int64_t bytes_of(const arch::Model& model, int64_t tokens, const CacheSizes& sizes, bool quantized) {
  constexpr double state_value_bytes = 4;  // the states of recurrent layers stay float32
  const auto& q = sizes.quantization;
  double bytes = 0;
  for (const auto& layer : plan::cache_layout(model)) {
    int64_t held = tokens;
    if (layer.window_tokens > 0) held = std::min<int64_t>(held, layer.window_tokens);
    if (sizes.max_kv_size_tokens > 0 && layer.kind != plan::CacheKind::chunked) held = std::min<int64_t>(held, sizes.max_kv_size_tokens);
    // A group has its codes, a scale and a bias.
    const double per_value = quantized ? q.bits / 8.0 + 2.0 * sizes.value_bytes / q.group_size : sizes.value_bytes;
    bytes += static_cast<double>(layer.values_fixed) * state_value_bytes +
             static_cast<double>(held) * static_cast<double>(layer.values_per_token) * per_value;
  }
  return static_cast<int64_t>(std::min(bytes, 9e18));
}

}  // namespace

int64_t cache_bytes(const arch::Model& model, int64_t tokens, const CacheSizes& sizes) {
  const auto& q = sizes.quantization;
  if (q.bits == 0 || tokens < q.start_tokens) return bytes_of(model, tokens, sizes, false);
  const int64_t step = sizes.prefill_step_tokens > 0 ? sizes.prefill_step_tokens : tokens;
  const int64_t as_floats = std::min<int64_t>(tokens, q.start_tokens + step);
  return std::max(bytes_of(model, tokens, sizes, true), bytes_of(model, as_floats, sizes, false));
}

int value_bytes(const cache::Caches& caches) {
  for (const auto& c : caches) {
    if (dynamic_cast<const cache::AttentionCache*>(c.get()) == nullptr) continue;  // states have a dtype of their own
    for (const auto& a : c->state()) {
      if (mx::issubdtype(a.dtype(), mx::floating)) return static_cast<int>(mx::size_of(a.dtype()));
    }
  }
  return 0;
}

int64_t check_answer(const arch::Model& model, const cache::Caches& caches, int64_t more_tokens, CacheSizes sizes) {
  constexpr int64_t ahead_tokens = 64, block_tokens = 256;
  const int64_t held = cache::prompt_tokens(caches), next = held + more_tokens + ahead_tokens;
  if (sizes.quantization.bits > 0 && held >= sizes.quantization.start_tokens) {  // nothing is left of floats
    sizes.quantization.start_tokens = 0;
    sizes.prefill_step_tokens = 1;
  }
  if (cache_bytes(model, next, sizes) > cache::total_bytes(caches)) {
    const int64_t grown = (std::max(next, held * 3 / 2) + block_tokens - 1) / block_tokens * block_tokens;
    check_available(cache_bytes(model, grown, sizes), grown, "answer");
  }
  return next;
}

void check_available(int64_t needed_bytes, int64_t tokens, const char* what) {
  const auto free = available_bytes();
  if (!free || needed_bytes <= *free) return;
  throw Error(Code::out_of_memory, what,
              fmt::format("a cache for {} tokens needs {:.3f} GB, available are {:.3f} GB; wanted a shorter {}, kv_bits or a max_kv_size",
                          tokens, static_cast<double>(needed_bytes) / 1e9, static_cast<double>(*free) / 1e9, what));
}

void check_available_for(const std::string& file, int64_t needed_bytes) {
  const auto free = available_bytes();
  if (!free || needed_bytes <= *free) return;
  throw Error(Code::out_of_memory, file,
              fmt::format("its caches need {:.3f} GB, available are {:.3f} GB", static_cast<double>(needed_bytes) / 1e9,
                          static_cast<double>(*free) / 1e9));
}

}  // namespace mlxlm::gen
