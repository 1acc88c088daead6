// From a folder to a model: configs merged, refused or broken, and the memory that loading takes.
#include <fstream>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/files.h"
#include "model/causal_model.h"
#include "unit/weights_support.h"

namespace mlxlm::model {
namespace {

using namespace tests;

json tiny_config() {
  return {{"model_type", "llama"},    {"hidden_size", 64},    {"num_hidden_layers", 1},
          {"intermediate_size", 96},  {"vocab_size", 128},    {"num_attention_heads", 2},
          {"num_key_value_heads", 1}, {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", false},
          {"bos_token_id", 1},        {"eos_token_id", 2}};
}

class ModelLoad : public TempFolder {
 protected:
  void write_config(const json& config) const { write("config.json", to_text(config)); }
  void write_weights() const;
  void refuse(Code code, const std::vector<std::string>& parts) const {
    expect_error(code, parts, [&] { load(folder_); });
  }
};

/** Name, file dtype and shape, to be written as a header over a hole. */
struct Stored {
  std::string name, dtype;
  std::vector<int64_t> shape;
};

int64_t bytes_of_dtype(const std::string& dtype) {
  return dtype == "F16" || dtype == "BF16" ? 2 : 4;
}

/** A .safetensors file whose data is a hole: zeros that no one had to write. Returns the bytes of the data. */
int64_t write_hole(const fs::path& file, const std::vector<Stored>& tensors) {
  json header = json::object();
  int64_t at = 0;
  for (const auto& t : tensors) {
    int64_t end = bytes_of_dtype(t.dtype);
    for (const auto dim : t.shape) end *= dim;
    header[t.name] = {{"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {at, at + end}}};
    at += end;
  }
  std::string text = to_text(header);
  text.resize((text.size() + 8 + 63) / 64 * 64 - 8, ' ');
  std::ofstream(file, std::ios::binary) << safetensors(text, "");
  fs::resize_file(file, text.size() + 8 + static_cast<std::size_t>(at));
  return at;
}

/** Every tensor of a llama config; matrices quantized if bits > 0. */
std::vector<Stored> llama_tensors(const json& config, const std::string& dtype, int bits = 0, int group_size = 64) {
  const int64_t d = config["hidden_size"], f = config["intermediate_size"], v = config["vocab_size"];
  const int64_t kv = d / config["num_attention_heads"].get<int64_t>() * config["num_key_value_heads"].get<int64_t>();
  std::vector<Stored> all;
  const auto matrix = [&](const std::string& path, int64_t rows, int64_t columns) {
    if (bits == 0) return all.push_back({path + ".weight", dtype, {rows, columns}});
    all.push_back({path + ".weight", "U32", {rows, columns * bits / 32}});
    for (const char* leaf : {".scales", ".biases"}) all.push_back({path + leaf, dtype, {rows, columns / group_size}});
  };
  matrix("model.embed_tokens", v, d);
  matrix("lm_head", v, d);
  all.push_back({"model.norm.weight", dtype, {d}});
  for (int i = 0; i < config["num_hidden_layers"]; ++i) {
    const std::string at = "model.layers." + std::to_string(i) + ".";
    matrix(at + "self_attn.q_proj", d, d);
    matrix(at + "self_attn.k_proj", kv, d);
    matrix(at + "self_attn.v_proj", kv, d);
    matrix(at + "self_attn.o_proj", d, d);
    matrix(at + "mlp.gate_proj", f, d);
    matrix(at + "mlp.up_proj", f, d);
    matrix(at + "mlp.down_proj", d, f);
    for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) all.push_back({at + norm + ".weight", dtype, {d}});
  }
  return all;
}

void ModelLoad::write_weights() const {
  write_hole(folder_ / "model.safetensors", llama_tensors(tiny_config(), "F32"));
}

std::vector<float> logits_of(CausalModel& model) {
  auto caches = cache::make_caches(model.description());
  auto logits = mx::contiguous(mx::astype(model.forward(mx::array({3}, {1, 1}), caches), mx::float32));
  mx::eval(logits);
  return {logits.data<float>(), logits.data<float>() + logits.size()};
}

TEST_F(ModelLoad, AFolderRuns) {
  write_config(tiny_config());
  write_weights();
  const auto loaded = load(folder_);
  EXPECT_EQ(loaded.model->description().width, 64);
  EXPECT_EQ(loaded.path, folder_);
  EXPECT_FALSE(loaded.gguf_metadata);
  EXPECT_EQ(logits_of(*loaded.model), std::vector<float>(128, 0.f));
  EXPECT_EQ(load(folder_, {.executor = Executor::graph, .adapter = {}}).model->executor(), std::string("graph"));
}

TEST_F(ModelLoad, GenerationConfig) {
  write_config(tiny_config());
  EXPECT_EQ(load_config(folder_), tiny_config());
  const auto eos = [&](const std::string& generation) {
    write("generation_config.json", generation);
    const auto config = load_config(folder_);
    EXPECT_EQ(config["bos_token_id"], 1) << "only eos_token_id is taken";
    EXPECT_FALSE(config.contains("temperature"));
    return config["eos_token_id"];
  };
  EXPECT_EQ(eos(R"({"eos_token_id": 7, "bos_token_id": 9, "temperature": 0.5})"), 7);
  EXPECT_EQ(eos(R"({"eos_token_id": [7, 8]})"), json({7, 8}));
  // As in Python, what counts as false does not replace.
  for (const char* empty :
       {R"({"eos_token_id": null})", R"({"eos_token_id": []})", R"({"eos_token_id": 0})", R"({"eos_token_id": false})", "{}"}) {
    EXPECT_EQ(eos(empty), 2) << empty;
  }
  for (const std::string broken : {"", "{", "[]", "3", "nonsense"}) EXPECT_EQ(eos(broken), 2) << broken;
}

TEST_F(ModelLoad, QuantizationOfTheTextModelIsHoisted) {
  auto config = tiny_config();
  config["text_config"] = {{"quantization_config", {{"quant_method", "awq"}}}};
  write_config(config);
  EXPECT_EQ(load_config(folder_)["quantization_config"]["quant_method"], "awq");
}

TEST_F(ModelLoad, BrokenConfigs) {
  write_weights();
  refuse(Code::not_found, {"got no config.json"});
  expect_error(Code::not_found, {"absent"}, [&] { load(folder_ / "absent"); });
  const std::pair<std::string, std::string> cases[] = {{"", "config.json: empty, wanted JSON"},
                                                       {"{\n \"a\": }", "broken JSON at line 2, column"},
                                                       {"[1]", "wanted a JSON object"},
                                                       {"null", "wanted a JSON object"},
                                                       {std::string(100'000, '['), "nested deeper than 512"},
                                                       {"{}", "model_type: missing"},
                                                       {R"({"model_type": 3})", "model_type"},
                                                       {R"({"model_type": "llama"})", "missing"},
                                                       {"{\"a\": \"\xff\"}", "broken JSON"}};
  for (const auto& [text, message] : cases) {
    write("config.json", text);
    refuse(Code::bad_config, {message, "config.json"});
  }
  auto config = tiny_config();
  config["quantization"] = 3;
  write_config(config);
  refuse(Code::bad_config, {"quantization: got 3, wanted an object"});
}

TEST_F(ModelLoad, UnknownArchitectures) {
  write_weights();
  auto config = tiny_config();
  config["model_type"] = "lama";
  write_config(config);
  refuse(Code::unsupported, {"config.json: model_type: got 'lama', no such architecture; nearest: llama"});
  config["model_type"] = std::string(100'000, 'x');
  write_config(config);
  refuse(Code::unsupported, {"xxx...', no such architecture; known: "});
  config["model_type"] = "llama";
  config["model_file"] = "model.py";
  write_config(config);
  refuse(Code::unsupported, {"model_file: got Python code"});
}

TEST_F(ModelLoad, QuantizationsOfOtherToolsAreRefused) {
  write_weights();
  for (const char* method : {"awq", "gptq", "bitnet", "bitsandbytes", "compressed-tensors", "modelopt", "mxfp4", "mxfp8"}) {
    auto config = tiny_config();
    config["quantization_config"] = {{"quant_method", method}, {"bits", 4}};
    write_config(config);
    refuse(Code::unsupported, {"quant_method: got '" + std::string(method) + "'"});
    config.erase("quantization_config");
    config["text_config"] = {{"quantization_config", {{"quant_method", method}}}};
    write_config(config);
    refuse(Code::unsupported, {"quant_method: got '" + std::string(method) + "'"});
  }
  auto config = tiny_config();
  config["quantization_config"] = {{"quant_method", 3}};
  write_config(config);
  refuse(Code::unsupported, {"quant_method: got '3'"});
  config["quantization"] = {{"group_size", 64}, {"bits", 4}};
  write_config(config);
  EXPECT_NO_THROW(load(folder_)) << "MLX's own quantization wins";
}

TEST_F(ModelLoad, WeightsThatDoNotFit) {
  write_config(tiny_config());
  refuse(Code::not_found, {"got no model*.safetensors"});
  auto tensors = llama_tensors(tiny_config(), "F32");
  tensors[0].name = "model.embed_token.weight";
  write_hole(folder_ / "model.safetensors", tensors);
  refuse(Code::bad_weights, {"missing model.embed_tokens.weight; nearest to the first that is there: model.embed_token.weight"});
  write("model.safetensors", "");
  refuse(Code::bad_weights, {"model.safetensors: got 0 bytes"});
  expect_error(Code::bad_weights, {"does not begin with GGUF"}, [&] { load(write("notes.txt", std::string(100, 'x'))); });
}

/** A field of /proc/self/status in bytes, 0 where there is none. */
int64_t status_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int64_t kib = 0;
    if (word == field + ":" && status >> kib) return kib * 1024;
  }
  return 0;
}

/** Growth of the largest resident size while `act` runs, over the size before; negative where the system does not tell. */
template <class Act>
int64_t peak_growth_bytes(Act&& act) {
  const int64_t before = status_bytes("VmRSS");
  if (!(std::ofstream("/proc/self/clear_refs") << "5").flush()) return -1;
  const bool reset = status_bytes("VmHWM") <= before + (8 << 20);
  act();
  return reset ? status_bytes("VmHWM") - before : -1;
}

class ModelMemory : public ModelLoad {
 protected:
  void expect_peak(const std::string& dtype, int bits) {
    if (sanitized) GTEST_SKIP() << "a sanitizer keeps memory of its own";
    write_config(tiny_config());
    write_weights();
    logits_of(*load(folder_).model);  // threads and buffers that every process has once
    auto config = tiny_config();
    const int layers = bits == 4 ? 24 : bits == 8 ? 12 : dtype == "F32" ? 3 : 6;  // 200 to 240 MB
    config.update({{"hidden_size", 1024},
                   {"intermediate_size", 4096},
                   {"vocab_size", 8192},
                   {"num_hidden_layers", layers},
                   {"num_attention_heads", 16},
                   {"num_key_value_heads", 8}});
    if (bits > 0) config["quantization"] = {{"group_size", 64}, {"bits", bits}};
    write_config(config);
    const auto bytes = write_hole(folder_ / "model.safetensors", llama_tensors(config, dtype, bits));
    const auto peak = peak_growth_bytes([&] { logits_of(*load(folder_).model); });
    if (peak < 0) GTEST_SKIP() << "this system does not tell the peak";
    RecordProperty("peak_over_weights", std::to_string(double(peak) / double(bytes)));
    EXPECT_LE(double(peak), 1.1 * double(bytes)) << "weights of " << bytes << " bytes";
  }
};

TEST_F(ModelMemory, PeakOfHalves) {
  expect_peak("F16", 0);
}
TEST_F(ModelMemory, PeakOfFloats) {
  expect_peak("F32", 0);
}
TEST_F(ModelMemory, PeakOf8Bits) {
  expect_peak("F16", 8);
}
TEST_F(ModelMemory, PeakOf4Bits) {
  expect_peak("F16", 4);
}

}  // namespace
}  // namespace mlxlm::model
