// GGUF models as MLX has them: mlx_lm's names, affine quantization without loss, a config.json made from the metadata.
#include <algorithm>
#include <cstring>
#include <map>

#include "base/error.h"
#include "base/text_util.h"
#include "weights/gguf_reader.h"
#include "weights/mapped_array.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

struct Family {
  const char* model_type;
  bool permuted_qk;     // llama.cpp stores q and k rows for interleaved rotation
  bool norm_plus_one;   // stored norms are w + 1
};

const std::map<std::string, Family> families = {{"llama", {"llama", true, false}},
                                                {"qwen2", {"qwen2", false, false}},
                                                {"qwen3", {"qwen3", false, false}},
                                                {"gemma3", {"gemma3_text", false, true}}};

const std::map<std::string, std::string>& layer_names(const std::string& architecture) {
  static const std::map<std::string, std::string> usual = {
      {"attn_q", "self_attn.q_proj"},          {"attn_k", "self_attn.k_proj"}, {"attn_v", "self_attn.v_proj"},
      {"attn_output", "self_attn.o_proj"},     {"ffn_gate", "mlp.gate_proj"},  {"ffn_up", "mlp.up_proj"},
      {"ffn_down", "mlp.down_proj"},           {"attn_norm", "input_layernorm"}, {"ffn_norm", "post_attention_layernorm"},
      {"attn_q_norm", "self_attn.q_norm"},     {"attn_k_norm", "self_attn.k_norm"}};
  static const std::map<std::string, std::string> sandwich = [] {
    std::map<std::string, std::string> names = usual;
    names["post_attention_norm"] = "post_attention_layernorm";
    names["ffn_norm"] = "pre_feedforward_layernorm";
    names["post_ffw_norm"] = "post_feedforward_layernorm";
    return names;
  }();
  return architecture == "gemma3" ? sandwich : usual;
}

/** "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; "" when it is not a parameter here. */
std::string mlx_name(const std::string& name, const std::string& architecture) {
  const auto parts = split(name, '.');
  const std::string leaf = parts.back();
  if (parts[0] == "token_embd") return "model.embed_tokens." + leaf;
  if (parts[0] == "output_norm") return "model.norm." + leaf;
  if (parts[0] == "output") return "lm_head." + leaf;
  if (parts.size() == 4 && parts[0] == "blk") {
    const auto& names = layer_names(architecture);
    if (const auto it = names.find(parts[2]); it != names.end()) return "model.layers." + parts[1] + "." + it->second + "." + leaf;
  }
  return "";
}

float half_to_float(uint16_t h) {
  const auto value = reinterpret_cast<const mx::float16_t*>(&h);
  return static_cast<float>(*value);
}
uint16_t float_to_half(float f) {
  const mx::float16_t value = static_cast<mx::float16_t>(f);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}

/** Row of the file that becomes row `row`: undoes llama.cpp's order for interleaved rotation. */
int64_t source_row(int64_t row, int64_t rows, int heads) {
  if (heads == 0) return row;
  const int64_t per_head = rows / heads, half = per_head / 2, head = row / per_head, in_head = row % per_head;
  return head * per_head + (in_head % half) * 2 + in_head / half;
}


/** One block of 32 values -> packed codes, scale and bias (float16). */
void convert_block(GgufType type, const uint8_t* block, uint8_t* codes, uint16_t& scale, uint16_t& bias) {
  std::memcpy(&scale, block, 2);
  const float d = half_to_float(scale);
  if (type == GgufType::q8_0) {
    for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(static_cast<int8_t>(block[2 + i]) + 128);
    bias = float_to_half(-128.f * d);
    return;
  }
  const uint8_t* nibbles = block + (type == GgufType::q4_1 ? 4 : 2);
  if (type == GgufType::q4_1) std::memcpy(&bias, block + 2, 2);
  else bias = float_to_half(-8.f * d);
  // The file keeps values 0-15 in low nibbles and 16-31 in high ones; MLX keeps neighbours in one byte.
  for (int i = 0; i < 8; ++i) {
    codes[i] = static_cast<uint8_t>((nibbles[2 * i] & 15) | (nibbles[2 * i + 1] & 15) << 4);
    codes[8 + i] = static_cast<uint8_t>((nibbles[2 * i] >> 4) | (nibbles[2 * i + 1] >> 4) << 4);
  }
}

void add_quantized(const GgufTensor& t, const std::string& path, int heads, Tensors& out) {
  const auto type = static_cast<GgufType>(t.type);
  const int bits = type == GgufType::q8_0 ? 8 : 4;
  const int64_t block_bytes = type == GgufType::q8_0 ? 34 : type == GgufType::q4_1 ? 20 : 18;
  const int64_t k = t.shape.back(), rows = t.shape[0], groups = k / 32, code_bytes = k * bits / 8;
  const int r = static_cast<int>(rows), g = static_cast<int>(groups);
  auto codes = filled_array({r, static_cast<int>(code_bytes / 4)}, mx::uint32, [](void*) {});
  auto scales = filled_array({r, g}, mx::float16, [](void*) {});
  auto biases = filled_array({r, g}, mx::float16, [](void*) {});
  auto* c = codes.data<uint8_t>();
  auto* s = scales.data<uint16_t>();
  auto* b = biases.data<uint16_t>();
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* in = t.data + source_row(row, rows, heads) * groups * block_bytes;
    for (int64_t i = 0; i < groups; ++i) {
      convert_block(type, in + i * block_bytes, c + row * code_bytes + i * 4 * bits, s[row * groups + i], b[row * groups + i]);
    }
  }
  out.insert_or_assign(path + ".weight", codes);
  out.insert_or_assign(path + ".scales", scales);
  out.insert_or_assign(path + ".biases", biases);
}

mx::array dense(const GgufTensor& t, const std::shared_ptr<const MappedFile>& mapped, int heads, bool minus_one, bool as_half) {
  mx::Shape shape(t.shape.begin(), t.shape.end());
  const auto type = static_cast<GgufType>(t.type);
  const mx::Dtype dtype = type == GgufType::f32 ? mx::float32 : type == GgufType::f16 ? mx::float16 : mx::bfloat16;
  if (type == GgufType::f32 && (as_half || minus_one) && t.shape.size() == 1) {
    return filled_array(shape, as_half ? mx::float16 : mx::float32, [&](void* out) {
      for (int64_t i = 0; i < t.shape[0]; ++i) {
        float value;
        std::memcpy(&value, t.data + 4 * i, 4);
        if (minus_one) value -= 1.f;
        if (as_half) static_cast<uint16_t*>(out)[i] = float_to_half(value);
        else static_cast<float*>(out)[i] = value;
      }
    });
  }
  if (heads == 0 || t.shape.size() != 2) return mapped_array(mapped, t.file_offset, shape, dtype);
  const int64_t row_bytes = t.shape[1] * static_cast<int64_t>(mx::size_of(dtype));
  return filled_array(shape, dtype, [&](void* out) {
    for (int64_t row = 0; row < t.shape[0]; ++row) {
      std::memcpy(static_cast<uint8_t*>(out) + row * row_bytes, t.data + source_row(row, t.shape[0], heads) * row_bytes, row_bytes);
    }
  });
}

bool is_quantized(uint32_t type) {
  const auto t = static_cast<GgufType>(type);
  return t == GgufType::q4_0 || t == GgufType::q4_1 || t == GgufType::q8_0;
}

json read_config(const GgufFile& file, const std::string& architecture, const std::string& where) {
  const auto& meta = file.metadata;
  json config = {{"model_type", families.at(architecture).model_type}};
  const auto copy = [&](const char* key, const std::string& from, bool required) {
    const auto it = meta.find(from);
    if (it != meta.end() && it->is_number()) config[key] = *it;
    else if (required) throw Error(Code::bad_weights, where, "metadata " + from + " is missing or no number");
  };
  const std::string at = architecture + ".";
  copy("hidden_size", at + "embedding_length", true);
  copy("num_hidden_layers", at + "block_count", true);
  copy("intermediate_size", at + "feed_forward_length", true);
  copy("num_attention_heads", at + "attention.head_count", true);
  copy("num_key_value_heads", at + "attention.head_count_kv", false);
  copy("rms_norm_eps", at + "attention.layer_norm_rms_epsilon", true);
  copy("head_dim", at + "attention.key_length", false);
  copy("rope_theta", at + "rope.freq_base", false);
  copy("max_position_embeddings", at + "context_length", false);
  copy("sliding_window", at + "attention.sliding_window", false);
  copy("bos_token_id", "tokenizer.ggml.bos_token_id", false);
  copy("eos_token_id", "tokenizer.ggml.eos_token_id", false);
  if (meta.contains(at + "rope.scaling.type") && meta[at + "rope.scaling.type"] != "none") {
    if (meta[at + "rope.scaling.type"] != "linear") {
      throw Error(Code::unsupported, where, at + "rope.scaling.type: got " + to_text(meta[at + "rope.scaling.type"]) + ", wanted linear");
    }
    config["rope_scaling"] = {{"type", "linear"}};
    const auto it = meta.find(at + "rope.scaling.factor");
    if (it != meta.end()) config["rope_scaling"]["factor"] = *it;
  }
  bool head = false;
  for (const auto& t : file.tensors) {
    head = head || t.name == "output.weight";
    if (t.name == "token_embd.weight" && t.shape.size() == 2) config["vocab_size"] = t.shape[0];
  }
  config["tie_word_embeddings"] = !head;
  return config;
}

int permuted_heads(const std::string& name, const json& config) {
  const auto number = [&](const char* key) { return config.contains(key) && config[key].is_number_integer() ? config[key].get<int>() : 0; };
  const int heads = number("num_attention_heads"), kv = number("num_key_value_heads");
  if (name.find(".attn_q.") != std::string::npos) return heads;
  if (name.find(".attn_k.") != std::string::npos) return kv > 0 ? kv : heads;
  return 0;
}

}  // namespace

Gguf load_gguf(const std::filesystem::path& path, bool with_tensors) {
  const GgufFile file = read_gguf(path);
  const std::string where = path.string();
  const auto it = file.metadata.find("general.architecture");
  const std::string architecture = it != file.metadata.end() && it->is_string() ? it->get<std::string>() : "";
  const auto family = families.find(architecture);
  if (family == families.end()) {
    throw Error(Code::unsupported, where, "general.architecture: got '" + architecture + "', wanted llama, qwen2, qwen3 or gemma3");
  }
  Gguf model{read_config(file, architecture, where), file.metadata, {}};
  model.checkpoint.file_bytes = static_cast<int64_t>(file.mapped->bytes().size());
  const bool any_quantized = std::ranges::any_of(file.tensors, [](const GgufTensor& t) { return is_quantized(t.type); });
  json quantization = {{"group_size", 32}, {"bits", 4}};
  for (const auto& t : file.tensors) {
    const std::string name = mlx_name(t.name, architecture);
    if (name.empty()) throw Error(Code::unsupported, where + ": " + t.name, "a tensor that " + architecture + " does not have here");
    const int heads = family->second.permuted_qk ? permuted_heads(t.name, model.config) : 0;
    if (heads > 0 && (t.shape[0] % (2 * heads)) != 0) throw Error(Code::bad_weights, where + ": " + t.name, "rows do not divide into heads");
    const std::string module = name.substr(0, name.rfind('.'));
    if (is_quantized(t.type) && t.shape.size() != 2) throw Error(Code::unsupported, where + ": " + t.name, "quantized with other than two axes");
    if (is_quantized(t.type) && static_cast<GgufType>(t.type) == GgufType::q8_0) quantization[module] = {{"group_size", 32}, {"bits", 8}};
    if (!with_tensors) continue;
    const bool norm = name.ends_with("norm.weight");
    if (is_quantized(t.type)) add_quantized(t, module, heads, model.checkpoint.tensors);
    else model.checkpoint.tensors.insert_or_assign(name, dense(t, file.mapped, heads, norm && family->second.norm_plus_one, any_quantized));
  }
  if (any_quantized) model.config["quantization"] = quantization;
  return model;
}

}  // namespace mlxlm::weights
