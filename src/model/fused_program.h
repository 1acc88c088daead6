// What the fused executor runs: a description's ops with their packed weights, and the step over rows of floats. Part of model/fused_*.cpp
// only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <variant>
#include <vector>

#include "arch/model.h"
#include "cache/cache.h"
#include "cache/quantized.h"
#include "kernels/cpu/eager.h"
#include "model/fused_model.h"

namespace mlxlm::model::fused {

namespace mx = mlx::core;
namespace cpu = kernels::cpu;

constexpr int chunk_tokens = 512;  // rows that go through all layers together

struct FusedNorm {
  std::vector<float> weight;  // empty = none
  float eps = 0.f;
  void operator()(const float* x, int dims, float* out) const {
    cpu::isa().rms_norm(x, weight.empty() ? nullptr : weight.data(), eps, dims, out);
  }
};

struct FusedAttention {
  int cache = 0;  // its place in a sequence's caches
  int heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0, window = 0, rotation = -1;
  float scale = 1.f, softcap = 0.f;
  float temperature = 0.f;  // as in arch::Attention
  int temperature_tokens = 1;
  bool latent = false;  // key and value are the two parts of a latent key
  bool norm_full_width = false;
  bool gated = false;  // the projection's queries come with gates: of each head, the query and then the gate
  std::optional<FusedNorm> q_norm{}, k_norm{};
  cpu::EagerMap qkv{}, o{};
};

struct FusedFeedForward {
  bool gated = true;
  arch::Act act = arch::Act::silu;
  int hidden = 0;
  cpu::EagerMap up{}, down{};  // gated: up holds gate and up
};

/** Latent attention, absorbed: queries are mapped to the latent space, where one key serves all heads. */
struct FusedLatent {
  FusedAttention memory{};  // its layer's cache: the latent as key, the rotary key as value
  int heads = 0, latent = 0, nope = 0, rope = 0, value = 0;
  float scale = 1.f;
  std::optional<FusedNorm> q_norm{};
  FusedNorm kv_norm{};
  cpu::EagerMap q_a{}, q{}, kv_a{}, embed_q{}, unembed_out{}, o{};  // q_a only with q_norm
};

struct FusedExperts {
  arch::Moe spec{};
  std::vector<float> correction{};
  cpu::EagerMap router{}, up{}, down{}, into_latent{}, from_latent{}, shared_up{}, shared_down{}, shared_gate{};
};

/** A causal convolution of each channel by itself. */
struct FusedConv {
  int channels = 0, taps = 0;
  std::vector<float> weight{}, bias{};  // [taps][channels], [channels] or none
  bool silu = false;                    // of the sum
};

/** Which of a sequence's caches a recurrent op uses, and the arrays in it: the convolution's tail comes first. */
struct FusedState {
  int cache = 0;
  std::vector<mx::Shape> shapes{};
};

struct FusedMamba {
  FusedState memory{};
  arch::Mamba2 spec{};
  FusedConv conv{};
  std::vector<float> dt_bias{}, decay{}, skip{}, norm{};  // decay = -exp(A_log); norm: or none
  cpu::EagerMap in{}, out{};
  int inner() const { return spec.heads * spec.head_dim; }
};

struct FusedShortConv {
  FusedState memory{};
  FusedConv conv{};
  cpu::EagerMap in{}, out{};
};

struct FusedGatedDelta {
  FusedState memory{};
  arch::GatedDelta spec{};
  FusedConv conv{};
  std::vector<float> dt_bias{}, rate{};  // rate = -exp(A_log)
  FusedNorm unit_q{}, unit_k{}, norm{};  // the first two make rows of a fixed length
  cpu::EagerMap in{}, out{};
};

using FusedOp = std::variant<FusedAttention, FusedFeedForward, FusedLatent, FusedExperts, FusedMamba, FusedShortConv, FusedGatedDelta>;

struct FusedStep {
  std::optional<FusedNorm> pre{}, post{};
  std::vector<FusedOp> ops{};
  float scale = 1.f;
};

struct Rotary {
  arch::Rope rope;
  std::vector<float> frequencies;
};

/** Where a sequence's keys and values of one op lie during a step. */
struct Memory {
  cache::WritePlan plan;
  int window = 0;                                   // of a rotating cache, for several tokens at once
  std::optional<cache::QuantizedPlan> quantized{};  // then `plan` says where rows go, and nothing of the memory
};

/** Where a recurrent op's state comes from and goes to: positions of the convolution's tail in the step's inputs (-1 = none yet) and
 * outputs; the state itself, if there is one, comes next. */
struct Recurrent {
  int in = -1, out = -1;
};

struct Sequence {
  int tokens, wanted_rows, offset;
  std::vector<std::optional<Memory>> memories;  // as its caches
  std::vector<Recurrent> recurrent{};           // as its caches, or none at all
};

/** Tokens [first, first + count) of a sequence in a chunk. */
struct Piece {
  int sequence, first, count;
};

/** Everything that does not change between steps, and scratch memory. */
class Program {
 public:
  std::vector<FusedStep> steps;
  std::vector<Rotary> rotations;
  FusedNorm final_norm;
  cpu::EagerMap head;
  cpu::PackedMatrixPtr embedding;
  float embed_scale = 1.f, logit_scale = 1.f, logit_softcap = 0.f;
  int width = 0, vocab = 0, caches = 0;  // caches: of a sequence
  mx::Dtype dtype = mx::float32;

  /** in: tokens, then states; out: logits, then states; all zeros once `stop` (or null) was found to be set. */
  void run(const std::vector<mx::array>& in, const std::vector<Sequence>& sequences, std::vector<mx::array>& out,
           const std::atomic<bool>* stop);

 private:
  struct Chunk {
    std::vector<Piece> pieces;
    int tokens = 0;
  };
  void run_chunk(const int* tokens, const std::vector<Sequence>& sequences, const Chunk& chunk, mx::array& logits, int& next_row);
  void rotate_tables(const std::vector<Sequence>& sequences, const Chunk& chunk);
  void attention(const FusedAttention& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y);
  void finish_qkv(const FusedAttention& op, const Sequence& s, const Piece& piece, int l, int row, float* qkv);
  static void store_quantized(const FusedAttention& op, const Memory& memory, int64_t row, const float* k, const float* v);
  void latent_attention(const FusedLatent& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y);
  void finish_latent(const FusedLatent& op, const Sequence& s, int position, int row, float* q, float* kv);
  void attend_in_latent(const FusedLatent& op, const std::vector<Sequence>& sequences, const Chunk& chunk, const float* q);
  void experts(const FusedExperts& op, const FusedStep& step, int rows, float* y);
  void mamba(const FusedMamba& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y);
  void short_conv(const FusedShortConv& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y);
  void gated_delta(const FusedGatedDelta& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y);
  void convolve(const FusedConv& conv, const FusedState& memory, const std::vector<Sequence>& sequences, const Chunk& chunk,
                const float* input, int64_t stride, float* out) const;
  /** Of each piece, in the chunk. */
  static std::vector<int> first_rows(const Chunk& chunk) {
    std::vector<int> rows;
    int at = 0;
    for (const auto& piece : chunk.pieces) {
      rows.push_back(at);
      at += piece.count;
    }
    return rows;
  }
  static void scan_in_blocks(cpu::ScanHead s);
  void run_op(const FusedOp& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y);
  void feed_forward(const FusedFeedForward& op, const FusedStep& step, int rows, float* y);
  void write_logits(const std::vector<Sequence>& sequences, const Chunk& chunk, mx::array& logits, int& next_row);
  void input_row(const FusedStep& step, int row, float* to) const {
    const float* x = x_ + int64_t(row) * width;
    if (step.pre) return (*step.pre)(x, width, to);
    std::memcpy(to, x, width * sizeof(float));
  }
  bool exact() const { return dtype == mx::float32; }
  bool stopped() const { return stop_ != nullptr && stop_->load(std::memory_order_relaxed); }

  const std::atomic<bool>* stop_ = nullptr;  // of the run at hand
  float* x_ = nullptr;
  const std::vector<mx::array>* in_ = nullptr;
  std::vector<mx::array>* out_ = nullptr;
  cpu::FloatBuffer x_buffer_, qkv_, mixed_, y_, more_, hidden_, logits_, spare_[6];
  std::vector<std::vector<float>> cosines_, sines_;  // one a rotation, [row][pairs]
};

template <class Body>
void for_rows(int rows, int64_t width, Body&& body) {
  const int chunks = rows * width < 16384 ? 1 : std::min(rows, 32);
  cpu::in_parallel(chunks, [&](int chunk) {
    for (int row = int(int64_t(rows) * chunk / chunks); row < int(int64_t(rows) * (chunk + 1) / chunks); ++row) body(row);
  });
}

/** The convolution of one sequence's tokens: what it sees is the input's own rows and, before them, the tail. */
void convolve_piece(const FusedConv& conv, const float* tail, const float* input, int64_t stride, int count, float* out, float* new_tail);

float softplus(float x);
float sigmoid(float x);

/** act(gate) * up, or act(gate) where up is null. */
void act_row(arch::Act act, const float* gate, const float* up, float* out, int n);

/** Null at the first op without kernels. */
std::shared_ptr<Program> make_program(const arch::Model& description, const FusedParts& parts);

}  // namespace mlxlm::model::fused
