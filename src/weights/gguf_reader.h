// The container: a bounds-checked reader of GGUF files, version 2 and 3.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/files.h"
#include "base/json.h"

namespace mlxlm::weights {

enum class GgufType : uint32_t { f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q8_0 = 8, bf16 = 30 };

struct GgufTensor {
  std::string name;
  std::vector<int64_t> shape;  // rows first, as MLX has it
  uint32_t type = 0;
  const uint8_t* data = nullptr;
  uint64_t file_offset = 0;
  uint64_t bytes = 0;
};

struct GgufFile {
  std::shared_ptr<const MappedFile> mapped;
  json metadata = json::object();
  std::vector<GgufTensor> tensors;
};

/** Throws Error(bad_weights) for anything that does not fit the file, Error(unsupported) for other versions and types of tensors. */
GgufFile read_gguf(const std::filesystem::path& path);

}  // namespace mlxlm::weights
