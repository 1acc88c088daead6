// .safetensors files: arrays over the mapping, atomic writing.
#include <fcntl.h>

#include <algorithm>

#include <mlx/device.h>
#include <mlx/io.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "base/files.h"
#include "base/text_util.h"
#include "weights/mapped_array.h"
#include "weights/names.h"
#include "weights/safetensors_header.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

mx::Shape shape_of(const TensorInfo& info) {
  mx::Shape shape;
  for (const auto dim : info.shape) shape.push_back(static_cast<int>(dim));
  return shape;
}

std::vector<std::filesystem::path> shards(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> files;
  std::error_code ignored;
  for (const auto& item : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = item.path().filename().string();
    if (glob_match("model*.safetensors", name)) files.push_back(item.path());
  }
  std::ranges::sort(files);
  if (const auto index = folder / "model.safetensors.index.json"; std::filesystem::exists(index, ignored)) {
    for (const auto& file : read_shard_names(index)) {
      const auto path = folder / std::filesystem::path(file).filename();
      if (!std::filesystem::is_regular_file(path, ignored)) {
        throw Error(Code::bad_weights, index.string(), "names " + shown_name(file) + ", which is missing");
      }
    }
  }
  if (files.empty()) throw Error(Code::not_found, folder.string(), "got no model*.safetensors");
  return files;
}

}  // namespace

Checkpoint load_safetensors(const std::filesystem::path& file) {
  const auto mapped = MappedFile::open(file);
  const auto header = read_safetensors_header(*mapped);
  Checkpoint checkpoint;
  checkpoint.metadata = header.metadata;
  checkpoint.file_bytes = static_cast<int64_t>(mapped->bytes().size());
  if (mx::default_device() != mx::Device::cpu) {
    for (auto& [name, value] : mx::load_safetensors(file.string()).first) checkpoint.tensors.insert_or_assign(name, value);
    return checkpoint;
  }
  for (const auto& entry : header.entries) {
    checkpoint.tensors.insert_or_assign(entry.info.name,
                                        mapped_array(mapped, header.data_offset + entry.begin, shape_of(entry.info), entry.dtype));
  }
  return checkpoint;
}

Checkpoint load_folder(const std::filesystem::path& folder) {
  Checkpoint all;
  for (const auto& file : shards(folder)) {
    Checkpoint part = load_safetensors(file);
    if (all.metadata.empty()) all.metadata = part.metadata;
    all.file_bytes += part.file_bytes;
    for (auto& [name, value] : part.tensors) {
      if (!all.tensors.emplace(name, value).second)
        throw Error(Code::bad_weights, file.string(), shown_name(name) + ": stands in two files");
    }
  }
  return all;
}

std::vector<TensorInfo> list_safetensors(const std::filesystem::path& file) {
  std::vector<TensorInfo> list;
  for (auto& entry : read_safetensors_header(*MappedFile::open(file)).entries) list.push_back(std::move(entry.info));
  return list;
}

std::vector<TensorInfo> list_folder(const std::filesystem::path& folder) {
  std::vector<TensorInfo> list;
  for (const auto& file : shards(folder)) {
    for (auto& info : list_safetensors(file)) list.push_back(std::move(info));
  }
  return list;
}

std::string safetensors_start(const std::string& where, const Tensors& tensors, const std::map<std::string, std::string>& metadata) {
  const auto dtypes = safetensors_dtypes();
  json header = json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const auto& [name, value] : tensors) {
    const auto known = std::ranges::find(dtypes, value.dtype(), &DtypeName::dtype);
    if (known == dtypes.end()) throw Error(Code::unsupported, where, shown_name(name) + ": dtype cannot be stored");
    json entry = {{"dtype", known->name},
                  {"shape", std::vector<int>(value.shape().begin(), value.shape().end())},
                  {"data_offsets", {offset, offset + value.nbytes()}}};
    header.get_ref<json::object_t&>().Container::emplace_back(name, std::move(entry));  // json's own insertion compares with every key
    offset += value.nbytes();
  }
  std::string text = to_text(header);
  text.resize((text.size() + 8 + 63) / 64 * 64 - 8, ' ');  // the data begins on a cache line
  const uint64_t length = text.size();
  std::string start(reinterpret_cast<const char*>(&length), 8);
  start += text;
  return start;
}

void save_safetensors(const std::filesystem::path& file, const Tensors& tensors, const std::map<std::string, std::string>& metadata) {
  const auto start = safetensors_start(file.string(), tensors, metadata);
  NewFile to(file);
  to.write(start);
  for (const auto& [name, value] : tensors) {
    auto row = mx::contiguous(value);  // one copy at a time
    mx::eval(row);
    to.write({row.data<char>(), row.nbytes()});
  }
  to.put_into_place();
}

}  // namespace mlxlm::weights
