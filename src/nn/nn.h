// arrays -> arrays: no state, no parameter names. Chooses our kernels on the CPU and MLX's elsewhere.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include <mlx/array.h>

#include "arch/model.h"
#include "kernels/cpu/eager.h"
#include "kernels/cpu/kernels.h"
#include "plan/plan.h"

namespace mlxlm::nn {

namespace mx = mlx::core;

/** A trained addition to a map: y + scale * (x a) b; with m, each output is then multiplied by m / |row of the sum of both weights|. */
struct LowRank {
  mx::array a, b;                // [in, r], [r, out]
  std::optional<mx::array> m{};  // [out]
  float scale = 1.f;
};

/** A linear map, dense or quantized. [out, in], or [X, out, in] for stacked experts.
 *  On the CPU the weights are packed at construction and the originals released. */
class Linear {
 public:
  struct Weights {
    mx::array weight;
    std::optional<mx::array> scales{}, biases{};
    std::optional<mx::array> bias{};
    std::optional<plan::Quant> quant{};
    std::optional<LowRank> adapter{};
    bool quantize_input = false;  // x is rounded to the weights' own 8- or 4-bit float format first
  };
  /** Several parts with equal input and quantization become one map with concatenated rows (fused q/k/v, gate/up). */
  explicit Linear(std::vector<Weights> parts);

  /** x [..., in] -> [..., out]; leading axes are flattened before the matmul. */
  mx::array operator()(const mx::array& x) const;
  /** Stacked: x [T, in] or [T, k, in], indices [T, k] -> [T, k, out]. */
  mx::array gather(const mx::array& x, const mx::array& indices, bool per_expert_input) const;
  /** As an embedding table: tokens [...] -> [..., in]. */
  mx::array embed(const mx::array& tokens, mx::Dtype dtype) const;
  int64_t bytes() const;
  /** It gives the logits: never with fewer than two digits (docs/performance.md). */
  void make_output_layer() {
    output_layer_ = true;
    if (base_) base_->make_output_layer();
    for (const auto& part : split_) part->make_output_layer();
  }
  int out_dims() const { return out_dims_; }
  /** The packed matrices one below the other, for executors that run without arrays; no parts unless on the CPU, without adapters and with
   * inputs as they come. */
  kernels::cpu::EagerMap eager() const;

 private:
  void adapt(Weights part);
  mx::array adapted(const mx::array& x) const;

  std::vector<Weights> parts_;                  // on the GPU
  std::vector<std::shared_ptr<Linear>> split_;  // on the CPU, parts that cannot be one matrix
  kernels::cpu::PackedMatrixPtr packed_;
  std::optional<mx::array> bias_;
  // With an adapter: the map itself without its bias, the two factors, and what multiplies the outputs.
  std::shared_ptr<Linear> base_, into_rank_, from_rank_;
  std::optional<mx::array> stretch_;
  float adapter_scale_ = 0.f;
  std::optional<plan::Quant> input_quant_;
  int out_dims_ = 0;
  bool output_layer_ = false;
};

/** One small map a head, as in absorbed latent attention: [H, out, in], kept dense. */
class HeadMaps {
 public:
  HeadMaps(Linear::Weights w, mx::Dtype dtype) : source_(std::move(w)), dtype_(dtype) {}
  /** x [B, H, L, in] -> [B, H, L, out]; with transpose false, [B, H|1, L, out] -> [B, H, L, in]. */
  mx::array operator()(const mx::array& x, bool transpose) const;

 private:
  Linear::Weights source_;
  mx::Dtype dtype_;
  mutable std::optional<mx::array> weight_{};  // made at the first use: the fused executor has its own form
};

mx::array norm(const mx::array& x, const arch::Norm& spec, const std::optional<mx::array>& weight, const std::optional<mx::array>& bias);
mx::array activate(const mx::array& x, arch::Act act);
/** gate_up [..., 2H] -> [..., H]. */
mx::array glu(const mx::array& gate_up, arch::Act act);

/** x [B,L,H,E] -> [B,H,L,E], rotated if there is a rope. */
mx::array rope_heads(const mx::array& x, const arch::Rope* rope, const std::shared_ptr<const std::vector<float>>& frequencies, int offset);

/** q [B,H,L,E], k [B,K,S,E], v [B,K,S,F] -> [B,L,H*F]. Causal, aligned at the end. window 0 = unlimited. */
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale, int window, float softcap);

/** Chosen experts and their weights: logits [T, X] -> {indices [T, k], weights [T, k] f32}. Reference: mlx_lm/models/deepseek_v3.py
 * group_expert_select, qwen3_moe.py */
std::vector<mx::array> route(const mx::array& logits, const arch::Moe& spec, const std::optional<mx::array>& correction_bias);

/** Causal depthwise convolution: x [B,L,C], tail [B,conv-1,C] or none, weight [C,conv,1] -> {y [B,L,C] (before activation), new tail}. */
std::vector<mx::array> short_conv(const mx::array& x, const std::optional<mx::array>& tail, const mx::array& weight,
                                  const std::optional<mx::array>& bias);

/** Calls of up to so many tokens give each token what it gets alone, bit for bit, also where longer ones take a faster form. */
constexpr int stepwise_tokens = 16;

/** Mamba-2 scan. x [B,L,H,P], A_log [H], B, C [B,L,G,N], D [H], dt [B,L,H], dt_bias [H], state [B,H,P,N] or none -> {y [B,L,H,P], new
 * state}. Reference: mlx_lm/models/ssm.py */
std::vector<mx::array> ssm_scan(const mx::array& x, const mx::array& a_log, const mx::array& b, const mx::array& c, const mx::array& d,
                                const mx::array& dt, const mx::array& dt_bias, const std::optional<mx::array>& state, float dt_min,
                                float dt_max);

/** The gated delta rule, token by token. q, k [B,L,G,E] with H a multiple of G, v [B,L,H,F], decay and beta [B,L,H], state [B,H,F,E] or
 * none -> {y [B,L,H,F] in v's dtype, new state, float32}. Reference: mlx_lm/models/gated_delta.py */
std::vector<mx::array> gated_delta(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& decay,
                                   const mx::array& beta, const std::optional<mx::array>& state);

/** The same by plain operations, for devices that have no kernel for it. */
std::vector<mx::array> gated_delta_by_ops(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& decay,
                                          const mx::array& beta, const std::optional<mx::array>& state);

/** How much is kept of a state: exp(-exp(A_log) * softplus(a + dt_bias)), float32. */
mx::array delta_decay(const mx::array& a, const mx::array& a_log, const mx::array& dt_bias);

}  // namespace mlxlm::nn
