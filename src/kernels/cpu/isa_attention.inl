// Attention over one block of keys: part of isa.inl.

/** Element i of the result is the sum of v[i]; lanes are added in one fixed order, whatever i. */
inline F sums16(const F* v) {
  F t[8], u[4];
  for (int i = 0; i < 8; ++i) {
    const F a = v[i], b = v[i + 8];
    t[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const F a = t[i], b = t[i + 4];
    u[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  F w[2];
  for (int i = 0; i < 2; ++i) {
    const F a = u[i], b = u[i + 2];
    w[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  return __builtin_shufflevector(w[0], w[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(w[0], w[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/** Rows of keys or values: floats in scratch memory, or as the cache stores them. */
struct BlockRows {
  const void* data;
  int64_t stride;  // elements
};

/** The block after this one lies behind it: what is read from the cache itself is fetched while this one is worked on. */
template <Storage S>
inline void prefetch_next_block(const void* p, int64_t element) {
  if constexpr (S != Storage::f32) __builtin_prefetch(static_cast<const uint8_t*>(p) + 2 * element + 8192);
}

/** scores[r][0..64) = q[r] . k[j] for R rows (1 to 4) and keys [0, keys), rounded up to 16. `dims` is a multiple of 16. */
template <Storage S, int R>
void block_scores(const float* const* q, BlockRows k, int keys, int dims, float* const* scores) {
  constexpr int per = R == 3 ? 4 : 16 / R;
  for (int j = 0; j < keys; j += per) {
    F acc[16];
    int64_t at[per];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = F{};
    // Beyond the last key its own row again: what comes of it is masked.
    for (int n = 0; n < per; ++n) at[n] = (j + n < keys ? j + n : keys - 1) * k.stride;
    for (int d = 0; d < dims; d += 16) {
      F qv[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) qv[r] = load(q[r] + d);
#pragma GCC unroll 16
      for (int n = 0; n < per; ++n) {
        const F kv = load_any(k.data, S, at[n] + d);
        if (d % 32 == 0) prefetch_next_block<S>(k.data, at[n] + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r * per + n] += qv[r] * kv;
      }
    }
    const F s = sums16(acc);
    for (int r = 0; r < R; ++r) memcpy(scores[r] + j, reinterpret_cast<const char*>(&s) + r * per * 4, per * 4);
  }
}

/** out[r][0..dims) += sum_j p[r][j * STEP] * v[j], key by key. */
template <Storage S, int R, int STEP>
void add_values(const float* const* p, BlockRows v, int keys, int dims, float* const* out) {
  int d = 0;
  for (; d + 64 <= dims; d += 64) {
    F acc[R][4];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < 4; ++n) acc[r][n] = load(out[r] + d + 16 * n);
    }
    for (int j = 0; j < keys; ++j) {
      const int64_t at = j * v.stride + d;
      prefetch_next_block<S>(v.data, at);
      prefetch_next_block<S>(v.data, at + 32);
      const F v0 = load_any(v.data, S, at), v1 = load_any(v.data, S, at + 16), v2 = load_any(v.data, S, at + 32), v3 = load_any(v.data, S, at + 48);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const float w = p[r][j * STEP];
        acc[r][0] += v0 * w;
        acc[r][1] += v1 * w;
        acc[r][2] += v2 * w;
        acc[r][3] += v3 * w;
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < 4; ++n) store(out[r] + d + 16 * n, acc[r][n]);
    }
  }
  for (; d < dims; d += 16) {
    F acc[R];
    for (int r = 0; r < R; ++r) acc[r] = load(out[r] + d);
    for (int j = 0; j < keys; ++j) {
      const F row = load_any(v.data, S, j * v.stride + d);
      for (int r = 0; r < R; ++r) acc[r] += row * p[r][j * STEP];
    }
    for (int r = 0; r < R; ++r) store(out[r] + d, acc[r]);
  }
}

inline F lane_numbers(int from) {
  return F{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + float(from);
}

inline F with_softcap(F x, float softcap) {
  return softcap * (1.f - 2.f / (vexp(x * (2.f / softcap)) + 1.f));
}

/** What was weighed against `old` is worth so much against `now`. */
inline F worth(F old, F now) { return select(old == now, set(1.f), vexp(old - now)); }

/** By itself, so that no compiler joins this product with the sums that follow. */
__attribute__((noinline)) void rescale(float* out, float by, int dims) {
  for (int d = 0; d < dims; d += 16) store(out + d, load(out + d) * by);
}

/** Scores of a row to e^(score - peak), 0 for keys outside [first, last); the row's peak, total and out so far become those against the
 * new peak. `keys` is a multiple of 16. */
void row_weights(float* s, int keys, int first, int last, float softcap, float* peak, float* total, float* out, int dims) {
  const F none = set(-INFINITY);
  F best = none;
  if (first <= 0 && last >= keys && softcap <= 0.f) {  // no key is masked: the same without the masks
    for (int j = 0; j < keys; j += 16) best = vmax(load(s + j), best);
  } else {
    for (int j = 0; j < keys; j += 16) {
      F x = load(s + j);
      if (softcap > 0.f) x = with_softcap(x, softcap);
      const F at = lane_numbers(j);
      x = select((at >= float(first)) & (at < float(last)), x, none);
      store(s + j, x);
      best = vmax(x, best);
    }
  }
  const float block_peak = max_lane(best), now = block_peak > *peak ? block_peak : *peak, from = now == -INFINITY ? 0.f : now;
  F t = F{};
  for (int j = 0; j < keys; j += 16) {
    const F e = vexp_weight(load(s + j) - from);
    store(s + j, e);
    t += e;
  }
  F by = set(1.f);
  if (now != *peak) {
    by = worth(set(*peak), set(now));
    rescale(out, by[0], dims);
    *peak = now;
  }
  *total = (set(*total) * by + sum(t))[0];
}

template <Storage S, int R>
void block_rows(const BlockAttention& b, int r0) {
  const float* q[R];
  float *s[R], *out[R];
  for (int r = 0; r < R; ++r) {
    q[r] = b.q + int64_t(r0 + r) * b.key_dims;
    s[r] = b.scores + r * attention_block;
    out[r] = b.out + int64_t(r0 + r) * b.value_dims;
  }
  block_scores<S, R>(q, {b.k, b.key_dims}, b.keys, b.key_dims, s);
  const int whole = (b.keys + 15) / 16 * 16;
  for (int r = 0; r < R; ++r) {
    const int row = r0 + r;
    row_weights(s[r], whole, b.first[row], b.last[row], b.softcap, b.peaks + row, b.totals + row, out[r], b.value_dims);
  }
  add_values<S, R, 1>(const_cast<const float* const*>(s), {b.v, b.value_dims}, b.keys, b.value_dims, out);
}

template <Storage S>
void block_of(const BlockAttention& b) {
  int r = 0;
  for (; r + 4 <= b.rows; r += 4) block_rows<S, 4>(b, r);
  if (b.rows - r == 3) return block_rows<S, 3>(b, r);
  if (b.rows - r == 2) return block_rows<S, 2>(b, r);
  if (b.rows - r == 1) return block_rows<S, 1>(b, r);
}

#include "kernels/cpu/isa_attention_lanes.inl"

void attention_block_kernel(const BlockAttention& b) {
  if (b.q_lanes != nullptr) return block_in_lanes(b);
  if (b.storage == Storage::f32) return block_of<Storage::f32>(b);
  if (b.storage == Storage::f16) return block_of<Storage::f16>(b);
  block_of<Storage::bf16>(b);
}

void merge_rows_kernel(float* peak, float* total, float* out, float new_peak, float new_total, const float* more, int dims) {
  if (new_peak == -INFINITY && new_total == 0.f) return;
  if (*peak == -INFINITY && *total == 0.f) {
    *peak = new_peak;
    *total = new_total;
    memcpy(out, more, dims * 4);
    return;
  }
  const float high = *peak > new_peak ? *peak : new_peak;
  const float a = exp_one(*peak - high), b = exp_one(new_peak - high);
  *peak = high;
  *total = *total * a + new_total * b;
  for (int d = 0; d < dims; d += 16) store(out + d, load(out + d) * a + load(more + d) * b);
}

/** 16 codes of BITS bits, the first at p. */
template <int BITS>
inline F codes16(const uint8_t* p) {
  U v;
  if constexpr (BITS == 8) {
#if defined(__AVX512F__)
    v = (U)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i halves[2] = {_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))};
    memcpy(&v, halves, 64);
#else
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    Bytes b;
    memcpy(&b, p, 16);
    v = __builtin_convertvector(b, U);
#endif
  } else if constexpr (BITS == 4) {
    uint32_t w[2];
    memcpy(w, p, 8);
    const U words = {w[0], w[0], w[0], w[0], w[0], w[0], w[0], w[0], w[1], w[1], w[1], w[1], w[1], w[1], w[1], w[1]};
    v = (words >> U{0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28}) & 15u;
  } else if constexpr (BITS == 2) {
    uint32_t w;
    memcpy(&w, p, 4);
    v = ((U{} + w) >> U{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) & 3u;
  } else {
    uint8_t t[2 * BITS + 1];  // a code lies within two bytes; the last one must not read past the row
    memcpy(t, p, 2 * BITS);
    t[2 * BITS] = 0;
#pragma GCC unroll 16
    for (int l = 0; l < 16; ++l) {
      const int at = l * BITS;
      v[l] = ((uint32_t(t[at / 8]) | uint32_t(t[at / 8 + 1]) << 8) >> (at % 8)) & ((1u << BITS) - 1u);
    }
  }
  return __builtin_convertvector((I)v, F);
}

template <int BITS>
void dequantize_rows(const QuantizedSpan& s, int rows, float* to, int64_t to_stride) {
  for (int r = 0; r < rows; ++r, to += to_stride) {
    const uint8_t* p = s.packed + r * s.packed_stride;
    for (int g = 0; g < s.dims / s.group; ++g) {
      const float scale = load_one(s.scales, s.storage, r * s.scale_stride + g), bias = load_one(s.biases, s.storage, r * s.scale_stride + g);
      for (int d = 0; d < s.group; d += 16, p += 2 * BITS) store(to + g * s.group + d, codes16<BITS>(p) * scale + bias);
    }
  }
}

void dequantize_kernel(const QuantizedSpan& s, int rows, float* to, int64_t to_stride) {
  switch (s.bits) {
    case 2: return dequantize_rows<2>(s, rows, to, to_stride);
    case 3: return dequantize_rows<3>(s, rows, to, to_stride);
    case 4: return dequantize_rows<4>(s, rows, to, to_stride);
    case 5: return dequantize_rows<5>(s, rows, to, to_stride);
    case 6: return dequantize_rows<6>(s, rows, to, to_stride);
    default: return dequantize_rows<8>(s, rows, to, to_stride);
  }
}
