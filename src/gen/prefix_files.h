// Prefixes in a folder: prompt-cache files that later runs of the same model find again.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/prefix_store.h"
#include "engine/prefix_writer.h"
#include "gen/runner.h"

namespace mlxlm::gen {

struct PrefixFolder {
  std::filesystem::path folder{};                  // empty = none
  int64_t bytes = int64_t{4} << 30;                // of all its files, whoever wrote them
  std::function<void(const std::string&)> warn{};  // what it throws is ignored
};

/** Several processes may use a folder at a time: each write happens under its lock, and files may vanish at any time. */
class PrefixFiles final : public engine::PrefixStore {
 public:
  /** Makes the folder, removes what writers that died have left, and reads which prefixes there are. Throws Error(io) when the folder
   * cannot be had. `runner` must live as long. */
  PrefixFiles(PrefixFolder options, model::CausalModel& model, ModelRunner& runner);
  /** Waits until what was saved is written. */
  ~PrefixFiles() override;

  Found find(std::span<const int> prompt, uint64_t space) noexcept override;
  Loaded load(std::span<const int> prompt, uint64_t space) noexcept override;
  /** Copies no bytes, unless the caches lie in memory in another way than kernels read them. */
  void save(engine::CacheId cache, std::span<const int> tokens, uint64_t space) noexcept override;
  int64_t unwritten_bytes() noexcept override;
  void shrink_unwritten(int64_t bytes) noexcept override;

  std::size_t size() const { return held_.size(); }

 private:
  struct Held {
    std::vector<int> tokens;
    engine::CacheOptions options{};
    uint64_t space = 0;  // of these
    bool trimmable = false;
    int64_t bytes = 0;
  };
  using Files = std::map<std::string, Held>;  // by name

  void clean_folder();
  void read_folder();
  bool read_file(const std::string& name);
  Held read_held(const std::filesystem::path& path, const std::map<std::string, std::string>& metadata) const;
  std::string name_of(const Held& held) const;
  void check_content(const std::filesystem::path& path, const Held& held, const cache::Caches& caches) const;
  engine::PrefixStore::Loaded load_or_throw(const std::string& name, Held entry);
  void settle();
  std::pair<Files::const_iterator, int> best(std::span<const int> prompt, uint64_t space) const;
  bool is_needless(std::span<const int> tokens, uint64_t space) const;
  void save_or_throw(engine::CacheId cache, std::span<const int> tokens, uint64_t space);
  void warn(const std::string& text) const noexcept;

  PrefixFolder options_;
  model::CausalModel& model_;
  ModelRunner& runner_;
  std::string fingerprint_;
  Files held_, pending_;  // pending: not yet written
  std::vector<int> loaded_tokens_;
  mutable bool warned_ = false;
  std::optional<engine::PrefixWriter> writer_;  // there once the folder is
};

}  // namespace mlxlm::gen
