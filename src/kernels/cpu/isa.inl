// The inner loops on vectors of 16 floats (GCC and Clang vector extensions: one source for AVX-512, AVX2, NEON and plain C++).
// Included by isa_<name>.cpp, each compiled with its own flags. Only C headers here: inline functions of the standard library
// compiled with these flags could end up in code that runs on any machine.
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(MLXLM_NEON)
#include <arm_neon.h>
#endif

#include "kernels/cpu/isa.h"

namespace mlxlm::kernels::cpu {
namespace {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

inline F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
inline F set(float x) { return F{} + x; }
inline F select(I mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }
inline F vmax(F a, F b) { return select(a > b, a, b); }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float value = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  const uint32_t sign = (x >> 16) & 0x8000u;
  x &= 0x7FFFFFFFu;
  if (x >= 0x7F800000u) return uint16_t(sign | 0x7C00u | (x > 0x7F800000u ? 0x200u : 0u));
  if (x >= 0x477FF000u) return uint16_t(sign | 0x7C00u);
  if (x < 0x38800000u) {  // subnormal: the addition rounds to nearest even
    float a;
    memcpy(&a, &x, 4);
    a += 0.5f;
    uint32_t r;
    memcpy(&r, &a, 4);
    return uint16_t(sign | (r - 0x3F000000u));
  }
  x += 0xC8000FFFu + ((x >> 13) & 1u);
  return uint16_t(sign | (x >> 13));
}

inline uint16_t float_to_bf16(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  if ((x & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t((x >> 16) | 0x40u);
  return uint16_t((x + 0x7FFFu + ((x >> 16) & 1u)) >> 16);
}

/** 16 values at element `i`. */
inline F load_any(const void* p, Storage s, int64_t i) {
  if (s == Storage::f32) return load(static_cast<const float*>(p) + i);
  const uint16_t* h = static_cast<const uint16_t*>(p) + i;
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h));
  if (s == Storage::f16) return (F)_mm512_cvtph_ps(raw);
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__F16C__)
  if (s == Storage::f16) {
    F v;
    const __m256 a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h)));
    const __m256 b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + 8)));
    memcpy(&v, &a, 32);
    memcpy(reinterpret_cast<char*>(&v) + 32, &b, 32);
    return v;
  }
#elif defined(MLXLM_NEON)
  float t[16];
  for (int l = 0; l < 16; l += 4) {
    const uint16x4_t raw = vld1_u16(h + l);
    vst1q_f32(t + l, s == Storage::f16 ? vcvt_f32_f16(vreinterpret_f16_u16(raw)) : vreinterpretq_f32_u32(vshll_n_u16(raw, 16)));
  }
  return load(t);
#endif
  F v;
  if (s == Storage::f16) {
    for (int l = 0; l < 16; ++l) v[l] = half_to_float(h[l]);
    return v;
  }
  U bits;
  for (int l = 0; l < 16; ++l) bits[l] = uint32_t(h[l]) << 16;
  return (F)bits;
}

inline float load_one(const void* p, Storage s, int64_t i) {
  if (s == Storage::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
#if defined(__F16C__)
  if (s == Storage::f16) return _cvtsh_ss(h);
#else
  if (s == Storage::f16) return half_to_float(h);
#endif
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/** `count` < 16 values from element `i`, then zeros. Ends of rows take the same vector operations as the rest: whether a scalar loop
 *  becomes fused multiply-adds depends on the code around it, and so would a row's last bit. */
inline F load_some(const void* p, Storage s, int64_t i, int count) {
  float t[16] = {};
  for (int l = 0; l < count; ++l) t[l] = load_one(p, s, i + l);
  return load(t);
}

/** Lanes with those 8, 4, 2 or 1 further. */
inline F swap8(F v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
inline F swap4(F v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
inline F swap2(F v) { return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
inline F swap1(F v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }

/** The sum in one fixed order. */
inline float sum(F v) {
  v += swap8(v);
  v += swap4(v);
  v += swap2(v);
  return v[0] + v[1];
}

inline float max_lane(F v) {
  v = vmax(v, swap8(v));
  v = vmax(v, swap4(v));
  v = vmax(v, swap2(v));
  return vmax(v, swap1(v))[0];
}

/** e^x for x in [-87.3, 88]; elsewhere anything, and a NaN for one. */
__attribute__((always_inline)) inline F vexp_inside(F x) {
  const F z = x * 1.44269504f + 12582912.f;  // rounds to a whole number, which is in the low bits of z
  const F n = z - 12582912.f;
  F r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F p = set(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.f);
  return p * (F)(((U)z << 23) + 0x3F800000u);
}

inline F vexp(F x) {
  x = select(x < -87.3f, set(-87.3f), x);
  return select(x > 88.f, set(INFINITY), vexp_inside(x));
}

/** e^x of a softmax, where x is at most 0: zero below the normal numbers. */
inline F vexp_weight(F x) { return select(x < -87.3f, F{}, vexp_inside(x)); }

inline float exp_one(float x) {
  const F v = vexp(set(x));
  return v[0];
}

#include "kernels/cpu/isa_panels.inl"

void group_sums_kernel(const float* x, int k, int group, float* sums) {
  for (int g = 0; g < k / group; ++g) {
    F t = F{};
    for (int i = 0; i < group; i += 16) t += load(x + g * group + i);
    sums[g] = sum(t);
  }
}

// ---- dense ---------------------------------------------------------------------------------------------------------

/** FIRST: nobody has read these weights yet. */
template <int N, int R, bool FIRST>
void dense_tile(const void* w, Storage s, int64_t row_stride, const float* x, int k, float* c, int64_t ldc) {
  const int64_t item = s == Storage::f32 ? 4 : 2;
  F t[N][R];
  for (int n = 0; n < N; ++n) {
    for (int i = 0; i < R; ++i) t[n][i] = F{};
  }
  int j = 0;
  for (; j + 16 <= k; j += 16) {
    F xv[R];
    for (int i = 0; i < R; ++i) xv[i] = load(x + int64_t(i) * k + j);
    for (int n = 0; n < N; ++n) {
      if constexpr (FIRST) __builtin_prefetch(static_cast<const char*>(w) + (n * row_stride + j) * item + prefetch_ahead);
      const F wv = load_any(w, s, n * row_stride + j);
      for (int i = 0; i < R; ++i) t[n][i] += wv * xv[i];
    }
  }
  if (j < k) {
    for (int n = 0; n < N; ++n) {
      const F wv = load_some(w, s, n * row_stride + j, k - j);
      for (int i = 0; i < R; ++i) t[n][i] += wv * load_some(x, Storage::f32, int64_t(i) * k + j, k - j);
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int i = 0; i < R; ++i) c[int64_t(i) * ldc + n] = sum(t[n][i]);
  }
}

template <int N>
void dense_rows(const void* w, Storage s, int64_t row_stride, const float* x, int m, int k, float* c, int64_t ldc) {
#if defined(__AVX512F__)
  constexpr int most = 6;  // rows whose sums stay in registers
#else
  constexpr int most = 4;
#endif
  for (bool first = true; m > 0; first = false) {
    const int rows = m >= most && !first ? most : m >= 4 ? 4 : m >= 2 ? 2 : 1;
    if (rows > 4) dense_tile<N, most, false>(w, s, row_stride, x, k, c, ldc);
    else if (rows == 4 && !first) dense_tile<N, 4, false>(w, s, row_stride, x, k, c, ldc);
    else if (rows == 4) dense_tile<N, 4, true>(w, s, row_stride, x, k, c, ldc);
    else if (rows == 2) dense_tile<N, 2, true>(w, s, row_stride, x, k, c, ldc);
    else dense_tile<N, 1, true>(w, s, row_stride, x, k, c, ldc);
    x += int64_t(rows) * k;
    c += rows * ldc;
    m -= rows;
  }
}

void dense_kernel(const void* w, Storage s, int64_t row_stride, int count, const float* x, int m, int k, float* c, int64_t ldc) {
  const int64_t bytes = s == Storage::f32 ? 4 : 2;
  const char* at = static_cast<const char*>(w);
  if (count == 4) return dense_rows<4>(at, s, row_stride, x, m, k, c, ldc);
  for (int n = 0; n < count; ++n) dense_rows<1>(at + n * row_stride * bytes, s, row_stride, x, m, k, c + n, ldc);
}

// ---- attention -----------------------------------------------------------------------------------------------------

template <int R>
void scores_of(const AttentionTile& t, int from, int to) {
  for (int s = from; s < to; s += 4) {
    const int keys = to - s < 4 ? to - s : 4;
    F acc[R][4];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < 4; ++n) acc[r][n] = F{};
    }
    int j = 0;
    for (; j + 16 <= t.e; j += 16) {
      F qv[R];
      for (int r = 0; r < R; ++r) qv[r] = load(t.q[r] + j);
      for (int n = 0; n < keys; ++n) {
        const F kv = load_any(t.k, t.storage, (s + n) * t.k_stride + j);
        for (int r = 0; r < R; ++r) acc[r][n] += qv[r] * kv;
      }
    }
    if (j < t.e) {
      for (int n = 0; n < keys; ++n) {
        const F kv = load_some(t.k, t.storage, (s + n) * t.k_stride + j, t.e - j);
        for (int r = 0; r < R; ++r) acc[r][n] += load_some(t.q[r], Storage::f32, j, t.e - j) * kv;
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < keys; ++n) {
        const float total = sum(acc[r][n]);
        t.scores[r * t.score_stride + s + n] = t.softcap > 0.f ? tanhf(total / t.softcap) * t.softcap : total;
      }
    }
  }
}

/** Scores of a row to weights over [first, visible), zero elsewhere in [from, to). Returns 1 / sum. */
float softmax_row(float* s, int first, int visible, int from, int to) {
  float peak = -INFINITY;
  for (int j = first; j < visible; ++j) peak = s[j] > peak ? s[j] : peak;
  for (int j = from; j < first; ++j) s[j] = 0.f;
  for (int j = visible; j < to; ++j) s[j] = 0.f;
  F total = F{};
  int j = first;
  for (; j + 16 <= visible; j += 16) {
    const F e = vexp(load(s + j) - peak);
    store(s + j, e);
    total += e;
  }
  float rest = sum(total);
  for (; j < visible; ++j) {
    s[j] = exp_one(s[j] - peak);
    rest += s[j];
  }
  if (peak != peak) return NAN;
  return 1.f / rest;
}

template <int R>
void weighted_values(const AttentionTile& t, int from, int to, const float* inverse) {
  int j = 0;
  for (; j + 64 <= t.f; j += 64) {
    F acc[R][4];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < 4; ++n) acc[r][n] = F{};
    }
    for (int s = from; s < to; ++s) {
      F v[4];
      for (int n = 0; n < 4; ++n) v[n] = load_any(t.v, t.storage, s * t.v_stride + j + 16 * n);
      for (int r = 0; r < R; ++r) {
        const float p = t.scores[r * t.score_stride + s];
        for (int n = 0; n < 4; ++n) acc[r][n] += v[n] * p;
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < 4; ++n) store(t.out[r] + j + 16 * n, acc[r][n] * inverse[r]);
    }
  }
  for (; j + 16 <= t.f; j += 16) {
    F acc[R];
    for (int r = 0; r < R; ++r) acc[r] = F{};
    for (int s = from; s < to; ++s) {
      const F v = load_any(t.v, t.storage, s * t.v_stride + j);
      for (int r = 0; r < R; ++r) acc[r] += v * t.scores[r * t.score_stride + s];
    }
    for (int r = 0; r < R; ++r) store(t.out[r] + j, acc[r] * inverse[r]);
  }
  if (j < t.f) {
    F acc[R];
    for (int r = 0; r < R; ++r) acc[r] = F{};
    for (int s = from; s < to; ++s) {
      const F v = load_some(t.v, t.storage, s * t.v_stride + j, t.f - j);
      for (int r = 0; r < R; ++r) acc[r] += v * t.scores[r * t.score_stride + s];
    }
    for (int r = 0; r < R; ++r) {
      float o[16];
      store(o, acc[r] * inverse[r]);
      memcpy(t.out[r] + j, o, (t.f - j) * sizeof(float));
    }
  }
}

/** Rows are computed over their common range with zero weights outside their own, so a row's result does not depend on its neighbours:
 *  adding an exact zero changes nothing. */
template <int R>
void attention_rows(const AttentionTile& t) {
  int from = t.first[0], to = t.visible[0];
  for (int r = 1; r < R; ++r) {
    from = t.first[r] < from ? t.first[r] : from;
    to = t.visible[r] > to ? t.visible[r] : to;
  }
  scores_of<R>(t, from, to);
  float inverse[R];
  for (int r = 0; r < R; ++r) inverse[r] = softmax_row(t.scores + r * t.score_stride, t.first[r], t.visible[r], from, to);
  weighted_values<R>(t, from, to, inverse);
}

void attention_kernel(const AttentionTile& t) {
  if (t.rows == 4) attention_rows<4>(t);
  else if (t.rows == 3) attention_rows<3>(t);
  else if (t.rows == 2) attention_rows<2>(t);
  else attention_rows<1>(t);
}

#include "kernels/cpu/isa_attention.inl"
#include "kernels/cpu/isa_scan.inl"
#include "kernels/cpu/isa_delta.inl"

// ---- rows ----------------------------------------------------------------------------------------------------------

void load_kernel(const void* from, Storage s, float* to, int64_t count) {
  if (s == Storage::f32) {
    memcpy(to, from, count * 4);
    return;
  }
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, load_any(from, s, i));
  for (; i < count; ++i) to[i] = load_one(from, s, i);
}

void store_kernel(const float* from, Storage s, void* to, int64_t count) {
  if (s == Storage::f32) {
    memcpy(to, from, count * 4);
    return;
  }
  uint16_t* h = static_cast<uint16_t*>(to);
  int64_t i = 0;
#if defined(__F16C__)
  if (s == Storage::f16) {
    for (; i + 8 <= count; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < count; ++i) h[i] = s == Storage::f16 ? float_to_half(from[i]) : float_to_bf16(from[i]);
}

void rms_norm_kernel(const float* x, const float* weight, float eps, int dims, float* out) {
  F t = F{};
  int i = 0;
  for (; i + 16 <= dims; i += 16) t += load(x + i) * load(x + i);
  float total = sum(t);
  for (; i < dims; ++i) total += x[i] * x[i];
  const float r = 1.f / sqrtf(total / float(dims) + eps);
  for (i = 0; i < dims; ++i) out[i] = weight == nullptr ? x[i] * r : x[i] * r * weight[i];
}

void rope_kernel(float* x, int heads, int width, const float* cosines, const float* sines, int pairs, bool traditional, float scale) {
  for (int h = 0; h < heads; ++h, x += width) {
    if (traditional) {
      for (int i = 0; i < pairs; ++i) {
        const float a = x[2 * i] * scale, b = x[2 * i + 1] * scale;
        x[2 * i] = a * cosines[i] - b * sines[i];
        x[2 * i + 1] = b * cosines[i] + a * sines[i];
      }
      continue;
    }
    int i = 0;
    for (; i + 16 <= pairs; i += 16) {
      const F a = load(x + i) * scale, b = load(x + pairs + i) * scale, c = load(cosines + i), s = load(sines + i);
      store(x + i, a * c - b * s);
      store(x + pairs + i, b * c + a * s);
    }
    for (; i < pairs; ++i) {
      const float a = x[i] * scale, b = x[pairs + i] * scale;
      x[i] = a * cosines[i] - b * sines[i];
      x[pairs + i] = b * cosines[i] + a * sines[i];
    }
  }
}

void add_scaled_kernel(float* x, const float* y, float scale, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(x + i, load(x + i) + load(y + i) * scale);
  for (; i < count; ++i) x[i] += y[i] * scale;
}

template <class Act>
inline void gated(const float* gate, const float* up, float* out, int64_t count, Act act) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, up == nullptr ? act(load(gate + i)) : act(load(gate + i)) * load(up + i));
  if (i == count) return;
  float g[16] = {}, u[16] = {}, o[16];
  for (int64_t l = i; l < count; ++l) {
    g[l - i] = gate[l];
    u[l - i] = up == nullptr ? 1.f : up[l];
  }
  store(o, act(load(g)) * load(u));
  for (int64_t l = i; l < count; ++l) out[l] = o[l - i];
}

void silu_mul_kernel(const float* gate, const float* up, float* out, int64_t count) {
  gated(gate, up, out, count, [](F g) { return g / (vexp(-g) + 1.f); });
}

void sigmoid_mul_kernel(const float* gate, const float* x, float* out, int64_t count) {
  gated(gate, x, out, count, [](F g) { return 1.f / (vexp(-g) + 1.f); });
}

void multiply_kernel(const float* a, const float* b, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, load(a + i) * load(b + i));
  for (; i < count; ++i) out[i] = a[i] * b[i];
}

void gelu_tanh_mul_kernel(const float* gate, const float* up, float* out, int64_t count) {
  gated(gate, up, out, count, [](F g) {
    const F z = 0.7978845608f * (g + 0.044715f * g * g * g);
    return g / (vexp(-2.f * z) + 1.f);  // g * (1 + tanh z) / 2
  });
}

#include "kernels/cpu/isa_sampling.inl"

}  // namespace

const Isa& MLXLM_ISA_FUNCTION() {
  static constexpr Isa table = {MLXLM_ISA_NAME,   has_digits,           panel_kernel,    make_digits_kernel, group_sums_kernel, dense_kernel,
                                attention_kernel, attention_block_kernel, queries_to_lanes_kernel, merge_rows_kernel, rope_kernel, add_scaled_kernel, dequantize_kernel, load_kernel,
                                store_kernel,     rms_norm_kernel,  silu_mul_kernel, sigmoid_mul_kernel, multiply_kernel, gelu_tanh_mul_kernel,
                                row_max_kernel,   exps_kernel,      scan_kernel,     delta_kernel,    convolve_kernel};
  return table;
}

}  // namespace mlxlm::kernels::cpu
