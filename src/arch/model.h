// Architecture description: plain data. No MLX, no weights, no side effects.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace mlxlm::arch {

enum class Act { silu, gelu, gelu_tanh, relu2 };
enum class NormKind { rms, layer };
/** How router logits become weights: softmax before the top-k, softmax over the chosen, sigmoid (with or without a correction bias). */
enum class Route { softmax, softmax_after_topk, sigmoid };

/** A normalization over the last axis. */
struct Norm {
  std::string at{};  // parameter path inside the layer (or the op, for q_norm and k_norm)
  float eps = 1e-6f;
  NormKind kind = NormKind::rms;
  bool plus_one = false;  // the stored weight is w - 1
  bool bias = false;      // layer norm only
  bool weightless = false;
};

/** The kinds of rotary embedding of mlx_lm/models/rope_utils.py. */
enum class RopeKind { plain, linear, dynamic_ntk, llama3, yarn, longrope, proportional };

struct Rope {
  int dims = 0;  // rotated dims, <= head_dim
  float base = 10000.f;
  bool traditional = false;  // pairs (0,1),(2,3).. instead of halves
  RopeKind kind = RopeKind::plain;
  float factor = 1.f;  // linear: positions are divided by it
  // llama3, yarn
  float low_freq_factor = 1.f, high_freq_factor = 4.f;
  int original_max_positions = 0;
  float beta_fast = 32.f, beta_slow = 1.f;
  float mscale = 1.f, mscale_all_dim = 0.f;
  // longrope: one factor a pair
  std::vector<float> long_factor{};
  int max_positions = 0;
  int rotated_dims = 0;  // proportional: the others of `dims` keep their value
  // factor that multiplies the rotated dims of q and k before the rotation (yarn, longrope)
  float input_scale = 1.f;
};

/** What a query of Attention with a temperature is multiplied by. */
inline float query_scale(float temperature, int temperature_tokens, int position) {
  return 1.f + temperature * std::log(1.f + float((position + 1) / temperature_tokens));
}

/** Softmax attention with grouped heads. Parameters: q_proj k_proj v_proj o_proj, or one fused projection. */
struct Attention {
  std::string at = "self_attn";
  std::string q = "q_proj", k = "k_proj", v = "v_proj", o = "o_proj";
  std::string fused_qkv{};  // e.g. "qkv_proj": rows are q, k, v in this order
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0.f;  // 0 = head_dim^-0.5
  bool qkv_bias = false, out_bias = false;
  bool gated = false;                      // q_proj gives each head its query and after it a gate: o_proj(heads * sigmoid(gates))
  std::optional<Rope> rope{};              // none = no positional encoding
  std::optional<Norm> q_norm{}, k_norm{};  // per head, before the rotation
  bool norm_full_width = false;            // q_norm/k_norm over all heads at once
  std::optional<int> window{};             // tokens that a query sees, itself included; set = rotating cache
  std::optional<int> chunk{};              // a query sees what comes before it from the last multiple of this on; set = chunked cache
  float temperature = 0.f;                 // of query_scale(); 0 = off
  int temperature_tokens = 8192;
  float softcap = 0.f;  // 0 = off
};

/** Multi-head latent attention, absorbed: the cache holds the latent and the shared rotary key.
 *  Parameters: q_proj | q_a_proj q_a_layernorm q_b_proj; kv_a_proj_with_mqa kv_a_layernorm embed_q unembed_out o_proj. */
struct Mla {
  std::string at = "self_attn";
  int heads = 0;
  int q_lora = 0;  // 0 = q_proj directly
  int kv_lora = 0, nope_dim = 0, rope_dim = 0, v_dim = 0;
  float scale = 0.f;
  bool bias = false;
  float norm_eps = 1e-6f;
  std::optional<Rope> rope{};
};

/** down(act(gate(x)) * up(x)). */
struct Glu {
  std::string at = "mlp";
  std::string gate = "gate_proj", up = "up_proj", down = "down_proj";
  std::string fused_gate_up{};  // e.g. "gate_up_proj": rows are gate, up
  int hidden = 0;
  Act act = Act::silu;
  bool bias = false;
};

/** down(act(up(x))). */
struct Mlp {
  std::string at = "mlp", up = "up_proj", down = "down_proj";
  int hidden = 0;
  Act act = Act::gelu;
  bool bias = false;
};

/** Routed experts, stacked along the first axis of each parameter. */
struct Moe {
  std::string at = "mlp";
  std::string router = "gate";  // router weight, [X, D]
  std::string experts_at = "switch_mlp";
  std::string gate = "gate_proj", up = "up_proj", down = "down_proj";  // below experts_at; gate only when gated
  int experts = 0, top_k = 0, hidden = 0;
  Route route = Route::softmax;
  bool correction_bias = false;      // e_score_correction_bias [X] beside the router: chooses, does not weigh
  bool router_is_parameter = false;  // the router is a bare weight in f32 arithmetic (deepseek), never quantized
  bool renormalize = true;
  float renormalize_eps = 0.f;  // added to the sum
  bool gated = true;            // false: down(act(up(x)))
  Act act = Act::silu;
  float scale = 1.f;         // routed_scaling_factor
  bool weigh_input = false;  // the router's weight multiplies what goes into an expert; top_k is 1
  int groups = 1, groups_kept = 1;
  int latent = 0;  // 0 = experts work at model width; else fc1_latent_proj / fc2_latent_proj around them
  // shared expert, run on every token
  std::string shared_at = "shared_experts";
  int shared_hidden = 0;  // 0 = none
  bool shared_gated = true;
  std::string shared_gate{};  // e.g. "shared_expert_gate": a map to one number, whose sigmoid multiplies the shared expert's output
  bool bias = false;          // of the latent projections and the ungated shared expert
};

/** Mamba-2 state space mixer. Reference: mlx_lm/models/nemotron_h.py, mamba2.py */
struct Mamba2 {
  std::string at = "mixer";
  int heads = 0, head_dim = 0, state = 0, groups = 0, conv = 0;
  bool conv_bias = true, in_bias = false, out_bias = false;
  float norm_eps = 1e-5f;
  int norm_group = 0;  // width of a group of the norm of the gated outputs; 0 = no norm
  bool norm_before_gate = false;
  float dt_min = 0.f, dt_max = 1e30f;  // time_step_limit
};

/** Gated short convolution: out(c * conv(b * x)), with b, c and x from one projection. Reference: mlx_lm/models/lfm2.py ShortConv
 *  Parameters: in_proj conv out_proj. */
struct ShortConv {
  std::string at = "conv";
  int width = 0, conv = 0;  // of the model; taps
  bool bias = false;        // of all three
};

/** Gated delta net: linear attention whose state forgets by a gate and is corrected by what it got wrong.
 *  Parameters: in_proj_qkvz in_proj_ba, or one projection each; conv1d dt_bias A_log norm out_proj.
 *  Reference: mlx_lm/models/qwen3_next.py Qwen3NextGatedDeltaNet, gated_delta.py */
struct GatedDelta {
  std::string at = "linear_attn";
  int key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0, conv = 0;  // value_heads: a multiple of key_heads
  bool split = false;  // in_proj_qkv _z _b _a in whole; else in_proj_qkvz and in_proj_ba hold one key head after the other
  float norm_eps = 1e-6f;
  static constexpr float unit_eps = 1e-6f;  // q and k have length 1: of the sum of their squares
  int keys() const { return key_heads * key_dim; }
  int values() const { return value_heads * value_dim; }
  int channels() const { return 2 * keys() + values(); }  // of the convolution: q, k, v
};

using Op = std::variant<Attention, Mla, Glu, Mlp, Moe, Mamba2, ShortConv, GatedDelta>;

/** x = x + scale * post(sum_i op_i(pre(x))). Ops of one step run on the same input. */
struct Step {
  std::optional<Norm> pre{};
  std::vector<Op> ops{};
  std::optional<Norm> post{};
  float scale = 1.f;
  bool clip_f16 = false;  // clamp the sum to the range of float16 when x is float16
};

using Layer = std::vector<Step>;

/** A rewrite of checkpoint names or tensors, applied in order; a second application changes nothing.
 *  In `from`, `*` matches any run of characters, `{e}` an index; `to` takes what they matched in order. */
struct Rule {
  enum Kind {
    drop,             // from
    rename,           // from -> to
    stack,            // from with {e} -> to, along a new first axis, in the order of {e}
    conv_ncl_to_nlc,  // [C, 1, K] -> [C, K, 1] unless the last axis is 1 already
    dequant_blocks,   // from "*.weight" with "*.weight_scale_inv": fp8 blocks of 128x128 -> bf16
    absorb_mla,       // "*.kv_b_proj.*" -> embed_q, unembed_out (quantized if it was); sizes from the Mla op of the layer
    strip_prefix,     // from = prefix that is removed
    add_one,          // to from, when a tensor matches `to` that only a published checkpoint has: one of a single expert, or a convolution
                      // that conv_ncl_to_nlc would change
    split_gate_up,    // from [X, 2H, D] -> to, where {part} becomes gate_proj and up_proj
    swap_axes,        // from [X, A, B] -> to [X, B, A]
    multiply,         // from times `factors`, when a tensor matches `to` as for add_one
  } kind;
  std::string from;
  std::string to{};
  struct Factor {
    float value = 1.f;
    int rows = 0;  // of the first axis; 0 = all
  };
  std::vector<Factor> factors{};
};

/** Quantization of one kind of tensor by default at conversion. */
struct QuantOverride {
  std::string path_suffix{};
  int bits = 8, group_size = 64;
};

struct Model {
  std::string model_type{};
  std::string root = "model";  // root.layers.N., root.embed_tokens, root.norm
  std::string layers_at = "layers";
  std::string embed = "embed_tokens";
  std::string head = "lm_head";
  int vocab = 0, width = 0;
  bool embed_scale_bf16 = false;  // embed_scale is rounded to bfloat16 first
  float embed_scale = 1.f, logit_scale = 1.f, logit_softcap = 0.f;
  bool tied_head = false;
  bool tied_unless_stored = false;  // tied unless the checkpoint has a head (gemma)
  std::vector<Layer> layers{};
  Norm final_norm{};
  int context_tokens = 0;  // max_position_embeddings, 0 = unknown
  std::vector<Rule> rules{};
  std::vector<QuantOverride> quant{};
  std::vector<std::string> keep_f32{};  // path suffixes that are never cast down
};

}  // namespace mlxlm::arch
