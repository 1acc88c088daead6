// Our own MLX primitives for the CPU. Every function builds a lazy array on the default CPU stream; arithmetic is f32 inside, the result
// has x's dtype.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <mlx/array.h>

namespace mlxlm::kernels::cpu {

namespace mx = mlx::core;

/** How products with quantized weights treat activations: as float32; as two 8-bit digits a group where the processor has dot products of
 * bytes (relative error 4e-5; float32 models stay exact); or as one digit (5e-3). The default is standard. */
enum class Precision { exact, standard, fast };
/** For the whole process; set before a model runs. */
void set_precision(Precision precision);
Precision precision();
/** Digits of 8 bits that stand for an activation: two, or one with Precision::fast, except before an output layer, whose errors are those
 * of the logits. */
int digits_of_activations(bool output_layer);

/** A weight matrix [N, K] (or stacked [X, N, K]) in the layout that the matmul kernels read. Immutable, shared. */
class PackedMatrix;
using PackedMatrixPtr = std::shared_ptr<const PackedMatrix>;

/** Packs MLX's affine quantization (2,3,4,5,6,8 bits; groups 32, 64, 128). weight uint32 [.., N, K*bits/32], scales and biases [.., N,
 * K/group]. The arrays must be evaluated (data in memory). Rows of a list of matrices with equal K, bits and group are concatenated (fused
 * q/k/v, gate/up). */
PackedMatrixPtr pack_affine(const std::vector<mx::array>& weights, const std::vector<mx::array>& scales,
                            const std::vector<mx::array>& biases, int bits, int group_size);
/** mxfp4 (group 32), mxfp8 (group 32), nvfp4 (group 16). */
PackedMatrixPtr pack_float(const std::vector<mx::array>& weights, const std::vector<mx::array>& scales, const std::string& mode, int bits,
                           int group_size);
/** Dense f32, f16 or bf16 weights [.., N, K]. Keeps the arrays, copies nothing when they are row contiguous. */
PackedMatrixPtr pack_dense(const std::vector<mx::array>& weights);

int64_t packed_bytes(const PackedMatrix& w);

/** x [..., K] -> [..., N] = x W^T (+ bias [N]). `output_layer`: digits_of_activations. */
mx::array matmul(const mx::array& x, const PackedMatrixPtr& w, const std::optional<mx::array>& bias = std::nullopt,
                 bool output_layer = false);

/** Experts: x [T, K] (or [T, k, K] when `per_expert_input`), indices int32/uint32 [T, k] -> [T, k, N]; row (t, j) uses expert indices[t,
 * j]. */
mx::array gather_matmul(const mx::array& x, const PackedMatrixPtr& w, const mx::array& indices, bool per_expert_input,
                        const std::optional<mx::array>& bias = std::nullopt);

/** Rows of an embedding table: indices [...] -> [..., K] in `dtype`. */
mx::array take_rows(const PackedMatrixPtr& w, const mx::array& indices, mx::Dtype dtype);

/** x [..., D] * rsqrt(mean(x^2) + eps) * (weight or 1). `plus_one`: weight + 1. */
mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps, bool plus_one);

enum class GluAct { silu, gelu, gelu_tanh, relu2 };
/** gate_up [..., 2H] (gate first) -> act(gate) * up [..., H]. */
mx::array glu(const mx::array& gate_up, GluAct act);
mx::array activate(const mx::array& x, GluAct act);

/** Rotates the first 2 * frequencies.size() of the last axis of x [B, L, H, E] and returns it as [B, H, L, E].
 *  Angle of token l = (offset + l) * frequency; `input_scale` multiplies the rotated dims first. */
mx::array rope_heads(const mx::array& x, const std::shared_ptr<const std::vector<float>>& frequencies, int offset, bool traditional,
                     float input_scale);

/** Writes x [B,K,L,E] into buffer [B,K,C,E] at `start` of axis 2, in place, and returns the buffer as a new array.
 *  Whoever holds the old array sees the change: only the cache that owns the buffer may call this. */
mx::array write_rows(const mx::array& buffer, const mx::array& x, int start);

struct AttentionOptions {
  float scale = 1.f;
  bool causal = true;  // aligned at the end: query l sees keys up to S - L + l
  int window = 0;      // > 0: only the last `window` of those
  float softcap = 0.f;
};
/** q [B,H,L,E], k [B,K,S,E], v [B,K,S,F] (views allowed) -> [B,L,H,F]: ready for the output projection. */
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options);

/** Rows of keys or values in MLX's affine quantization: uint32 [B,K,S,dims*bits/32], scales and biases [B,K,S,dims/group]. Views allowed.
 */
struct QuantizedRows {
  mx::array packed, scales, biases;
  int bits, group_size;
  int dims() const { return scales.shape(3) * group_size; }
};
/** The same over quantized rows, which are read as they lie: a block of keys at a time is dequantized on the way. */
mx::array attention(const mx::array& q, const QuantizedRows& k, const QuantizedRows& v, const AttentionOptions& options);
/** [B,K,S,dims] in the scales' dtype; by MLX where the CPU kernels do not run. */
mx::array dequantize(const QuantizedRows& rows);

/** The gated delta rule over float32, row contiguous arrays: q, k [B,L,G,E], v [B,L,H,F], decay and beta [B,L,H], state [B,H,F,E] or none
 * -> {y [B,L,H,F], new state}. */
std::vector<mx::array> gated_delta(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& decay,
                                   const mx::array& beta, const std::optional<mx::array>& state);

/** [B, V] -> int32 [B]: the first of the largest. */
mx::array argmax(const mx::array& logits);
/** [B, V] -> float32 [B, V]: logits minus the logarithm of their exponentials' sum. */
mx::array log_softmax(const mx::array& logits);

/** Which of a row's tokens may be drawn; they are kept by each in this order. */
struct DrawOptions {
  float temperature = 1.f;
  float top_p = 0.f;  // 0 or 1 = off
  float min_p = 0.f;  // 0 = off
  int top_k = 0;      // 0 = off
};
/** logprobs float32 [B, V], key uint32 [2] -> int32 [B]. One uniform number a row, and the token at that part of the sum of the filtered
 * exponentials: for one row what mlx::core::random::categorical draws, but for rounding. Reference: mlx_lm/sample_utils.py, mlx/random.cpp
 */
mx::array draw(const mx::array& logprobs, const mx::array& key, const DrawOptions& options);

/** True when the CPU kernels can run here (always on x86-64 and arm64 Linux; false where MLX's default device is a GPU). */
bool active();

/** "amx-int8", "avx512-gfni", "avx512-vnni", "avx2", "generic", ...: what was chosen at run time. MLXLM_CPU_ISA overrides it. */
std::string isa_name();

}  // namespace mlxlm::kernels::cpu
