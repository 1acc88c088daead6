// Reading the GGUF container. Format: the ggml project's gguf specification.
#include "weights/gguf_reader.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "base/error.h"
#include "weights/names.h"

namespace mlxlm::weights {
namespace {

constexpr uint64_t max_items = 16'000'000;
constexpr uint64_t many_texts = 1000;  // of a list that becomes packed_texts()

std::string gguf_type_name(uint32_t type) {
  static const char* const names[] = {"F32",  "F16",  "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1",
                                      "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"};
  if (type < std::size(names)) return names[type];
  return type == 30 ? "BF16" : "type " + std::to_string(type);
}

class Reader {
 public:
  explicit Reader(const MappedFile& file) : where_(file.path().string()), bytes_(file.bytes()) {}

  [[noreturn]] void fail(const std::string& problem) const { throw Error(Code::bad_weights, where_, problem); }

  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  std::string text() {
    const auto length = number<uint64_t>();
    if (length > bytes_.size()) fail("a string of " + std::to_string(length) + " bytes, longer than the file");
    return std::string(reinterpret_cast<const char*>(take(length)), length);
  }
  json value(uint32_t type, int depth) {
    switch (type) {
      case 0:
        return number<uint8_t>();
      case 1:
        return number<int8_t>();
      case 2:
        return number<uint16_t>();
      case 3:
        return number<int16_t>();
      case 4:
        return number<uint32_t>();
      case 5:
        return number<int32_t>();
      case 6:
        return number<float>();
      case 7:
        return number<uint8_t>() != 0;
      case 8:
        return text();
      case 9:
        return list(depth);
      case 10:
        return number<uint64_t>();
      case 11:
        return number<int64_t>();
      case 12:
        return number<double>();
      default:
        fail("metadata of unknown type " + std::to_string(type));
    }
  }
  uint64_t position() const { return at_; }
  uint64_t size() const { return bytes_.size(); }

 private:
  json list(int depth) {
    if (depth > 4) fail("metadata nested deeper than 4 lists");
    const auto type = number<uint32_t>();
    const auto count = number<uint64_t>();
    if (count > max_items || count > bytes_.size() - at_) fail("a list of " + std::to_string(count) + " values, longer than the file");
    if (type == 8 && count >= many_texts) {
      const auto begin = at_;
      for (uint64_t i = 0; i < count; ++i) {
        const auto length = number<uint64_t>();
        if (length > bytes_.size()) fail("a string of " + std::to_string(length) + " bytes, longer than the file");
        take(length);
      }
      return packed_texts(bytes_.subspan(begin, at_ - begin));
    }
    json values = json::array();
    for (uint64_t i = 0; i < count; ++i) values.push_back(value(type, depth + 1));
    return values;
  }
  const std::byte* take(uint64_t count) {
    if (count > bytes_.size() - at_) fail("ends at byte " + std::to_string(bytes_.size()) + " inside the header (is it truncated?)");
    const auto* data = bytes_.data() + at_;
    at_ += count;
    return data;
  }

  std::string where_;
  std::span<const std::byte> bytes_;
  uint64_t at_ = 0;
};

struct BlockSize {
  uint64_t values, bytes;
};

BlockSize block_of(uint32_t type, const std::string& name, const std::string& where) {
  switch (static_cast<GgufType>(type)) {
    case GgufType::f32:
      return {1, 4};
    case GgufType::f16:
    case GgufType::bf16:
      return {1, 2};
    case GgufType::q4_0:
      return {32, 18};
    case GgufType::q4_1:
      return {32, 20};
    case GgufType::q8_0:
      return {32, 34};
  }
  throw Error(Code::unsupported, where + ": " + shown_name(name),
              "got " + gguf_type_name(type) + ", wanted F32, F16, BF16, Q4_0, Q4_1 or Q8_0");
}

GgufTensor read_tensor(Reader& r) {
  GgufTensor t;
  t.name = r.text();
  const auto axes = r.number<uint32_t>();
  if (axes == 0 || axes > 4) r.fail(shown_name(t.name) + ": got " + std::to_string(axes) + " axes, wanted 1 to 4");
  for (uint32_t i = 0; i < axes; ++i) {
    const auto dim = r.number<uint64_t>();
    if (dim == 0 || dim > INT32_MAX) r.fail(shown_name(t.name) + ": an axis of " + std::to_string(dim));
    t.shape.insert(t.shape.begin(), static_cast<int64_t>(dim));
  }
  t.type = r.number<uint32_t>();
  t.file_offset = r.number<uint64_t>();
  return t;
}

uint64_t bytes_of(const GgufTensor& t, const std::string& where) {
  const BlockSize block = block_of(t.type, t.name, where);
  uint64_t count = 1, bytes = 0;
  for (const auto dim : t.shape) {
    if (__builtin_mul_overflow(count, static_cast<uint64_t>(dim), &count))
      throw Error(Code::bad_weights, where + ": " + shown_name(t.name), "too large");
  }
  if (static_cast<uint64_t>(t.shape.back()) % block.values != 0) {
    throw Error(Code::bad_weights, where + ": " + shown_name(t.name),
                "rows of " + std::to_string(t.shape.back()) + " are not whole blocks");
  }
  if (__builtin_mul_overflow(count / block.values, block.bytes, &bytes))
    throw Error(Code::bad_weights, where + ": " + shown_name(t.name), "too large");
  return bytes;
}

void read_metadata(Reader& r, uint64_t count, GgufFile& file) {
  std::unordered_set<std::string> keys;
  for (uint64_t i = 0; i < count; ++i) {
    std::string key = r.text();
    const auto type = r.number<uint32_t>();
    if (!keys.insert(key).second) r.fail("metadata " + shown_name(key) + " stands twice");
    // Past the look-up of json's own insertion, which compares with every key before it.
    file.metadata.get_ref<json::object_t&>().Container::emplace_back(std::move(key), r.value(type, 0));
  }
}

void read_tensors(Reader& r, uint64_t count, GgufFile& file) {
  std::unordered_set<std::string> names;
  for (uint64_t i = 0; i < count; ++i) {
    file.tensors.push_back(read_tensor(r));
    const auto& name = file.tensors.back().name;
    if (!names.insert(name).second) r.fail(shown_name(name) + ": stands twice");
  }
}

/** Offsets become positions in the file. Overlaps are refused: each tensor is converted on its own, so a small file could ask for any
 * memory. */
void place_tensors(Reader& r, GgufFile& file) {
  uint64_t alignment = 32;
  if (const auto it = file.metadata.find("general.alignment"); it != file.metadata.end()) {
    if (!it->is_number_unsigned() || it->get<uint64_t>() == 0 || it->get<uint64_t>() > 1 << 20) r.fail("general.alignment is out of range");
    alignment = it->get<uint64_t>();
  }
  const uint64_t start = (r.position() + alignment - 1) / alignment * alignment;
  std::vector<const GgufTensor*> by_place;
  for (auto& t : file.tensors) {
    t.bytes = bytes_of(t, file.mapped->path().string());
    if (start > r.size() || t.file_offset > r.size() - start || t.bytes > r.size() - start - t.file_offset) {
      r.fail(shown_name(t.name) + ": lies beyond the end of the file (is it truncated?)");
    }
    t.file_offset += start;
    t.data = reinterpret_cast<const uint8_t*>(file.mapped->bytes().data()) + t.file_offset;
    by_place.push_back(&t);
  }
  std::ranges::sort(by_place, {}, &GgufTensor::file_offset);
  for (std::size_t i = 1; i < by_place.size(); ++i) {
    const auto& before = *by_place[i - 1];
    if (before.file_offset + before.bytes > by_place[i]->file_offset) {
      r.fail(shown_name(by_place[i]->name) + ": overlaps " + shown_name(before.name));
    }
  }
}

}  // namespace

GgufFile read_gguf(const std::filesystem::path& path) {
  GgufFile file;
  file.mapped = MappedFile::open(path);
  Reader r(*file.mapped);
  if (r.size() < 24) r.fail("got " + std::to_string(r.size()) + " bytes, wanted a GGUF header");
  if (r.number<uint32_t>() != 0x46554747u) r.fail("does not begin with GGUF");
  if (const auto version = r.number<uint32_t>(); version != 2 && version != 3) {
    throw Error(Code::unsupported, path.string(), "GGUF version " + std::to_string(version) + ", wanted 2 or 3");
  }
  const auto tensor_count = r.number<uint64_t>(), pair_count = r.number<uint64_t>();
  if (tensor_count > max_items || pair_count > max_items) r.fail("more tensors or metadata than a file can hold");
  read_metadata(r, pair_count, file);
  read_tensors(r, tensor_count, file);
  place_tensors(r, file);
  return file;
}

}  // namespace mlxlm::weights
