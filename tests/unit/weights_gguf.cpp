// GGUF files written by hand: values by formula, names, config, and files made to break the reader.
#include <cmath>
#include <functional>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "unit/weights_support.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

using namespace tests;

enum Type : uint32_t { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, BF16 = 30 };

std::string text(const std::string& s) {
  return bytes_of<uint64_t>(s.size()) + s;
}
std::string pair(const std::string& key, uint32_t value) {
  return text(key) + bytes_of<uint32_t>(4) + bytes_of(value);
}
std::string pair(const std::string& key, float value) {
  return text(key) + bytes_of<uint32_t>(6) + bytes_of(value);
}
std::string pair(const std::string& key, const std::string& value) {
  return text(key) + bytes_of<uint32_t>(8) + text(value);
}
std::string list_head(const std::string& key, uint32_t type, uint64_t count) {
  return text(key) + bytes_of<uint32_t>(9) + bytes_of(type) + bytes_of(count);
}

struct Tensor {
  std::string name;
  uint32_t type;
  std::vector<uint64_t> shape;  // rows first
  std::string data;
};

/** The parts of a file, to be changed before it is put together. */
struct File {
  std::string magic = "GGUF";
  uint32_t version = 3;
  std::vector<std::string> pairs{};
  std::vector<Tensor> tensors{};
  std::optional<uint64_t> tensor_count{}, pair_count{};
  std::function<uint64_t(std::size_t, uint64_t)> offset = [](std::size_t, uint64_t at) { return at; };

  std::string bytes() const {
    std::string out = magic + bytes_of(version) + bytes_of<uint64_t>(tensor_count.value_or(tensors.size())) +
                      bytes_of<uint64_t>(pair_count.value_or(pairs.size()));
    for (const auto& p : pairs) out += p;
    std::string data;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const auto& t = tensors[i];
      data.resize((data.size() + 31) / 32 * 32, '\0');
      out += text(t.name) + bytes_of<uint32_t>(static_cast<uint32_t>(t.shape.size()));
      for (auto dim = t.shape.rbegin(); dim != t.shape.rend(); ++dim) out += bytes_of(*dim);
      out += bytes_of(t.type) + bytes_of(offset(i, data.size()));
      data += t.data;
    }
    out.resize((out.size() + 31) / 32 * 32, '\0');
    return out + data;
  }
};

uint16_t half(float value) {
  const mx::float16_t h = static_cast<mx::float16_t>(value);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

/** Deterministic bytes that are not all alike. */
std::string noise(std::size_t count, uint32_t seed = 1) {
  std::string out(count, '\0');
  for (auto& c : out) c = static_cast<char>((seed = seed * 1664525u + 1013904223u) >> 24);
  return out;
}

std::string floats(std::size_t count, float start = 0.5f) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = start + 0.25f * static_cast<float>(i);
  return bytes_of(values);
}

/** Blocks of 32 with these scales (and, for Q4_1, minima) over noisy codes. */
std::string blocks(uint32_t type, const std::vector<float>& scales, uint32_t seed = 7) {
  std::string out;
  for (const float scale : scales) {
    out += bytes_of(half(scale));
    if (type == Q4_1) out += bytes_of(half(-2.5f * scale));
    out += noise(type == Q8_0 ? 32 : 16, seed++);
  }
  return out;
}

/** What ggml's dequantize_row_* gives. */
std::vector<float> expected(uint32_t type, const std::string& data) {
  const std::size_t head = type == Q4_1 ? 4 : 2, size = head + (type == Q8_0 ? 32 : 16);
  std::vector<float> values;
  for (std::size_t at = 0; at < data.size(); at += size) {
    mx::float16_t d, m;
    std::memcpy(&d, data.data() + at, 2);
    std::memcpy(&m, data.data() + at + 2, 2);
    const auto* q = reinterpret_cast<const uint8_t*>(data.data()) + at + head;
    for (int i = 0; i < 32; ++i) {
      const int nibble = i < 16 ? q[i] & 15 : q[i - 16] >> 4;
      const int code = type == Q8_0 ? static_cast<int8_t>(q[i]) : type == Q4_0 ? nibble - 8 : nibble;
      values.push_back(static_cast<float>(code) * static_cast<float>(d) + (type == Q4_1 ? static_cast<float>(m) : 0.f));
    }
  }
  return values;
}

std::vector<float> values_of(const mx::array& a) {
  auto f = mx::contiguous(mx::astype(a, mx::float32));
  mx::eval(f);
  return {f.data<float>(), f.data<float>() + f.size()};
}

/** codes * scale + bias in float32. */
std::vector<float> values_of(const Tensors& tensors, const std::string& module, int bits) {
  const auto wide = [&](const char* leaf) { return mx::astype(tensors.at(module + leaf), mx::float32); };
  return values_of(mx::dequantize(tensors.at(module + ".weight"), wide(".scales"), wide(".biases"), 32, bits));
}

std::vector<std::string> llama_pairs() {
  return {pair("general.architecture", std::string("llama")),
          pair("llama.embedding_length", 32u),
          pair("llama.block_count", 1u),
          pair("llama.feed_forward_length", 64u),
          pair("llama.attention.head_count", 2u),
          pair("llama.attention.head_count_kv", 1u),
          pair("llama.attention.layer_norm_rms_epsilon", 1e-5f),
          pair("llama.rope.freq_base", 5e5f)};
}

class GgufFile : public TempFolder {
 protected:
  File file{.pairs = llama_pairs()};
  Gguf load(bool with_tensors = true) const { return load_gguf(write("m.gguf", file.bytes()), with_tensors); }
  void refuse(Code code, const std::vector<std::string>& parts) const { refuse(file.bytes(), code, parts); }
  void refuse(const std::string& bytes, Code code, std::vector<std::string> parts) const {
    const auto path = write("m.gguf", bytes);
    parts.push_back("m.gguf: ");
    expect_error(code, parts, [&] { load_gguf(path); });
    expect_error(code, parts, [&] { load_gguf(path, false); });
  }
};

TEST_F(GgufFile, DenseValues) {
  file.tensors = {{"token_embd.weight", F16, {3, 4}, noise(24)},
                  {"output.weight", BF16, {3, 4}, noise(24, 5)},
                  {"blk.0.ffn_down.weight", F32, {2, 3}, floats(6)},
                  {"output_norm.weight", F32, {5}, floats(5)}};
  const auto got = load();
  const auto& t = got.checkpoint.tensors;
  ASSERT_EQ(t.size(), 4u);
  const auto raw = [&](const std::string& name, mx::Dtype dtype, mx::Shape shape, const std::string& data) {
    ASSERT_TRUE(t.contains(name)) << name;
    EXPECT_EQ(t.at(name).dtype(), dtype);
    EXPECT_EQ(t.at(name).shape(), shape);
    EXPECT_EQ(std::memcmp(t.at(name).data<void>(), data.data(), data.size()), 0) << name;
  };
  raw("model.embed_tokens.weight", mx::float16, {3, 4}, noise(24));
  raw("lm_head.weight", mx::bfloat16, {3, 4}, noise(24, 5));
  raw("model.layers.0.mlp.down_proj.weight", mx::float32, {2, 3}, floats(6));
  raw("model.norm.weight", mx::float32, {5}, floats(5));
  EXPECT_FALSE(got.config.contains("quantization"));
}

TEST_F(GgufFile, QuantizedValuesAreExact) {
  const std::vector<float> scales = {0.01f, -0.5f, 3.f, 1e-7f};  // the last is subnormal
  for (const uint32_t type : {Q4_0, Q4_1, Q8_0}) {
    const std::string data = blocks(type, scales);
    file.tensors = {{"blk.0.ffn_up.weight", type, {2, 64}, data}};
    const auto got = load();
    const auto& t = got.checkpoint.tensors;
    ASSERT_EQ(t.size(), 3u);
    EXPECT_EQ(t.at("model.layers.0.mlp.up_proj.scales").dtype(), mx::float16);
    EXPECT_EQ(t.at("model.layers.0.mlp.up_proj.scales").shape(), (mx::Shape{2, 2}));
    EXPECT_EQ(t.at("model.layers.0.mlp.up_proj.weight").dtype(), mx::uint32);
    EXPECT_EQ(values_of(t, "model.layers.0.mlp.up_proj", type == Q8_0 ? 8 : 4), expected(type, data)) << type;
    EXPECT_EQ(got.config["quantization"]["group_size"], 32);
    EXPECT_EQ(got.config["quantization"].contains("model.layers.0.mlp.up_proj"), type == Q8_0);
  }
}

TEST_F(GgufFile, LargeScalesBecomeFloat32) {
  struct Case {
    uint32_t type;
    float scale;
    mx::Dtype dtype;
  };
  for (const auto& c : {Case{Q4_0, 8188.f, mx::float16}, Case{Q4_0, 8192.f, mx::float32}, Case{Q4_0, -65504.f, mx::float32},
                        Case{Q8_0, 511.75f, mx::float16}, Case{Q8_0, 512.f, mx::float32}, Case{Q8_0, -512.f, mx::float32},
                        Case{Q4_1, 20000.f, mx::float16}}) {
    const std::string data = blocks(c.type, {0.25f, c.scale});
    file.tensors = {{"blk.0.ffn_up.weight", c.type, {1, 64}, data}};
    const auto got = load();
    const auto& t = got.checkpoint.tensors;
    const std::string module = "model.layers.0.mlp.up_proj";
    EXPECT_EQ(t.at(module + ".scales").dtype(), c.dtype) << c.type << " " << c.scale;
    EXPECT_EQ(t.at(module + ".biases").dtype(), c.dtype) << c.type << " " << c.scale;
    EXPECT_EQ(values_of(t, module, c.type == Q8_0 ? 8 : 4), expected(c.type, data)) << c.type << " " << c.scale;
  }
}

TEST_F(GgufFile, NormsBesideQuantizedBecomeHalfWhereTheyFit) {
  file.tensors = {{"blk.0.ffn_up.weight", Q4_0, {1, 32}, blocks(Q4_0, {1.f})},
                  {"output_norm.weight", F32, {2}, bytes_of<float>({1.f, 65504.f})},
                  {"blk.0.ffn_norm.weight", F32, {2}, bytes_of<float>({1.f, 1e6f})}};
  const auto got = load();
  EXPECT_EQ(got.checkpoint.tensors.at("model.norm.weight").dtype(), mx::float16);
  EXPECT_EQ(values_of(got.checkpoint.tensors.at("model.norm.weight")), (std::vector<float>{1.f, 65504.f}));
  EXPECT_EQ(got.checkpoint.tensors.at("model.layers.0.post_attention_layernorm.weight").dtype(), mx::float32);
  EXPECT_EQ(values_of(got.checkpoint.tensors.at("model.layers.0.post_attention_layernorm.weight")), (std::vector<float>{1.f, 1e6f}));
}

/** Row of the file that stands in row `row` here. */
int file_row(int row, int rows, int heads) {
  const int size = rows / heads, head = row / size, in_head = row % size, pair = in_head / (size / 2), i = in_head % (size / 2);
  return head * size + 2 * i + pair;
}

TEST_F(GgufFile, QueriesAndKeysOfLlamaChangeTheirRows) {
  const std::string q8 = blocks(Q8_0, {1.f, 2.f, 3.f, 4.f, 5.f, 6.f, 7.f, 8.f});
  file.tensors = {{"blk.0.attn_q.weight", Q8_0, {8, 32}, q8},
                  {"blk.0.attn_k.weight", F32, {4, 2}, floats(8)},
                  {"blk.0.attn_k.bias", F32, {4}, floats(4)},
                  {"blk.0.attn_v.weight", F32, {4, 2}, floats(8)}};
  const auto got = load();
  const auto& t = got.checkpoint.tensors;
  const auto wanted = expected(Q8_0, q8), all = values_of(t, "model.layers.0.self_attn.q_proj", 8);
  for (int row = 0; row < 8; ++row) {
    for (int i = 0; i < 32; ++i) EXPECT_EQ(all[row * 32 + i], wanted[file_row(row, 8, 2) * 32 + i]) << row;
  }
  EXPECT_EQ(values_of(t.at("model.layers.0.self_attn.k_proj.weight")),
            (std::vector<float>{0.5f, 0.75f, 1.5f, 1.75f, 1.f, 1.25f, 2.f, 2.25f}));
  EXPECT_EQ(values_of(t.at("model.layers.0.self_attn.k_proj.bias")), (std::vector<float>{0.5f, 1.f, 0.75f, 1.25f}));
  EXPECT_EQ(values_of(t.at("model.layers.0.self_attn.v_proj.weight"))[2], 1.f);
}

TEST_F(GgufFile, LongListsOfTexts) {
  file.tensors = {{"token_embd.weight", F32, {3, 4}, floats(12)}};
  std::string list = list_head("tokenizer.ggml.tokens", 8, 1500);
  for (int i = 0; i < 1500; ++i) list += text(std::to_string(i));
  file.pairs.push_back(list);
  const auto got = load();
  const auto texts = texts_of(got.metadata->at("tokenizer.ggml.tokens"), "tokens");
  ASSERT_EQ(texts.size(), 1500u);
  EXPECT_EQ(texts[0], "0");
  EXPECT_EQ(texts[1499], "1499");
}

TEST_F(GgufFile, Config) {
  file.tensors = {{"token_embd.weight", F32, {3, 4}, floats(12)}};
  file.pairs.push_back(list_head("tokenizer.ggml.tokens", 8, 2) + text("a") + text("b"));
  file.pairs.push_back(pair("tokenizer.ggml.eos_token_id", 1u));
  for (const bool with_tensors : {true, false}) {
    const auto got = load(with_tensors);
    EXPECT_EQ(got.config["model_type"], "llama");
    EXPECT_EQ(got.config["hidden_size"], 32);
    EXPECT_EQ(got.config["num_key_value_heads"], 1);
    EXPECT_EQ(got.config["vocab_size"], 3);
    EXPECT_EQ(got.config["eos_token_id"], 1);
    EXPECT_EQ(got.config["tie_word_embeddings"], true);
    EXPECT_EQ(got.metadata->at("tokenizer.ggml.tokens"), json({"a", "b"}));
    EXPECT_EQ(got.checkpoint.tensors.size(), with_tensors ? 1u : 0u);
  }
}

TEST_F(GgufFile, EveryKindOfMetadata) {
  const auto raw = [](const std::string& key, uint32_t type, const std::string& bytes) { return text(key) + bytes_of(type) + bytes; };
  file.pairs = {raw("general.architecture", 8, text("llama")),
                raw("u8", 0, bytes_of<uint8_t>(255)),
                raw("i8", 1, bytes_of<int8_t>(-1)),
                raw("u16", 2, bytes_of<uint16_t>(65535)),
                raw("i16", 3, bytes_of<int16_t>(-2)),
                raw("bool", 7, bytes_of<uint8_t>(1)),
                raw("u64", 10, bytes_of(UINT64_MAX)),
                raw("i64", 11, bytes_of(INT64_MIN)),
                raw("f64", 12, bytes_of(0.1)),
                raw("lists", 9, bytes_of<uint32_t>(9) + bytes_of<uint64_t>(1) + bytes_of<uint32_t>(0) + bytes_of<uint64_t>(2) + "\1\2")};
  const auto usual = llama_pairs();
  file.pairs.insert(file.pairs.end(), usual.begin() + 1, usual.end());
  const auto m = *load().metadata;
  EXPECT_EQ(m["u8"], 255);
  EXPECT_EQ(m["i8"], -1);
  EXPECT_EQ(m["u16"], 65535);
  EXPECT_EQ(m["i16"], -2);
  EXPECT_EQ(m["bool"], true);
  EXPECT_EQ(m["u64"], UINT64_MAX);
  EXPECT_EQ(m["i64"], INT64_MIN);
  EXPECT_EQ(m["f64"], 0.1);
  EXPECT_EQ(m["lists"], json({{1, 2}}));
}

TEST_F(GgufFile, BadFrame) {
  refuse("", Code::bad_weights, {"got 0 bytes, wanted a GGUF header"});
  file.magic = "GGML";
  refuse(Code::bad_weights, {"does not begin with GGUF"});
  file.magic = "GGUF";
  for (const uint32_t version : {0u, 1u, 4u, 0x03000000u}) {
    file.version = version;
    refuse(Code::unsupported, {"GGUF version " + std::to_string(version) + ", wanted 2 or 3"});
  }
  file.version = 2;
  EXPECT_NO_THROW(load());
  for (const uint64_t count : {uint64_t(1000), uint64_t(15'000'000), uint64_t(1) << 40, UINT64_MAX}) {
    file.tensor_count = count;
    refuse(Code::bad_weights, {});
    file.tensor_count.reset();
    file.pair_count = count;
    refuse(Code::bad_weights, {});
    file.pair_count.reset();
  }
}

TEST_F(GgufFile, BadMetadata) {
  const auto refuse_pair = [&](const std::string& pair, const std::string& message, Code code = Code::bad_weights) {
    file.pairs = {pair};
    refuse(code, {message});
  };
  refuse_pair(bytes_of(UINT64_MAX) + "x", "a string of 18446744073709551615 bytes, longer than the file");
  refuse_pair(text("k") + bytes_of<uint32_t>(8) + bytes_of<uint64_t>(1000) + "x", "a string of 1000 bytes, longer than the file");
  refuse_pair(text("k") + bytes_of<uint32_t>(13) + "xxxx", "metadata of unknown type 13");
  refuse_pair(list_head("k", 4, UINT64_MAX) + "xxxx", "a list of 18446744073709551615 values, longer than the file");
  refuse_pair(list_head("k", 4, 10) + "xxxx", "inside the header (is it truncated?)");
  std::string deep = text("k") + bytes_of<uint32_t>(9);
  for (int i = 0; i < 10'000; ++i) deep += bytes_of<uint32_t>(9) + bytes_of<uint64_t>(1);
  refuse_pair(deep, "nested deeper than 4 lists");
  refuse_pair(pair("general.architecture", std::string("lama")), "got 'lama', wanted llama", Code::unsupported);
  refuse_pair(pair("general.architecture", std::string(100'000, 'x')), "xxx...', wanted llama", Code::unsupported);
  refuse_pair(pair("general.architecture", 3u), "general.architecture: got ''", Code::unsupported);
  refuse_pair(pair("general.architecture", std::string("llama")), "metadata llama.embedding_length is missing or no number");
  file.pairs = llama_pairs();
  file.pairs.push_back(file.pairs[1]);
  refuse(Code::bad_weights, {"metadata llama.embedding_length stands twice"});
  for (const uint32_t alignment : {0u, UINT32_MAX}) {
    file.pairs = llama_pairs();
    file.pairs.push_back(pair("general.alignment", alignment));
    refuse(Code::bad_weights, {"general.alignment is out of range"});
  }
  file.pairs = llama_pairs();
  file.pairs.push_back(pair("llama.rope.scaling.type", std::string("yarn")));
  refuse(Code::unsupported, {"llama.rope.scaling.type: got \"yarn\", wanted linear"});
}

TEST_F(GgufFile, BadTensors) {
  const auto refuse_tensor = [&](const Tensor& t, const std::string& message, Code code = Code::bad_weights) {
    file.tensors = {t};
    refuse(code, {t.name, message});
  };
  const std::string up = "blk.0.ffn_up.weight", data(64, '\0');
  for (const auto& [type, name] : {std::pair{6u, "Q5_0"},
                                   {7u, "Q5_1"},
                                   {10u, "Q2_K"},
                                   {12u, "Q4_K"},
                                   {14u, "Q6_K"},
                                   {31u, "type 31"},
                                   {UINT32_MAX, "type 4294967295"}}) {
    refuse_tensor({up, type, {1, 32}, data}, std::string("got ") + name + ", wanted F32, F16, BF16, Q4_0, Q4_1 or Q8_0", Code::unsupported);
  }
  refuse_tensor({up, F32, {}, data}, "got 0 axes, wanted 1 to 4");
  refuse_tensor({up, F32, {1, 1, 1, 1, 1}, data}, "got 5 axes, wanted 1 to 4");
  refuse_tensor({up, F32, {0, 4}, data}, "an axis of 0");
  refuse_tensor({up, F32, {1, uint64_t(1) << 31}, data}, "an axis of 2147483648");
  refuse_tensor({up, F32, {UINT64_MAX, 4}, data}, "an axis of 18446744073709551615");
  refuse_tensor({up, F32, {INT32_MAX, INT32_MAX}, data}, "lies beyond the end of the file");
  refuse_tensor({up, F32, {INT32_MAX, INT32_MAX, INT32_MAX}, data}, "too large");
  refuse_tensor({up, F32, {17}, data}, "lies beyond the end of the file (is it truncated?)");
  refuse_tensor({up, Q4_0, {1, 33}, data}, "rows of 33 are not whole blocks");
  refuse_tensor({up, Q4_0, {32}, data}, "quantized with other than two axes", Code::unsupported);
  refuse_tensor({up, Q8_0, {1, 1, 32}, data}, "quantized with other than two axes", Code::unsupported);
  refuse_tensor({"blk.0.ffn_up.bias", Q8_0, {1, 32}, data}, "quantized, but no weight", Code::unsupported);
  refuse_tensor({"rope_freqs.weight", F32, {4}, data}, "a tensor that llama does not have here", Code::unsupported);
  refuse_tensor({"token_embd.a.weight", F32, {4}, data}, "a tensor that llama does not have here", Code::unsupported);
  refuse_tensor({"blk.0.attn_q.weight", F32, {6, 1}, data}, "got 6 rows, which do not divide into 2 heads of pairs");
  file.tensors = {{"a\nb" + std::string(100'000, 'x'), F32, {4}, data}};
  refuse(Code::unsupported, {"a?bxxx", "..."});
  file.tensors = {{up, F32, {4}, data}, {up, F32, {4}, data}};
  refuse(Code::bad_weights, {up + ": stands twice"});
}

TEST_F(GgufFile, BadOffsets) {
  file.tensors = {{"blk.0.ffn_up.weight", F32, {16}, std::string(64, '\0')}, {"blk.0.ffn_down.weight", F32, {16}, std::string(64, '\0')}};
  EXPECT_NO_THROW(load());
  for (const uint64_t offset : {uint64_t(96), uint64_t(1) << 40, UINT64_MAX - 63, UINT64_MAX}) {
    file.offset = [&](std::size_t i, uint64_t at) { return i == 1 ? offset : at; };
    refuse(Code::bad_weights, {"blk.0.ffn_down.weight: lies beyond the end of the file"});
  }
  for (const uint64_t offset : {0, 4, 60}) {
    file.offset = [&](std::size_t i, uint64_t at) { return i == 1 ? offset : at; };
    refuse(Code::bad_weights, {": overlaps "});
  }
}

TEST_F(GgufFile, BadHeadCounts) {
  file.tensors = {{"blk.0.attn_q.weight", F32, {4, 1}, floats(4)}};
  const auto raw = [](uint32_t type, const std::string& bytes) { return text("llama.attention.head_count") + bytes_of(type) + bytes; };
  for (const auto& [type, bytes] : {std::pair{4u, bytes_of(0u)},
                                    {5u, bytes_of(-2)},
                                    {10u, bytes_of(uint64_t(1) << 32)},
                                    {10u, bytes_of(UINT64_MAX)},
                                    {11u, bytes_of(INT64_MIN)},
                                    {4u, bytes_of(1u << 30)},
                                    {6u, bytes_of(2.f)}}) {
    file.pairs[4] = raw(type, bytes);
    refuse(Code::bad_weights, {"num_attention_heads: got "});
  }
}

/** A file of every type. The data of the last tensor ends the file. */
File small_file() {
  File file{.pairs = llama_pairs()};
  file.pairs.push_back(list_head("tokenizer.ggml.tokens", 8, 2) + text("a") + text("b"));
  file.tensors = {{"blk.0.attn_q.weight", Q4_0, {4, 32}, blocks(Q4_0, {1.f, 2.f, 3.f, 4.f})},
                  {"blk.0.ffn_up.weight", Q4_1, {1, 32}, blocks(Q4_1, {1.f})},
                  {"blk.0.ffn_norm.weight", F32, {4}, floats(4)},
                  {"token_embd.weight", F16, {1, 4}, noise(8)},
                  {"blk.0.ffn_gate.weight", Q8_0, {1, 32}, blocks(Q8_0, {1.f})}};
  return file;
}

TEST_F(GgufFile, EveryTruncationIsRefused) {
  const std::string whole = small_file().bytes();
  const auto path = write("m.gguf", whole);
  EXPECT_EQ(load_gguf(path).checkpoint.tensors.size(), 11u);
  for (std::size_t length = whole.size(); length-- > 0;) {
    fs::resize_file(path, length);
    expect_error(Code::bad_weights, {"m.gguf: "}, [&] { load_gguf(path); });
  }
}

TEST_F(GgufFile, AnyChangedByteIsReadOrRefused) {
  const std::string whole = small_file().bytes();
  const auto path = write("m.gguf", whole);
  std::fstream changed(path, std::ios::binary | std::ios::in | std::ios::out);
  const auto put = [&](std::size_t at, char value) { changed.seekp(static_cast<std::streamoff>(at)).put(value).flush(); };
  int read = 0, refused = 0;
  for (std::size_t at = 0; at < whole.size(); ++at) {
    constexpr int flips[] = {0x01, 0x80, 0xff};
    put(at, static_cast<char>(whole[at] ^ flips[at % 3]));
    try {
      for (auto& [name, value] : load_gguf(path).checkpoint.tensors) {
        value.eval();
        volatile char last = value.data<char>()[value.nbytes() - 1];
        static_cast<void>(last);
      }
      ++read;
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
      ++refused;
    }
    put(at, whole[at]);
  }
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 100);
}

TEST_F(GgufFile, ManyTensorsTakeLinearTime) {
  const std::string data = blocks(Q8_0, {1.f});
  for (int i = 0; i < 20'000; ++i) file.tensors.push_back({"blk." + std::to_string(i) + ".ffn_up.weight", Q8_0, {1, 32}, data});
  for (int i = 0; i < 20'000; ++i) file.pairs.push_back(pair("key" + std::to_string(i), 1u));
  EXPECT_EQ(load().checkpoint.tensors.size(), 60'000u);
}

}  // namespace
}  // namespace mlxlm::weights
