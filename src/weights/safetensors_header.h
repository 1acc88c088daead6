// The JSON header of a .safetensors file, and the index beside shards, read in linear time and without building a document.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <mlx/dtype.h>

#include "base/files.h"
#include "weights/weights.h"

namespace mlxlm::weights {

struct SafetensorsEntry {
  TensorInfo info;
  mx::Dtype dtype = mx::float32;
  uint64_t begin = 0;  // in the data section
  uint64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  // in the order of their data
  json metadata = json::object();
  uint64_t data_offset = 0;
};

/** Throws Error(bad_weights) for everything that load_safetensors promises to check. */
SafetensorsHeader read_safetensors_header(const MappedFile& file);

/** The file names in the weight_map of model.safetensors.index.json. An index without a weight_map names none.
 *  Throws Error(bad_weights). */
std::set<std::string> read_shard_names(const std::filesystem::path& index);

struct DtypeName {
  std::string_view name;
  mx::Dtype dtype;
};
/** Spellings in files. Types that MLX lacks (F8_*) are read as uint8; the first spelling of a type is the one that is written. */
std::span<const DtypeName> safetensors_dtypes();

}  // namespace mlxlm::weights
