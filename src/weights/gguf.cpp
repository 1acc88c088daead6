// GGUF models as MLX has them: mlx_lm's names, affine quantization without loss, a config.json made from the metadata.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include <mlx/allocator.h>
#include <mlx/primitives.h>

#include "base/error.h"
#include "base/text_util.h"
#include "base/thread_pool.h"
#include "weights/gguf_reader.h"
#include "weights/mapped_array.h"
#include "weights/names.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

struct Family {
  const char* model_type;
  bool permuted_qk;    // llama.cpp stores q and k rows for interleaved rotation
  bool norm_plus_one;  // stored norms are w + 1
};

const std::map<std::string, Family> families = {{"llama", {"llama", true, false}},
                                                {"qwen2", {"qwen2", false, false}},
                                                {"qwen3", {"qwen3", false, false}},
                                                {"gemma3", {"gemma3_text", false, true}}};

const std::map<std::string, std::string>& layer_names(const std::string& architecture) {
  static const std::map<std::string, std::string> usual = {
      {"attn_q", "self_attn.q_proj"},      {"attn_k", "self_attn.k_proj"},     {"attn_v", "self_attn.v_proj"},
      {"attn_output", "self_attn.o_proj"}, {"ffn_gate", "mlp.gate_proj"},      {"ffn_up", "mlp.up_proj"},
      {"ffn_down", "mlp.down_proj"},       {"attn_norm", "input_layernorm"},   {"ffn_norm", "post_attention_layernorm"},
      {"attn_q_norm", "self_attn.q_norm"}, {"attn_k_norm", "self_attn.k_norm"}};
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
  if (parts.size() == 2 && parts[0] == "token_embd") return "model.embed_tokens." + leaf;
  if (parts.size() == 2 && parts[0] == "output_norm") return "model.norm." + leaf;
  if (parts.size() == 2 && parts[0] == "output") return "lm_head." + leaf;
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
int64_t source_row(int64_t row, int64_t rows, int64_t heads) {
  if (heads == 0) return row;
  const int64_t per_head = rows / heads, half = per_head / 2, head = row / per_head, in_head = row % per_head;
  return head * per_head + (in_head % half) * 2 + in_head / half;
}

/** The low nibbles of 8 bytes, side by side. */
uint32_t low_nibbles(uint64_t v) {
  v &= 0x0f0f0f0f0f0f0f0full;
  v = (v | v >> 4) & 0x00ff00ff00ff00ffull;
  v = (v | v >> 8) & 0x0000ffff0000ffffull;
  return static_cast<uint32_t>(v | v >> 16);
}

/** Packed codes of one block of 32 values, in MLX's order. */
void convert_codes(GgufType type, const uint8_t* block, uint8_t* codes) {
  if (type == GgufType::q8_0) {
    for (int i = 0; i < 32; ++i) codes[i] = block[2 + i] ^ 0x80;  // int8 + 128
    return;
  }
  // The file keeps values 0-15 in low nibbles and 16-31 in high ones; MLX keeps neighbours in one byte.
  uint64_t bytes[2];
  std::memcpy(bytes, block + (type == GgufType::q4_1 ? 4 : 2), 16);
  const uint32_t packed[4] = {low_nibbles(bytes[0]), low_nibbles(bytes[1]), low_nibbles(bytes[0] >> 4), low_nibbles(bytes[1] >> 4)};
  std::memcpy(codes, packed, 16);
}

int64_t block_bytes_of(GgufType type) {
  return type == GgufType::q8_0 ? 34 : type == GgufType::q4_1 ? 20 : 18;
}

/** Does the bias of a block, -8 or -128 times its finite scale, leave the range of float16? */
bool bias_overflows(const GgufTensor& t) {
  const auto type = static_cast<GgufType>(t.type);
  if (type == GgufType::q4_1) return false;                                                // the file holds it
  const uint16_t too_large = type == GgufType::q8_0 ? 0x6000 : 0x7000, infinite = 0x7c00;  // float16 of 512, 8192
  const int64_t block_bytes = block_bytes_of(type);
  for (const uint8_t* block = t.data; block < t.data + t.bytes; block += block_bytes) {
    uint16_t scale;
    std::memcpy(&scale, block, 2);
    scale &= 0x7fff;
    if (scale >= too_large && scale < infinite) return true;
  }
  return false;
}

/** -2^power times a float16. */
uint16_t minus_power(uint16_t half, int power) {
  const int exponent = half >> 10 & 31;
  if (exponent != 0 && exponent + power < 31) return static_cast<uint16_t>((half ^ 0x8000) + (power << 10));
  return float_to_half(std::ldexp(half_to_float(half), power) * -1.f);
}

void put(uint8_t* out, int64_t index, float value) {
  std::memcpy(out + 4 * index, &value, 4);
}
void put(uint8_t* out, int64_t index, uint16_t half) {
  std::memcpy(out + 2 * index, &half, 2);
}

/** Blocks of a mapped file -> codes, scales and biases, when they are asked for: so that a model is never in memory as blocks, in MLX's
 * layout and packed all at once. */
class ConvertBlocks final : public mx::Primitive {
 public:
  ConvertBlocks(mx::Stream stream, GgufTensor tensor, std::shared_ptr<const MappedFile> file, int64_t heads)
      : Primitive(stream), tensor_(std::move(tensor)), file_(std::move(file)), heads_(heads) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>& outputs) override {
    for (auto& out : outputs) out.set_data(mx::allocator::malloc(out.nbytes()));
    const auto type = static_cast<GgufType>(tensor_.type);
    const int bits = type == GgufType::q8_0 ? 8 : 4;
    const int64_t block_bytes = block_bytes_of(type), rows = tensor_.shape[0], groups = tensor_.shape[1] / 32,
                  code_bytes = tensor_.shape[1] * bits / 8;
    const bool as_float = outputs[1].dtype() == mx::float32;
    auto *codes = outputs[0].data<uint8_t>(), *scales = outputs[1].data<uint8_t>(), *biases = outputs[2].data<uint8_t>();
    constexpr int64_t rows_a_chunk = 64;
    compute_pool().parallel_for(static_cast<int>((rows + rows_a_chunk - 1) / rows_a_chunk), [&](int chunk, int) {
      for (int64_t row = chunk * rows_a_chunk; row < std::min(rows, (chunk + 1) * rows_a_chunk); ++row) {
        const uint8_t* in = tensor_.data + source_row(row, rows, heads_) * groups * block_bytes;
        for (int64_t i = 0; i < groups; ++i, in += block_bytes) {
          uint16_t halves[2];
          std::memcpy(halves, in, 4);
          convert_codes(type, in, codes + row * code_bytes + i * 4 * bits);
          const int64_t at = row * groups + i;
          if (as_float) {
            const float scale = half_to_float(halves[0]);
            put(scales, at, scale);
            put(biases, at, type == GgufType::q4_1 ? half_to_float(halves[1]) : scale * (bits == 8 ? -128.f : -8.f));
          } else {
            put(scales, at, halves[0]);
            put(biases, at, type == GgufType::q4_1 ? halves[1] : minus_power(halves[0], bits == 8 ? 7 : 3));
          }
        }
      }
    });
    release_pages(*file_, tensor_.file_offset, tensor_.bytes);
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw Error(Code::internal, "gguf", "blocks are converted on the CPU");
  }
  const char* name() const override { return "ConvertBlocks"; }

 private:
  GgufTensor tensor_;
  std::shared_ptr<const MappedFile> file_;
  int64_t heads_;
};

void add_quantized(const GgufTensor& t, const std::shared_ptr<const MappedFile>& file, const std::string& path, int64_t heads,
                   Tensors& out) {
  const int bits = static_cast<GgufType>(t.type) == GgufType::q8_0 ? 8 : 4;
  const int rows = static_cast<int>(t.shape[0]), groups = static_cast<int>(t.shape[1] / 32);
  const auto dtype = bias_overflows(t) ? mx::float32 : mx::float16;
  const auto arrays = mx::array::make_arrays({{rows, groups * bits}, {rows, groups}, {rows, groups}}, {mx::uint32, dtype, dtype},
                                             std::make_shared<ConvertBlocks>(mx::default_stream(mx::Device::cpu), t, file, heads), {});
  out.insert_or_assign(path + ".weight", arrays[0]);
  out.insert_or_assign(path + ".scales", arrays[1]);
  out.insert_or_assign(path + ".biases", arrays[2]);
}

/** Vectors of float32 beside quantized matrices become float16 where they fit. */
bool fits_half(const GgufTensor& t, float subtracted) {
  for (int64_t i = 0; i < t.shape[0]; ++i) {
    float value;
    std::memcpy(&value, t.data + 4 * i, 4);
    if (std::isfinite(value) && std::abs(value - subtracted) >= 65520.f) return false;
  }
  return true;
}

mx::array dense(const GgufTensor& t, const std::shared_ptr<const MappedFile>& mapped, int64_t heads, bool minus_one, bool as_half) {
  mx::Shape shape(t.shape.begin(), t.shape.end());
  const auto type = static_cast<GgufType>(t.type);
  const mx::Dtype dtype = type == GgufType::f32 ? mx::float32 : type == GgufType::f16 ? mx::float16 : mx::bfloat16;
  if (type == GgufType::f32 && (as_half || minus_one) && t.shape.size() == 1) {
    const float subtracted = minus_one ? 1.f : 0.f;
    as_half = as_half && fits_half(t, subtracted);
    return filled_array(shape, as_half ? mx::float16 : mx::float32, [&](void* out) {
      for (int64_t i = 0; i < t.shape[0]; ++i) {
        float value;
        std::memcpy(&value, t.data + 4 * source_row(i, t.shape[0], heads), 4);
        auto* to = static_cast<uint8_t*>(out);
        as_half ? put(to, i, float_to_half(value - subtracted)) : put(to, i, value - subtracted);
      }
    });
  }
  if (heads == 0) return mapped_array(mapped, t.file_offset, shape, dtype);
  const auto row_bytes = static_cast<int64_t>(t.bytes) / t.shape[0];
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
    if (it != meta.end() && it->is_number())
      config[key] = *it;
    else if (required)
      throw Error(Code::bad_weights, where, "metadata " + from + " is missing or no number");
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
      throw Error(Code::unsupported, where,
                  at + "rope.scaling.type: got " + shown_name(to_text(meta[at + "rope.scaling.type"])) + ", wanted linear");
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

/** Heads whose rows the file keeps in another order, 0 for none. */
int64_t permuted_heads(const GgufTensor& t, const json& config, const std::string& where) {
  const bool q = t.name.find(".attn_q.") != std::string::npos, k = t.name.find(".attn_k.") != std::string::npos;
  if (!q && !k) return 0;
  const char* key = k && config.contains("num_key_value_heads") ? "num_key_value_heads" : "num_attention_heads";
  const json& value = config.at(key);
  constexpr int64_t most = 1 << 20;
  const bool usable =
      value.is_number_unsigned() ? value.get<uint64_t>() <= most : value.is_number_integer() && value.get<int64_t>() <= most;
  const int64_t heads = usable ? value.get<int64_t>() : 0;
  if (heads < 1) throw Error(Code::bad_weights, where, std::string(key) + ": got " + to_text(value) + ", wanted a number of heads");
  if (t.shape[0] % (2 * heads) != 0) {
    throw Error(Code::bad_weights, where + ": " + shown_name(t.name),
                "got " + std::to_string(t.shape[0]) + " rows, which do not divide into " + std::to_string(heads) + " heads of pairs");
  }
  return heads;
}

/** The tensor under its name here, with what goes with it. */
void add_tensor(const GgufTensor& t, const GgufFile& file, const std::string& name, const Family& family, int64_t heads, bool any_quantized,
                Tensors& out) {
  if (is_quantized(t.type)) {
    add_quantized(t, file.mapped, name.substr(0, name.rfind('.')), heads, out);
  } else {
    const bool norm = name.ends_with("norm.weight");
    out.insert_or_assign(name, dense(t, file.mapped, heads, norm && family.norm_plus_one, any_quantized));
  }
}

}  // namespace

Gguf load_gguf(const std::filesystem::path& path, bool with_tensors, const std::function<void(const Gguf&)>& described) {
  GgufFile file = read_gguf(path);
  const std::string where = path.string();
  const auto it = file.metadata.find("general.architecture");
  const std::string architecture = it != file.metadata.end() && it->is_string() ? it->get<std::string>() : "";
  const auto family = families.find(architecture);
  if (family == families.end()) {
    throw Error(Code::unsupported, where,
                "general.architecture: got '" + shown_name(architecture) + "', wanted llama, qwen2, qwen3 or gemma3");
  }
  Gguf model{read_config(file, architecture, where), nullptr, {}};
  model.checkpoint.file_bytes = static_cast<int64_t>(file.mapped->bytes().size());
  const bool any_quantized = std::ranges::any_of(file.tensors, [](const GgufTensor& t) { return is_quantized(t.type); });
  json quantization = {{"group_size", 32}, {"bits", 4}};
  std::vector<int64_t> heads;
  for (const auto& t : file.tensors) {
    const std::string name = mlx_name(t.name, architecture), at = where + ": " + shown_name(t.name);
    if (name.empty()) throw Error(Code::unsupported, at, "a tensor that " + architecture + " does not have here");
    if (is_quantized(t.type) && t.shape.size() != 2) throw Error(Code::unsupported, at, "quantized with other than two axes");
    if (is_quantized(t.type) && !name.ends_with(".weight")) throw Error(Code::unsupported, at, "quantized, but no weight");
    if (static_cast<GgufType>(t.type) == GgufType::q8_0) {
      // Names are unique, and json's own insertion compares with every key before it.
      quantization.get_ref<json::object_t&>().Container::emplace_back(name.substr(0, name.rfind('.')),
                                                                      json({{"group_size", 32}, {"bits", 8}}));
    }
    heads.push_back(family->second.permuted_qk ? permuted_heads(t, model.config, where) : 0);
  }
  if (any_quantized) model.config["quantization"] = std::move(quantization);
  model.metadata = std::make_shared<const json>(std::move(file.metadata));
  if (described) described(model);
  for (std::size_t i = 0; with_tensors && i < file.tensors.size(); ++i) {
    const auto& t = file.tensors[i];
    add_tensor(t, file, mlx_name(t.name, architecture), family->second, heads[i], any_quantized, model.checkpoint.tensors);
  }
  return model;
}

}  // namespace mlxlm::weights
