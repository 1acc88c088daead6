// The inner loops, compiled once for each instruction set; plain pointers only.
#pragma once

#include <cstdint>

namespace mlxlm::kernels::cpu {

enum class Storage : uint8_t { f32, f16, bf16, e8m0, e4m3 };  // the last two: scales only

/** How the digits of activations lie: in order; or each 8 as 0,2,4,6,1,3,5,7 for codes below 8 bits. raw: sums are of the digits, without
 * the step. */
enum class DigitForm : uint8_t { bytes, nibbles, nibbles_raw };

/** What a code stands for: affine = scale * code + bias, the others = scale * the small float that it is. */
enum class Codes : uint8_t { affine, e2m1, e4m3 };

/** Quantized rows in panels of 16. For each group of K: the codes, then 16 scales and, for affine codes, 16 biases. Codes lie in vectors of
 * 64 bytes, one dword for each row, so that shifts and masks give 4 codes of each of the 16 rows: 8 bits: vector i holds codes 4i..4i+3. 4
 * bits: vector d holds codes 8d..8d+7; byte b has code 8d+2b low and 8d+2b+1 high. Others, in blocks of 32 codes: a base of 4 bits as above
 * (5, 6) or of 2 bits (2, 3), then a plane of the other bits. With code 8d+2b+odd and s = 2d+odd, a plane of 2 bits is two vectors and has
 * it in vector s/4, byte b, bit 2(s%4); one of 1 bit has it in byte b, bit s. e4m3: 16 bytes for each code, one a row. */
struct Panels {
  const uint8_t* data = nullptr;
  int k = 0, group = 0, bits = 0;
  Storage scales = Storage::f32;
  Codes codes = Codes::affine;
  int base_bits() const { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }
  int scale_bytes() const { return scales == Storage::f32 ? 4 : scales == Storage::e8m0 || scales == Storage::e4m3 ? 1 : 2; }
  int64_t code_bytes() const { return int64_t(group) * bits * 2; }
  int64_t group_bytes() const { return code_bytes() + (codes == Codes::affine ? 2 : 1) * 16 * scale_bytes(); }
  int64_t panel_bytes() const { return group_bytes() * (k / group); }
  /** Activations may be digits: fewer than 8 bits, or integers of 8. */
  bool takes_digits() const { return codes != Codes::e4m3 && group <= 128 && group % 16 == 0; }
  DigitForm digit_form() const { return codes == Codes::e2m1 ? DigitForm::nibbles_raw : bits == 8 ? DigitForm::bytes : DigitForm::nibbles; }
};

/** Rows of activations in both forms that the panel kernels read. */
struct Activations {
  const float* x = nullptr;     // [m][k]
  const float* sums = nullptr;  // [m][groups] sum of x over each group
  const int8_t* digits =
      nullptr;  // [m][2][k]: x = step * (128 * high + low), or [m][1][k]: x = step * high; in the panels' DigitForm; null = use x
  int digit_count = 2;
  const float* steps = nullptr;       // [m][groups]
  const float* digit_sums = nullptr;  // [m][groups] sum of the rounded x; of the digits alone in the raw form
  int k = 0, groups = 0;
};

/** Attention of `rows` queries (at most 4) over keys [0, visible[r]) of one kv head. */
struct AttentionTile {
  const float* q[4];  // [e], scaled
  float* out[4];      // [f]
  int first[4], visible[4];
  int rows = 0, e = 0, f = 0;
  const void *k = nullptr, *v = nullptr;  // [s][e], [s][f]
  int64_t k_stride = 0, v_stride = 0;     // elements between keys
  Storage storage = Storage::f32;
  float softcap = 0.f;
  float* scores = nullptr;  // 4 * stride
  int64_t score_stride = 0;
};

/** Keys of a block: a row's softmax is done block by block and merged in order, so it depends on the positions alone. */
constexpr int attention_block = 64;

/** Rows that are worked on in lanes come in multiples of this; memory of rows has room for as many. */
constexpr int most_lane_rows = 32;

/** `rows` queries over one more block of at most 64 keys. Dims are multiples of 16, padded with zeros; q is scaled. */
struct BlockAttention {
  const float* q;                  // [rows][key_dims]
  const float* q_lanes = nullptr;  // by queries_to_lanes, for many rows; keys and values are floats then. Null = q, a few rows
  const void *k, *v;               // [keys][key_dims], [keys][value_dims]
  Storage storage;                 // of k and v
  int rows, keys, key_dims, value_dims;
  const int *first, *last;  // [rows]: a row sees keys [first, last) of the block
  float softcap;
  float *out, *peaks, *totals;  // of the blocks so far, and then of this one, too: [rows][value_dims] not yet divided, [rows], [rows]
  float* scores;                // 64 * most_lane_rows
};

/** Rows of affine quantized numbers: `bits` 2, 3, 4, 5, 6 or 8, as one little-endian stream of bits a row. */
struct QuantizedSpan {
  const uint8_t* packed = nullptr;
  const void *scales = nullptr, *biases = nullptr;
  Storage storage = Storage::f32;               // of scales and biases
  int64_t packed_stride = 0, scale_stride = 0;  // bytes, elements between rows
  int bits = 0, group = 0, dims = 0;
};

/** Tokens of one head of a state space: state [dims][width] = decay * state + step * x (x) b; y = state c + skip * x. */
struct ScanHead {
  const float *x = nullptr, *b = nullptr, *c = nullptr;  // rows of tokens: [dims], [width], [width]
  const float *decay = nullptr, *step = nullptr;         // one a token
  int64_t x_stride = 0, bc_stride = 0, step_stride = 0, y_stride = 0;
  const float* from = nullptr;  // null = zeros; may be `state`
  float *state = nullptr, *y = nullptr;
  float skip = 0.f;
  int tokens = 0, dims = 0, width = 0;
};

/** Tokens of some rows of one head of the gated delta rule, state [dims][width]: state = decay * state; state += beta * (v - state k) (x)
 * k; y = state q. */
struct DeltaHead {
  const float *q = nullptr, *k = nullptr, *v = nullptr;  // rows of tokens: [width], [width], [dims]
  const float *decay = nullptr, *beta = nullptr;         // one a token
  int64_t qk_stride = 0, v_stride = 0, step_stride = 0, y_stride = 0;
  const float* from = nullptr;  // null = zeros; may be `state`
  float *state = nullptr, *y = nullptr;
  int tokens = 0, dims = 0, width = 0;
};

struct Isa {
  const char* name;
  bool uses_digits;
  /** c[m][0..16) of one panel for rows [m0, m0 + count), c has `ldc` floats a row. */
  void (*panel)(const Panels& p, const uint8_t* panel, const Activations& a, int m0, int count, float* c, int64_t ldc);
  /** Quantizes one row for the digits form. */
  void (*make_digits)(const float* x, int k, int group, DigitForm form, int count, int8_t* digits, float* steps, float* sums);
  void (*group_sums)(const float* x, int k, int group, float* sums);
  /** c[m][n] for rows m of x [m][k] and `count` weight rows at w (at most 4). */
  void (*dense)(const void* w, Storage storage, int64_t row_stride, int count, const float* x, int m, int k, float* c, int64_t ldc);
  void (*attention)(const AttentionTile& t);
  void (*attention_block)(const BlockAttention& b);
  /** q [rows][dims] in the order of BlockAttention::q_lanes, padded with zeros to a multiple of most_lane_rows rows at most. */
  void (*queries_to_lanes)(const float* q, int rows, int dims, float* to);
  /** Adds a span's result to a row's. */
  void (*merge_rows)(float* peak, float* total, float* out, float new_peak, float new_total, const float* more, int dims);
  /** x [heads][width], rotated in place; cosines and sines [pairs], `scale` multiplies the rotated dims first. */
  void (*rope)(float* x, int heads, int width, const float* cosines, const float* sines, int pairs, bool traditional, float scale);
  /** x += scale * y */
  void (*add_scaled)(float* x, const float* y, float scale, int64_t count);
  /** Rows [0, rows) as floats, `to_stride` apart. */
  void (*dequantize)(const QuantizedSpan& span, int rows, float* to, int64_t to_stride);
  void (*load)(const void* from, Storage storage, float* to, int64_t count);
  void (*store)(const float* from, Storage storage, void* to, int64_t count);
  void (*rms_norm)(const float* x, const float* weight, float eps, int dims, float* out);  // weight may be null
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t count);         // up may be null
  void (*sigmoid_mul)(const float* gate, const float* x, float* out, int64_t count);       // x may be null
  void (*multiply)(const float* a, const float* b, float* out, int64_t count);
  void (*gelu_tanh_mul)(const float* gate, const float* up, float* out, int64_t count);
  float (*row_max)(const float* x, int64_t count);
  /** out = exp(x - shift), 0 where that is below the normal numbers; returns their sum. */
  float (*exps)(const float* x, float shift, int64_t count, float* out);
  void (*scan)(const ScanHead& s);
  void (*delta)(const DeltaHead& s);
  /** out[c] = bias[c] + sum of rows[t][c] * weight[t][c] for c in [from, to); weight [taps][channels], bias may be null. */
  void (*convolve)(const float* const* rows, const float* weight, const float* bias, int taps, int64_t from, int64_t to, int64_t channels,
                   float* out);
};

const Isa& isa_generic();
#if defined(__x86_64__)
const Isa& isa_avx2();
const Isa& isa_avx512();
/** avx512 with bit matrices for bytes (GFNI): fewer instructions to part nibbles, the same bits. */
const Isa& isa_gfni();
/** gfni with products by AMX tiles: after the system has granted them (isa_list.cpp). */
const Isa& isa_amx();
/** Whether a product by tiles is right. Ends the process where the machine only says that it has them. */
bool try_tiles();
#elif defined(__aarch64__)
const Isa& isa_neon();
const Isa& isa_dotprod();
const Isa& isa_i8mm();
#endif

/** The best that this machine runs, or what MLXLM_CPU_ISA names. */
const Isa& isa();

}  // namespace mlxlm::kernels::cpu
