// The same kernels on plain rows of floats, run at once: what the fused executor is made of. Thread: one at a time (they share scratch
// memory).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/packed.h"

namespace mlxlm::kernels::cpu {

/** Float memory that grows and is not initialized. Vectors of 64 bytes lie in one cache line each. */
class FloatBuffer {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      size_ = 0;
      data_.reset();
      data_.reset(static_cast<float*>(::operator new((floats + 64) * sizeof(float), alignment)));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, alignment); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

/** A linear map whose rows may lie in several matrices of the same width, one below the other. */
struct EagerMap {
  struct Part {
    PackedMatrixPtr matrix;
    std::vector<float> bias;  // empty = none
  };
  std::vector<Part> parts{};
  int out_dims = 0;
  bool output_layer = false;  // gives logits: digits_of_activations
};

/** Writes row `row` of the activations to `to`; called once a row, from any thread of the pool. */
using RowSource = std::function<void(int row, float* to)>;

/** x [m, K] (made by `source`) -> out [m, ld_out >= out_dims]. `exact`: float32 arithmetic, not the two-digit form. */
void eager_map(const EagerMap& map, int m, const RowSource& source, bool exact, float* out, int64_t ld_out);

/** Experts: token t's j-th choice is experts[t * top_k + j]. `source` makes rows 0..m-1 ([m] tokens, or [m * top_k] when per_choice).
 *  out [m * top_k, out_dims]. */
void eager_gather(const EagerMap& map, int m, int top_k, const int* experts, bool per_choice, const RowSource& source, bool exact,
                  float* out, int64_t ld_out);

/** Row n of an embedding table. */
void eager_embedding(const PackedMatrix& table, int64_t n, float* out);

/** Rows of a cache that others hold, too: [kv_heads][capacity][dims], of which `rows` are seen, a multiple of attention_block. */
struct SharedKeys {
  const void *keys = nullptr, *values = nullptr;
  int64_t capacity = 0;
  int rows = 0;
};

/** Attention of one sequence's new tokens over its cache. */
struct EagerAttention {
  const float* q = nullptr;  // [tokens][q_stride]: heads side by side, head_dim each, not scaled
  float* out = nullptr;      // [tokens][out_stride]
  int64_t q_stride = 0, out_stride = 0;
  int tokens = 0;
  const void *keys = nullptr, *values = nullptr;  // [kv_heads][capacity][dims]
  int64_t capacity = 0;
  int visible = 0;  // keys that the first token sees; each next one sees one more
  int window = 0;   // > 0: only the last so many of them
  const QuantizedSpan *quantized_keys = nullptr,
                      *quantized_values = nullptr;  // instead of keys and values: the first row of the first head
  std::vector<SharedKeys> shared{};                 // what comes before keys and values
};
struct AttentionShape {
  int heads, kv_heads, key_dims, value_dims;
  float scale, softcap;
  Storage storage;
};
void eager_attention(const std::vector<EagerAttention>& sequences, const AttentionShape& shape);

/** One row as mx::quantize lays it out: dims * bits / 8 bytes, and a scale and a bias a group (32, 64 or 128) in `storage`. */
void quantize_row(const float* x, int dims, int bits, int group, Storage storage, uint8_t* packed, void* scales, void* biases);

/** Heads of the gated delta rule, all of as many rows: head_of(i) for i in [0, heads), in parallel over heads and rows. */
void eager_delta(int heads, int dims, const std::function<DeltaHead(int head)>& head_of);

/** body(chunk) for chunk in [0, chunks) on the pool. */
void in_parallel(int chunks, const std::function<void(int)>& body);

}  // namespace mlxlm::kernels::cpu
