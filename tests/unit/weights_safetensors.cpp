// .safetensors files: every dtype, shards, and files made to break the reader.
#include <chrono>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/files.h"
#include "unit/weights_support.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

using namespace tests;

class Safetensors : public TempFolder {
 protected:
  /** What loading and listing `content` say, both. */
  void refuse(const std::string& content, const std::vector<std::string>& parts) {
    const auto file = write("model.safetensors", content);
    auto wanted = parts;
    wanted.push_back("model.safetensors: ");
    expect_error(Code::bad_weights, wanted, [&] { load_safetensors(file); });
    expect_error(Code::bad_weights, wanted, [&] { list_safetensors(file); });
    expect_error(Code::bad_weights, wanted, [&] { load_folder(folder_); });
  }
  /** A tensor named `t` with this entry over `data_bytes` zeros. */
  void refuse_entry(const std::string& entry, const std::vector<std::string>& parts, std::size_t data_bytes = 8) {
    auto wanted = parts;
    wanted.push_back("t: ");
    refuse(safetensors(R"({"t":)" + entry + "}", std::string(data_bytes, '\0')), wanted);
  }
};

std::string entry(const std::string& dtype, const std::string& shape, uint64_t begin, uint64_t end) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) +
         "]}";
}

template <class T>
void expect_values(const mx::array& a, mx::Dtype dtype, const std::vector<T>& values) {
  EXPECT_EQ(a.dtype(), dtype);
  ASSERT_EQ(a.size(), values.size());
  EXPECT_EQ(std::memcmp(a.data<T>(), values.data(), sizeof(T) * values.size()), 0);
}

template <class T>
void expect_dtype(const fs::path& folder, const std::string& name, mx::Dtype dtype, const std::vector<T>& values) {
  const auto file = folder / (name + ".safetensors");
  const std::string data = bytes_of(values);
  // One byte of padding in the header: the data of odd headers is not aligned, and must read the same.
  for (const char* padding : {"", " ", "       "}) {
    std::ofstream(file, std::ios::binary) << safetensors(
        R"({"t":)" + entry(name, "[1," + std::to_string(values.size()) + "]", 0, data.size()) + "}" + padding, data);
    const auto loaded = load_safetensors(file);
    ASSERT_EQ(loaded.tensors.size(), 1u) << name;
    EXPECT_EQ(loaded.tensors.at("t").shape(), (mx::Shape{1, static_cast<int>(values.size())}));
    EXPECT_EQ(loaded.file_bytes, static_cast<int64_t>(fs::file_size(file)));
    expect_values(loaded.tensors.at("t"), dtype, values);
    const auto listed = list_safetensors(file);
    ASSERT_EQ(listed.size(), 1u);
    EXPECT_EQ(listed[0].dtype, name);
    EXPECT_EQ(listed[0].bytes, static_cast<int64_t>(data.size()));
  }
}

TEST_F(Safetensors, EveryDtype) {
  expect_dtype<uint8_t>(folder_, "BOOL", mx::bool_, {0, 1, 1});
  expect_dtype<uint8_t>(folder_, "U8", mx::uint8, {0, 7, 255});
  expect_dtype<int8_t>(folder_, "I8", mx::int8, {-128, 0, 127});
  expect_dtype<uint16_t>(folder_, "U16", mx::uint16, {0, 65535});
  expect_dtype<int16_t>(folder_, "I16", mx::int16, {-32768, 32767});
  expect_dtype<uint32_t>(folder_, "U32", mx::uint32, {0, 4294967295u});
  expect_dtype<int32_t>(folder_, "I32", mx::int32, {INT32_MIN, INT32_MAX});
  expect_dtype<uint64_t>(folder_, "U64", mx::uint64, {0, UINT64_MAX});
  expect_dtype<int64_t>(folder_, "I64", mx::int64, {INT64_MIN, INT64_MAX});
  expect_dtype<uint16_t>(folder_, "F16", mx::float16, {0x3c00, 0xfc00});
  expect_dtype<uint16_t>(folder_, "BF16", mx::bfloat16, {0x3f80, 0xff80});
  expect_dtype<float>(folder_, "F32", mx::float32, {1.5f, -0.f, 1e30f});
  expect_dtype<double>(folder_, "F64", mx::float64, {1.5, 1e300});
  for (const char* packed : {"F8_E4M3", "F8_E5M2", "F8_E8M0"}) expect_dtype<uint8_t>(folder_, packed, mx::uint8, {0, 0x7f, 0xff});
}

TEST_F(Safetensors, ScalarsEmptyTensorsGapsAndMetadata) {
  const std::string header = R"({"b":)" + entry("F32", "[]", 8, 12) + R"(,"none":)" + entry("F32", "[0,5]", 0, 0) +
                             R"(,"__metadata__":{"format":"mlx","note":"x"},"a":)" + entry("U32", "[1]", 4, 8) + "}  ";
  const auto file = write("m.safetensors", safetensors(header, bytes_of<uint32_t>(1) + bytes_of<uint32_t>(2) + bytes_of(3.f)));
  const auto loaded = load_safetensors(file);
  EXPECT_EQ(loaded.tensors.at("a").item<uint32_t>(), 2u);
  EXPECT_EQ(loaded.tensors.at("b").ndim(), 0u);
  EXPECT_EQ(loaded.tensors.at("b").item<float>(), 3.f);
  EXPECT_EQ(loaded.tensors.at("none").shape(), (mx::Shape{0, 5}));
  EXPECT_EQ(loaded.metadata, json({{"format", "mlx"}, {"note", "x"}}));
  const auto empty = write("empty.safetensors", safetensors("{}", ""));
  EXPECT_TRUE(load_safetensors(empty).tensors.empty());
}

TEST_F(Safetensors, ArraysOutliveTheFileAndAreNotWrittenTo) {
  const auto file = write("m.safetensors", safetensors(R"({"t":)" + entry("F32", "[2]", 0, 8) + "}", bytes_of<float>({1.f, 2.f})));
  const std::string before = read_text_file(file);
  auto a = load_safetensors(file).tensors.at("t");
  for (int i = 0; i < 3; ++i) a = a + mx::array(1.f);
  EXPECT_EQ(mx::sum(a).item<float>(), 9.f);
  EXPECT_EQ(read_text_file(file), before);
  auto kept = load_safetensors(file).tensors.at("t");
  fs::remove(file);
  EXPECT_EQ(mx::sum(kept).item<float>(), 3.f);
}

TEST_F(Safetensors, SavedFilesReadBack) {
  const Tensors tensors = {
      {"a", mx::astype(mx::arange(6), mx::float16)}, {"b", mx::transpose(mx::reshape(mx::arange(6), {2, 3}))}, {"c", mx::array(true)}};
  const auto file = folder_ / "out.safetensors";
  save_safetensors(file, tensors, {{"format", "mlx"}});
  const auto loaded = load_safetensors(file);
  ASSERT_EQ(loaded.tensors.size(), 3u);
  for (const auto& [name, value] : tensors) {
    EXPECT_EQ(loaded.tensors.at(name).dtype(), value.dtype()) << name;
    EXPECT_TRUE(mx::array_equal(loaded.tensors.at(name), value).item<bool>()) << name;
  }
  EXPECT_EQ(loaded.metadata["format"], "mlx");
  expect_error(Code::io, {"cannot create"}, [&] { save_safetensors(folder_ / "no" / "such.safetensors", tensors); });
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1) << "only the file itself is left";
}

TEST_F(Safetensors, Folders) {
  const auto one = [](const std::string& name, float value) {
    return safetensors(R"({")" + name + R"(":)" + entry("F32", "[]", 0, 4) + "}", bytes_of(value));
  };
  expect_error(Code::not_found, {folder_.string(), "got no model*.safetensors"}, [&] { load_folder(folder_); });
  expect_error(Code::not_found, {"got no model*.safetensors"}, [&] { load_folder(folder_ / "absent"); });
  write("adapters.safetensors", one("z", 0));  // not a part of the model
  expect_error(Code::not_found, {"got no model*.safetensors"}, [&] { list_folder(folder_); });
  write("model-00001-of-00002.safetensors", one("a", 1));
  write("model-00002-of-00002.safetensors", one("b", 2));
  const auto check = [&] {
    const auto loaded = load_folder(folder_);
    ASSERT_EQ(loaded.tensors.size(), 2u);
    EXPECT_EQ(loaded.tensors.at("b").item<float>(), 2.f);
    EXPECT_EQ(list_folder(folder_).size(), 2u);
  };
  check();
  write("model.safetensors.index.json", R"({"metadata": {"total_size": 8, "weight_map": "no"},
      "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})");
  check();
  for (const char* without : {"{}", "[]", R"({"weight_map": 3})"}) {
    write("model.safetensors.index.json", without);
    check();
  }
  write("model-00003-of-00003.safetensors", one("b", 2));
  expect_error(Code::bad_weights, {"model-00003-of-00003.safetensors: b: stands in two files"}, [&] { load_folder(folder_); });
}

TEST_F(Safetensors, BadIndex) {
  write("model.safetensors", safetensors("{}", ""));
  const std::pair<std::string, std::string> cases[] = {
      {R"({"weight_map": {"a": "model-00001-of-00002.safetensors"}})", "names model-00001-of-00002.safetensors, which is missing"},
      {R"({"weight_map": {"a": "../../../etc/passwd"}})", "names ../../../etc/passwd, which is missing"},
      {R"({"weight_map": {"a": ""}})", "names , which is missing"},
      {R"({"weight_map": {"a": ".."}})", "names .., which is missing"},
      {R"({"weight_map": {"a": 3}})", "a: got 3, wanted a file name"},
      {R"({"weight_map": {"a": ["x"]}})", "a: got an object or a list, wanted a file name"},
      {R"({"weight_map": {"a": "model.safetensors")", "the index is not JSON at byte"},
      {"", "the index is not JSON at byte"},
      {std::string(100'000, '['), "nested deeper than 512"},
      {R"({"weight_map": {"a": ")" + std::string(100'000, 'x') + R"("}})", "xxx..., which is missing"},
  };
  for (const auto& [index, message] : cases) {
    write("model.safetensors.index.json", index);
    expect_error(Code::bad_weights, {"model.safetensors.index.json: ", message}, [&] { load_folder(folder_); });
  }
}

TEST_F(Safetensors, BadFrame) {
  refuse("", {"got 0 bytes, wanted a safetensors header"});
  refuse("1234567", {"got 7 bytes"});
  refuse(bytes_of<uint64_t>(0), {"header is not JSON at byte"});
  refuse(bytes_of<uint64_t>(1) + std::string(), {"header of 1 bytes, got a file of 8"});
  refuse(bytes_of<uint64_t>(20) + "{}", {"header of 20 bytes"});
  refuse(bytes_of(UINT64_MAX) + "{}", {"header of 18446744073709551615 bytes"});
  refuse(bytes_of(UINT64_MAX - 7) + "{}", {"header of "});
  const auto folder = folder_ / "model-folder.safetensors";
  fs::create_directory(folder);
  expect_error(Code::io, {"not a regular file"}, [&] { load_safetensors(folder); });
  expect_error(Code::not_found, {"absent.safetensors"}, [&] { load_safetensors(folder_ / "absent.safetensors"); });
}

TEST_F(Safetensors, BadHeader) {
  for (const std::string text : {"", "{", "{}}", "nope", "{\"a\":", "{\"a\" 1}", "{\"\xff\": 1}", "{'a':1}", "{} {}"}) {
    refuse(safetensors(text, ""), {"header is not JSON at byte"});
  }
  for (const std::string text : {"[]", "3", "null", "\"text\"", "-1.5"}) refuse(safetensors(text, ""), {"header is not a JSON object"});
  const std::string good = entry("F32", "[2]", 0, 8);
  refuse(safetensors(R"({"t":)" + good + R"(,"t":)" + good + "}", std::string(8, '\0')), {"t: stands twice in the header"});
  refuse(safetensors(R"({"__metadata__":{},"__metadata__":{}})", ""), {"__metadata__ stands twice"});
  refuse(safetensors(R"({"__metadata__":{"a":"b","a":"c"}})", ""), {"__metadata__.a: stands twice"});
  refuse(safetensors(R"({"__metadata__":{"a":1}})", ""), {"__metadata__.a: got 1, wanted a text"});
  refuse(safetensors(R"({"__metadata__":[]})", ""), {"__metadata__: got a list, wanted an object of texts"});
  for (const char* open : {"[", "{\"t\":"}) {
    std::string deep;
    for (int i = 0; i < 100'000; ++i) deep += open;
    refuse(safetensors(deep, ""), {open[0] == '[' ? "header is not a JSON object" : "t: got an object"});
    refuse(safetensors(R"({"t":)" + deep, ""), {"t: "});
    refuse(safetensors(R"({"t":{"shape":)" + deep, ""), {"t: "});
  }
}

TEST_F(Safetensors, BadEntries) {
  for (const std::string value : {"3", "null", "[]", "\"F32\"", "{}", R"({"dtype":"F32","shape":[2]})",
                                  R"({"dtype":"F32","data_offsets":[0,8]})", R"({"shape":[2],"data_offsets":[0,8]})"}) {
    refuse_entry(value, {"wanted dtype, shape and data_offsets"});
  }
  refuse_entry(R"({"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]})", {"dtype stands twice"});
  refuse_entry(R"({"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]})", {"shape stands twice"});
  refuse_entry(R"({"dtype":7,"shape":[2],"data_offsets":[0,8]})", {"dtype: got 7, wanted a text"});
  refuse_entry(entry("F31", "[2]", 0, 8), {"dtype F31 is not known"});
  refuse_entry(entry("", "[2]", 0, 8), {"is not known"});
  refuse_entry(entry(std::string(100'000, 'F'), "[2]", 0, 8), {"FFF... is not known"});
  refuse_entry(entry("F32", "2", 0, 8), {"shape: got 2, wanted a list of sizes"});
  refuse_entry(entry("F32", "[-2]", 0, 8), {"shape: got -2, wanted whole numbers"});
  refuse_entry(entry("F32", "[2.0]", 0, 8), {"shape: got 2.0, wanted whole numbers"});
  refuse_entry(entry("F32", "[[2]]", 0, 8), {"shape: got a list, wanted whole numbers"});
  refuse_entry(entry("F32", "[\"2\"]", 0, 8), {"shape: got a text, wanted whole numbers"});
  refuse_entry(entry("F32", "[2147483648]", 0, 8), {"shape is too large"});
  refuse_entry(entry("F32", "[18446744073709551616]", 0, 8), {"shape: got 18446744073709551616, wanted whole numbers"});
  refuse_entry(entry("F32", "[2147483647,2147483647,4,1]", 0, 8), {"shape is too large"});
  refuse_entry(entry("F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2]", 0, 8), {"at most 16 sizes"});
  refuse_entry(entry("F32", "[2147483647]", 0, 8589934588), {"ends at byte 8589934588 of the data, got only 8 (is the file truncated?)"});
  refuse_entry(entry("F32", "[2]", 0, 4), {"got data_offsets [0, 4], wanted 8 bytes for its shape"});
  refuse_entry(entry("F32", "[2]", 0, 9), {"got data_offsets [0, 9], wanted 8 bytes for its shape"});
  refuse_entry(entry("F32", "[2]", 8, 0), {"got data_offsets [8, 0], wanted 8 bytes"});
  refuse_entry(entry("F32", "[2]", 1, 9), {"ends at byte 9"});
  refuse_entry(entry("F32", "[2]", UINT64_MAX - 7, UINT64_MAX), {"wanted 8 bytes"});
  refuse_entry(entry("F32", "[0]", 9, 9), {"ends at byte 9"});
  refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})", {"data_offsets is not a pair"});
  refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4,8]})", {"data_offsets is not a pair"});
  refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[-8,0]})", {"data_offsets: got -8, wanted whole numbers"});
  refuse_entry(R"({"dtype":"F32","shape":[2],"data_offsets":8})", {"data_offsets: got 8, wanted a pair"});
}

TEST_F(Safetensors, Overlaps) {
  const auto both = [&](uint64_t begin, uint64_t end, const std::string& shape) {
    refuse(safetensors(R"({"a":)" + entry("U8", "[8]", 0, 8) + R"(,"b":)" + entry("U8", shape, begin, end) + "}", std::string(16, '\0')),
           {": overlaps the tensor before it"});
  };
  both(7, 15, "[8]");
  both(0, 8, "[8]");
  both(2, 4, "[2]");
}

TEST_F(Safetensors, NamesInMessagesAreShortAndOnOneLine) {
  refuse(safetensors(R"({"a\nb)" + std::string(100'000, 'n') + R"(": 3})", ""), {"a?bnnn", "nnn...: got 3"});
}

TEST_F(Safetensors, EveryTruncationIsRefused) {
  const std::string whole = safetensors(R"({"a":)" + entry("F32", "[2]", 0, 8) + R"(,"__metadata__":{"k":"v"}})", bytes_of<float>({1, 2}));
  const auto file = write("m.safetensors", whole);
  EXPECT_EQ(load_safetensors(file).tensors.size(), 1u);
  for (std::size_t length = whole.size(); length-- > 0;) {
    fs::resize_file(file, length);
    expect_error(Code::bad_weights, {"m.safetensors: "}, [&] { load_safetensors(file); });
  }
}

TEST_F(Safetensors, HugeHeadersTakeLinearTime) {
  std::string header = R"({"__metadata__":{)", index = R"({"weight_map":{)";
  for (int i = 0; i < 50'000; ++i) header += (i > 0 ? ",\"key" : "\"key") + std::to_string(i) + R"(":"v")";
  header += "}";
  for (int i = 0; i < 50'000; ++i) {
    const std::string name = "\"model.layers.0.mlp.experts." + std::to_string(i) + ".weight\":";
    header += "," + name + entry("U8", "[1]", i, i + 1);
    index += (i > 0 ? "," : "") + name + "\"model.safetensors\"";
  }
  write("model.safetensors.index.json", index + "}}");
  write("model.safetensors", safetensors(header + "}", std::string(50'000, '\1')));
  const auto start = std::chrono::steady_clock::now();
  const auto loaded = load_folder(folder_);
  EXPECT_EQ(loaded.tensors.size(), 50'000u);
  EXPECT_EQ(loaded.metadata.size(), 50'000u);
  EXPECT_LT(std::chrono::steady_clock::now() - start, bound(5));
}

}  // namespace
}  // namespace mlxlm::weights
