// .safetensors files: checked headers, arrays over the mapping, atomic writing.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>

#include <mlx/device.h>
#include <mlx/io.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "base/files.h"
#include "base/text_util.h"
#include "weights/mapped_array.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

constexpr uint64_t max_header_bytes = 100'000'000;

struct DtypeName {
  const char* name;
  mx::Dtype dtype;
};

const DtypeName dtypes[] = {{"BOOL", mx::bool_},      {"U8", mx::uint8},     {"I8", mx::int8},        {"U16", mx::uint16},
                            {"I16", mx::int16},       {"U32", mx::uint32},   {"I32", mx::int32},      {"U64", mx::uint64},
                            {"I64", mx::int64},       {"F16", mx::float16},  {"BF16", mx::bfloat16},  {"F32", mx::float32},
                            {"F8_E4M3", mx::uint8},   {"F8_E5M2", mx::uint8}, {"F8_E8M0", mx::uint8}};

struct Entry {
  TensorInfo info;
  mx::Dtype dtype = mx::float32;
  uint64_t begin = 0;  // in the data section
};

struct Header {
  std::vector<Entry> entries;
  json metadata = json::object();
  uint64_t data_offset = 0;
};

[[noreturn]] void bad(const std::filesystem::path& file, const std::string& problem) {
  throw Error(Code::bad_weights, file.string(), problem);
}

uint64_t unsigned_number(const json& value, const std::filesystem::path& file, const std::string& name) {
  if (!value.is_number_unsigned()) bad(file, name + ": got " + to_text(value).substr(0, 60) + ", wanted a whole number");
  return value.get<uint64_t>();
}

Entry read_entry(const std::filesystem::path& file, const std::string& name, const json& value) {
  if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") || !value.contains("data_offsets")) {
    bad(file, name + ": wanted dtype, shape and data_offsets");
  }
  Entry entry;
  entry.info.name = name;
  if (!value["dtype"].is_string()) bad(file, name + ": dtype is not a string");
  entry.info.dtype = value["dtype"].get<std::string>();
  const auto* known = std::ranges::find(dtypes, entry.info.dtype, [](const DtypeName& d) { return std::string(d.name); });
  if (known == std::end(dtypes)) bad(file, name + ": dtype " + entry.info.dtype + " is not known");
  entry.dtype = known->dtype;
  if (!value["shape"].is_array() || value["shape"].size() > 16) bad(file, name + ": shape is not a list of at most 16 sizes");
  uint64_t count = 1;
  for (const auto& item : value["shape"]) {
    const uint64_t dim = unsigned_number(item, file, name + ": shape");
    if (dim > INT32_MAX || __builtin_mul_overflow(count, dim, &count)) bad(file, name + ": shape is too large");
    entry.info.shape.push_back(static_cast<int64_t>(dim));
  }
  const auto& offsets = value["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2) bad(file, name + ": data_offsets is not a pair");
  entry.begin = unsigned_number(offsets[0], file, name + ": data_offsets");
  const uint64_t end = unsigned_number(offsets[1], file, name + ": data_offsets");
  uint64_t wanted = 0;
  if (__builtin_mul_overflow(count, uint64_t(mx::size_of(entry.dtype)), &wanted) || end < entry.begin || end - entry.begin != wanted) {
    bad(file, name + ": got data_offsets [" + std::to_string(entry.begin) + ", " + std::to_string(end) + "], wanted " +
                  std::to_string(wanted) + " bytes for its shape");
  }
  entry.info.bytes = static_cast<int64_t>(wanted);
  return entry;
}

void check_layout(const std::filesystem::path& file, std::vector<Entry>& entries, uint64_t data_bytes) {
  std::ranges::sort(entries, [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.info.bytes) < std::pair(b.begin, b.info.bytes); });
  uint64_t end = 0;
  std::set<std::string> names;
  for (const auto& entry : entries) {
    if (!names.insert(entry.info.name).second) bad(file, entry.info.name + ": stands twice in the header");
    if (entry.begin < end) bad(file, entry.info.name + ": overlaps the tensor before it");
    end = entry.begin + static_cast<uint64_t>(entry.info.bytes);
    if (end > data_bytes) {
      bad(file, entry.info.name + ": ends at byte " + std::to_string(end) + " of the data, got only " + std::to_string(data_bytes) +
                    " (is the file truncated?)");
    }
  }
}

Header read_header(const MappedFile& mapped) {
  const auto& file = mapped.path();
  const auto bytes = mapped.bytes();
  if (bytes.size() < 8) bad(file, "got " + std::to_string(bytes.size()) + " bytes, wanted a safetensors header");
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  if (length > max_header_bytes || length > bytes.size() - 8) {
    bad(file, "header of " + std::to_string(length) + " bytes, got a file of " + std::to_string(bytes.size()) + " (is it truncated?)");
  }
  json parsed;
  try {
    parsed = parse_json({reinterpret_cast<const char*>(bytes.data()) + 8, length}, file.string());
  } catch (const Error& e) {
    throw Error(Code::bad_weights, e.what());
  }
  if (!parsed.is_object()) bad(file, "header is not a JSON object");
  Header header;
  header.data_offset = 8 + length;
  for (const auto& [name, value] : parsed.items()) {
    if (name == "__metadata__") header.metadata = value;
    else header.entries.push_back(read_entry(file, name, value));
  }
  check_layout(file, header.entries, bytes.size() - header.data_offset);
  return header;
}

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
  if (const auto index = folder / "model.safetensors.index.json"; std::filesystem::exists(index)) {
    const json map = read_json_file(index);
    if (map.is_object() && map.contains("weight_map") && map["weight_map"].is_object()) {
      for (const auto& [tensor, file] : map["weight_map"].items()) {
        if (!file.is_string()) throw Error(Code::bad_weights, index.string(), tensor + ": wanted a file name");
        const auto path = folder / std::filesystem::path(file.get<std::string>()).filename();
        if (!std::filesystem::exists(path)) {
          throw Error(Code::bad_weights, index.string(), "names " + path.filename().string() + ", which is missing");
        }
      }
    }
  }
  if (files.empty()) throw Error(Code::not_found, folder.string(), "got no model*.safetensors");
  return files;
}

}  // namespace

Checkpoint load_safetensors(const std::filesystem::path& file) {
  const auto mapped = MappedFile::open(file);
  const Header header = read_header(*mapped);
  Checkpoint checkpoint;
  checkpoint.metadata = header.metadata;
  checkpoint.file_bytes = static_cast<int64_t>(mapped->bytes().size());
  if (mx::default_device() != mx::Device::cpu) {
    for (auto& [name, value] : mx::load_safetensors(file.string()).first) checkpoint.tensors.insert_or_assign(name, value);
    return checkpoint;
  }
  for (const auto& entry : header.entries) {
    checkpoint.tensors.insert_or_assign(
        entry.info.name, mapped_array(mapped, header.data_offset + entry.begin, shape_of(entry.info), entry.dtype));
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
      if (!all.tensors.emplace(name, value).second) throw Error(Code::bad_weights, file.string(), name + ": stands in two files");
    }
  }
  return all;
}

std::vector<TensorInfo> list_safetensors(const std::filesystem::path& file) {
  std::vector<TensorInfo> list;
  for (auto& entry : read_header(*MappedFile::open(file)).entries) list.push_back(std::move(entry.info));
  return list;
}

std::vector<TensorInfo> list_folder(const std::filesystem::path& folder) {
  std::vector<TensorInfo> list;
  for (const auto& file : shards(folder)) {
    for (auto& info : list_safetensors(file)) list.push_back(std::move(info));
  }
  return list;
}

void save_safetensors(const std::filesystem::path& file, const Tensors& tensors, const std::map<std::string, std::string>& metadata) {
  json header = json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  std::vector<mx::array> rows;
  for (const auto& [name, value] : tensors) {
    rows.push_back(mx::contiguous(value));
    const auto* known = std::ranges::find(dtypes, value.dtype(), &DtypeName::dtype);
    if (known == std::end(dtypes)) throw Error(Code::unsupported, file.string(), name + ": dtype cannot be stored");
    header[name] = {{"dtype", known->name}, {"shape", std::vector<int>(value.shape().begin(), value.shape().end())},
                    {"data_offsets", {offset, offset + value.nbytes()}}};
    offset += value.nbytes();
  }
  std::string text = to_text(header);
  text.resize((text.size() + 8 + 63) / 64 * 64 - 8, ' ');  // the data begins on a cache line
  const uint64_t length = text.size();
  std::string start(reinterpret_cast<const char*>(&length), 8);
  start += text;

  const std::filesystem::path beside = file.string() + ".tmp" + std::to_string(::getpid());
  const auto fail = [&](const char* verb) {
    const int error = errno;
    ::unlink(beside.c_str());
    throw Error(Code::io, file.string(), std::string("cannot ") + verb + ": " + std::strerror(error));
  };
  const int fd = ::open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) fail("create");
  const auto write_all = [&](const char* data, std::size_t size) {
    while (size > 0) {
      const ssize_t n = ::write(fd, data, size);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) {
        ::close(fd);
        fail("write");
      }
      data += n;
      size -= static_cast<std::size_t>(n);
    }
  };
  write_all(start.data(), start.size());
  for (auto& row : rows) {
    mx::eval(row);
    write_all(row.data<char>(), row.nbytes());
  }
  if (::fsync(fd) != 0) {
    ::close(fd);
    fail("write");
  }
  ::close(fd);
  if (::rename(beside.c_str(), file.c_str()) != 0) fail("rename into place");
}

}  // namespace mlxlm::weights
