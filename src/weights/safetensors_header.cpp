// Checked reading of headers. Format: the safetensors project's specification.
#include "weights/safetensors_header.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_set>

#include "base/error.h"
#include "weights/names.h"

namespace mlxlm::weights {
namespace {

constexpr uint64_t max_header_bytes = 100'000'000;
constexpr std::size_t max_axes = 16;

constexpr DtypeName dtypes[] = {{"BOOL", mx::bool_},   {"U8", mx::uint8},      {"I8", mx::int8},       {"U16", mx::uint16},
                                {"I16", mx::int16},    {"U32", mx::uint32},    {"I32", mx::int32},     {"U64", mx::uint64},
                                {"I64", mx::int64},    {"F16", mx::float16},   {"BF16", mx::bfloat16}, {"F32", mx::float32},
                                {"F64", mx::float64},  {"C64", mx::complex64}, {"F8_E4M3", mx::uint8}, {"F8_E5M2", mx::uint8},
                                {"F8_E8M0", mx::uint8}};

/** Events of a JSON text with a fixed form. A callback of a subclass throws for what does not belong where it stands. */
class Events : public nlohmann::json_sax<json> {
 public:
  explicit Events(std::string where) : where_(std::move(where)) {}
  [[noreturn]] void fail(const std::string& problem) const { throw Error(Code::bad_weights, where_, problem); }

  bool boolean(bool) override { return scalar("true or false"); }
  bool number_integer(number_integer_t value) override { return scalar(std::to_string(value)); }
  bool number_unsigned(number_unsigned_t value) override { return scalar(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return scalar(shown_name(text)); }
  bool null() override { return scalar("null"); }
  bool binary(binary_t&) override { return false; }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    fail(what_ + " is not JSON at byte " + std::to_string(position));
  }

 protected:
  virtual bool scalar(const std::string& shown) = 0;
  std::string what_ = "header";

 private:
  std::string where_;
};

class HeaderEvents final : public Events {
 public:
  HeaderEvents(std::string where, SafetensorsHeader& header) : Events(std::move(where)), header_(header) {}

  bool start_object(std::size_t) override {
    if (at_ == At::start)
      at_ = At::names;
    else if (at_ == At::tensor_value)
      at_ = At::tensor;
    else if (at_ == At::metadata_value)
      at_ = At::metadata;
    else
      misplaced("an object");
    return true;
  }
  bool end_object() override {
    if (at_ == At::tensor) finish_tensor();
    if (at_ == At::metadata) metadata_seen_ = true;
    at_ = at_ == At::names ? At::start : At::names;
    return true;
  }
  bool start_array(std::size_t) override {
    if (at_ == At::shape_value)
      at_ = At::shape;
    else if (at_ == At::offsets_value)
      at_ = At::offsets;
    else
      misplaced("a list");
    return true;
  }
  bool end_array() override {
    at_ = At::tensor;
    return true;
  }
  bool key(string_t& key) override {
    if (at_ == At::names) {
      name_ = key;
      if (key == "__metadata__" && metadata_seen_) fail("__metadata__ stands twice in the header");
      at_ = key == "__metadata__" ? At::metadata_value : At::tensor_value;
      dtype_.reset();
      shape_.reset();
      offsets_.reset();
    } else if (at_ == At::metadata) {
      field_ = key;
    } else {
      tensor_key(key);
    }
    return true;
  }
  bool string(string_t& text) override {
    if (at_ == At::dtype_value)
      dtype_ = text;
    else if (at_ == At::metadata)
      return keep_metadata(text);
    else if (at_ != At::ignored_value)
      misplaced("a text");
    at_ = At::tensor;
    return true;
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (at_ == At::shape) {
      if (shape_->size() == max_axes) bad(name_, "shape is not a list of at most 16 sizes");
      shape_->push_back(value);
    } else if (at_ == At::offsets) {
      offsets_->push_back(value);
      if (offsets_->size() > 2) bad(name_, "data_offsets is not a pair");
    } else {
      return scalar(std::to_string(value));
    }
    return true;
  }

 protected:
  bool scalar(const std::string& shown) override {
    if (at_ == At::ignored_value)
      at_ = At::tensor;
    else if (at_ == At::metadata_value && shown == "null")
      at_ = At::names;
    else
      misplaced(shown);
    return true;
  }

 private:
  enum class At {
    start,
    names,
    tensor_value,
    tensor,
    metadata_value,
    metadata,
    dtype_value,
    shape_value,
    shape,
    offsets_value,
    offsets,
    ignored_value
  };

  [[noreturn]] void bad(const std::string& name, const std::string& problem) const { fail(shown_name(name) + ": " + problem); }

  [[noreturn]] void misplaced(const std::string& got) const {
    switch (at_) {
      case At::start:
        fail("header is not a JSON object");
      case At::names:
        fail("header: got " + got + " instead of a name");
      case At::tensor_value:
        bad(name_, "got " + got + ", wanted dtype, shape and data_offsets");
      case At::dtype_value:
        bad(name_, "dtype: got " + got + ", wanted a text");
      case At::shape_value:
        bad(name_, "shape: got " + got + ", wanted a list of sizes");
      case At::shape:
        bad(name_, "shape: got " + got + ", wanted whole numbers");
      case At::offsets_value:
        bad(name_, "data_offsets: got " + got + ", wanted a pair");
      case At::offsets:
        bad(name_, "data_offsets: got " + got + ", wanted whole numbers");
      case At::metadata_value:
        bad(name_, "got " + got + ", wanted an object of texts");
      case At::metadata:
        bad(name_ + "." + field_, "got " + got + ", wanted a text");
      default:
        bad(name_, "got " + got + " where it does not belong");
    }
  }

  template <class T>
  void once(std::optional<T>& field, const std::string& key) const {
    if (field) bad(name_, key + " stands twice");
    field.emplace();
  }
  void tensor_key(const std::string& key) {
    if (key == "dtype") {
      once(dtype_, key);
      at_ = At::dtype_value;
    } else if (key == "shape") {
      once(shape_, key);
      at_ = At::shape_value;
    } else if (key == "data_offsets") {
      once(offsets_, key);
      at_ = At::offsets_value;
    } else {
      at_ = At::ignored_value;
    }
  }
  bool keep_metadata(const std::string& text) {
    if (!metadata_keys_.insert(field_).second) bad(name_ + "." + field_, "stands twice");
    // Past the look-up of json's own insertion, which compares with every key before it.
    header_.metadata.get_ref<json::object_t&>().Container::emplace_back(field_, text);
    return true;
  }
  void finish_tensor() {
    if (!dtype_ || !shape_ || !offsets_) bad(name_, "wanted dtype, shape and data_offsets");
    if (offsets_->size() != 2) bad(name_, "data_offsets is not a pair");
    SafetensorsEntry entry;
    const auto* known = std::ranges::find(dtypes, std::string_view(*dtype_), &DtypeName::name);
    if (known == std::end(dtypes)) bad(name_, "dtype " + shown_name(*dtype_) + " is not known");
    entry.dtype = known->dtype;
    uint64_t bytes = mx::size_of(known->dtype);
    for (const uint64_t dim : *shape_) {
      if (dim > INT32_MAX || __builtin_mul_overflow(bytes, dim, &bytes)) bad(name_, "shape is too large");
      entry.info.shape.push_back(static_cast<int64_t>(dim));
    }
    entry.begin = offsets_->at(0);
    entry.end = offsets_->at(1);
    if (entry.end < entry.begin || entry.end - entry.begin != bytes || bytes > INT64_MAX) {
      bad(name_, "got data_offsets [" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) + "], wanted " +
                     std::to_string(bytes) + " bytes for its shape");
    }
    entry.info.name = name_;
    entry.info.dtype = *dtype_;
    entry.info.bytes = static_cast<int64_t>(bytes);
    header_.entries.push_back(std::move(entry));
  }

  SafetensorsHeader& header_;
  At at_ = At::start;
  std::string name_, field_;
  bool metadata_seen_ = false;
  std::unordered_set<std::string> metadata_keys_;
  std::optional<std::string> dtype_;
  std::optional<std::vector<uint64_t>> shape_, offsets_;
};

/** Collects the texts directly inside "weight_map"; everything else of an index means nothing to loading. */
class IndexEvents final : public Events {
 public:
  IndexEvents(std::string where, std::set<std::string>& files) : Events(std::move(where)), files_(files) { what_ = "the index"; }

  bool start_object(std::size_t) override { return enter(depth_ == 1 && key_ == "weight_map"); }
  bool start_array(std::size_t) override { return enter(false); }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }
  bool key(string_t& key) override {
    key_ = key;
    return true;
  }
  bool string(string_t& text) override {
    if (in_map_ && depth_ == 2) files_.insert(text);
    return true;
  }

 protected:
  bool scalar(const std::string& shown) override {
    if (in_map_ && depth_ == 2) fail(shown_name(key_) + ": got " + shown + ", wanted a file name");
    return true;
  }

 private:
  bool enter(bool map) {
    if (in_map_ && depth_ == 2) fail(shown_name(key_) + ": got an object or a list, wanted a file name");
    constexpr int max_depth = 512;  // of the same size as for other JSON; the parser itself keeps one bit a level
    if (++depth_ > max_depth) fail("the index is nested deeper than 512 levels");
    in_map_ = in_map_ || map;
    return true;
  }
  bool leave() {
    if (depth_-- == 2) in_map_ = false;
    return true;
  }

  std::set<std::string>& files_;
  std::string key_;
  int depth_ = 0;
  bool in_map_ = false;
};

void check_layout(const std::string& file, std::vector<SafetensorsEntry>& entries, uint64_t data_bytes) {
  const auto bad = [&](const SafetensorsEntry& entry, const std::string& problem) {
    throw Error(Code::bad_weights, file, shown_name(entry.info.name) + ": " + problem);
  };
  std::ranges::stable_sort(entries, {}, [](const SafetensorsEntry& e) { return std::pair(e.begin, e.end); });
  uint64_t end = 0;
  std::unordered_set<std::string_view> names;
  for (const auto& entry : entries) {
    if (!names.insert(entry.info.name).second) bad(entry, "stands twice in the header");
    if (entry.begin < end) bad(entry, "overlaps the tensor before it");
    end = entry.end;
    if (end > data_bytes) {
      bad(entry,
          "ends at byte " + std::to_string(end) + " of the data, got only " + std::to_string(data_bytes) + " (is the file truncated?)");
    }
  }
}

}  // namespace

std::span<const DtypeName> safetensors_dtypes() {
  return dtypes;
}

SafetensorsHeader read_safetensors_header(const MappedFile& mapped) {
  const std::string file = mapped.path().string();
  const auto bytes = mapped.bytes();
  if (bytes.size() < 8) {
    throw Error(Code::bad_weights, file, "got " + std::to_string(bytes.size()) + " bytes, wanted a safetensors header");
  }
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  if (length > max_header_bytes || length > bytes.size() - 8) {
    throw Error(Code::bad_weights, file,
                "header of " + std::to_string(length) + " bytes, got a file of " + std::to_string(bytes.size()) + " (is it truncated?)");
  }
  SafetensorsHeader header;
  header.data_offset = 8 + length;
  HeaderEvents events(file, header);
  const char* text = reinterpret_cast<const char*>(bytes.data()) + 8;
  json::sax_parse(text, text + length, &events);
  check_layout(file, header.entries, bytes.size() - header.data_offset);
  return header;
}

std::set<std::string> read_shard_names(const std::filesystem::path& index) {
  std::set<std::string> files;
  const auto mapped = MappedFile::open(index);
  IndexEvents events(index.string(), files);
  const char* text = reinterpret_cast<const char*>(mapped->bytes().data());
  json::sax_parse(text, text + mapped->bytes().size(), &events);
  return files;
}

}  // namespace mlxlm::weights
