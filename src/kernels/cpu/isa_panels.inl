// The inner loops over quantized panels (their layout: isa.h). Part of isa.inl: vectors of 16 floats, and digits in pieces as wide as the
// machine's registers.

/** How codes are stored, as a template argument. */
enum Format { u2 = 2, u3 = 3, u4 = 4, u5 = 5, u6 = 6, u8 = 8, fp4, fp8 };

constexpr int bits_of(Format f) {
  return f == fp4 ? 4 : f == fp8 ? 8 : int(f);
}

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

/** 16 e4m3 bytes as floats, divided by 256: what they are as float16 with shifted bits. */
inline F load_fp8(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (F)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xBFFF))));
#elif defined(__F16C__) && defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xBFFF)));
  const __m256 a = _mm256_cvtph_ps(_mm256_castsi256_si128(half)), b = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  F v;
  memcpy(&v, &a, 32);
  memcpy(reinterpret_cast<char*>(&v) + 32, &b, 32);
  return v;
#else
  Bytes16 raw;
  memcpy(&raw, p, 16);
  const U x = __builtin_convertvector(raw, U);
  return (F)((x & 0x7Fu) << 20 | (x & 0x80u) << 24) * 0x1p112f;
#endif
}

inline F panel_scale(const uint8_t* p, Storage s, int which) {
  if (s == Storage::e8m0) {
#if defined(__AVX512F__)
    const U x = (U)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * which)));
#elif !defined(__AVX2__)
    Bytes16 raw;
    memcpy(&raw, p + 16 * which, 16);
    const U x = __builtin_convertvector(raw, U);
#else  // GCC would take the bytes one by one
    const __m256i halves[2] = {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 16 * which))),
                               _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 16 * which + 8)))};
    U x;
    memcpy(&x, halves, 64);
#endif
    const U bits = x << 23;
    return select((I)(x == 0u), (F)(U{} + 0x400000u), (F)bits);
  }
  if (s == Storage::e4m3) return load_fp8(p + 16 * which) * 256.f;
  return load_any(p, s, 16 * which);
}

/** panel_scale where SIZE (panel_digits) says that scales are short. */
template <Format C, int SIZE>
inline F group_scale(const uint8_t* p, Storage s, int which) {
  if constexpr (SIZE == 0)
    return panel_scale(p, s, which);
  else if constexpr (C == fp4)
    return panel_scale(p, SIZE == 32 ? Storage::e8m0 : Storage::e4m3, which);
  else
    return panel_scale(p, s == Storage::bf16 ? Storage::bf16 : Storage::f16, which);
}

constexpr int64_t prefetch_ahead = 4096;  // bytes; docs/performance.md

inline void prefetch_group(const uint8_t* p, int64_t bytes) {
  for (int64_t z = 0; z < bytes; z += 64) __builtin_prefetch(p + prefetch_ahead + z);
}

inline U load_words(const uint8_t* p) {
  U w;
  memcpy(&w, p, 64);
  return w;
}

/** The vectors that hold codes [8 * d, + 8) of a group. */
struct Words {
  U base, plane;
};

template <Format C>
inline Words words_at(const uint8_t* group, int d) {
  const uint8_t* block = group + (d / 4) * (64 * bits_of(C));
  const int e = d % 4;
  if constexpr (C == u2 || C == u3) {
    const U base = load_words(block + e / 2 * 64) >> (4 * (e % 2));
    if constexpr (C == u3) return {base, load_words(block + 128) >> (2 * e)};
    return {base, base};
  } else if constexpr (C == u5) {
    return {load_words(block + e * 64), load_words(block + 256) >> (2 * e)};
  } else if constexpr (C == u6) {
    return {load_words(block + e * 64), load_words(block + 256 + e / 2 * 64) >> (4 * (e % 2))};
  } else {
    return {load_words(group + d * 64), U{}};
  }
}

/** Code 8 * d + j (fp4: twice its value). */
template <Format C>
inline F code_float(const Words& w, int j) {
  const int byte = 8 * (j / 2), odd = j % 2;
  if constexpr (C == fp4) {
    const U n = w.base >> (4 * j);
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0.f, 1.f, 2.f, 3.f, 4.f, 6.f, 8.f, 12.f, -0.f, -1.f, -2.f, -3.f, -4.f, -6.f, -8.f, -12.f);
    return (F)_mm512_permutexvar_ps((__m512i)n, table);
#else
    const U size = ((U{} + 0xC8643210u) >> ((n & 7u) << 2)) & 15u;
    return (F)((U) __builtin_convertvector((I)size, F) | (n & 8u) << 28);
#endif
  } else {
    U code;
    if constexpr (C == u4)
      code = (w.base >> (4 * j)) & 15u;
    else if constexpr (C == u5)
      code = ((w.base >> (4 * j)) & 15u) | ((w.plane >> (byte + odd)) & 1u) << 4;
    else if constexpr (C == u6)
      code = ((w.base >> (4 * j)) & 15u) | ((w.plane >> (byte + 2 * odd)) & 3u) << 4;
    else if constexpr (C == u3)
      code = ((w.base >> (byte + 2 * odd)) & 3u) | ((w.plane >> (byte + odd)) & 1u) << 2;
    else if constexpr (C == u2)
      code = (w.base >> (byte + 2 * odd)) & 3u;
    else
      code = (w.base >> (8 * j)) & 255u;
    return __builtin_convertvector((I)code, F);
  }
}

/** Exact: f32 activations, R rows at once. */
template <Format C, int R>
void panel_exact(const Panels& p, const uint8_t* panel, const Activations& a, int m0, float* c, int64_t ldc) {
  constexpr int per = C == fp8 ? 1 : C == u8 ? 4 : 8;
  const int steps = p.group / per, groups = p.k / p.group;
  const int64_t group_bytes = p.group_bytes(), code_bytes = p.code_bytes();
  F total[R];
  for (int i = 0; i < R; ++i) total[i] = F{};
  for (int g = 0; g < groups; ++g, panel += group_bytes) {
    prefetch_group(panel, group_bytes);
    F t[R];
    for (int i = 0; i < R; ++i) t[i] = F{};
    const float* x = a.x + int64_t(m0) * a.k + g * p.group;
    if constexpr (C == fp8) {
#pragma GCC unroll 4
      for (int d = 0; d < steps; ++d) {
        const F code = load_fp8(panel + d * 16);
        for (int i = 0; i < R; ++i) t[i] += code * x[int64_t(i) * a.k + d];
      }
    } else {
      for (int d = 0; d < steps; ++d) {
        const Words w = words_at<C>(panel, d);
#pragma GCC unroll 8
        for (int j = 0; j < per; ++j) {
          const F code = code_float<C>(w, j);
          for (int i = 0; i < R; ++i) t[i] += code * x[int64_t(i) * a.k + d * per + j];
        }
      }
    }
    const F scale = panel_scale(panel + code_bytes, p.scales, 0);
    if constexpr (C == fp4 || C == fp8) {
      for (int i = 0; i < R; ++i) total[i] += (t[i] * (C == fp4 ? 0.5f : 256.f)) * scale;
    } else {
      const F bias = panel_scale(panel + code_bytes, p.scales, 1);
      for (int i = 0; i < R; ++i) {
        total[i] += t[i] * scale;
        total[i] += bias * a.sums[int64_t(m0 + i) * a.groups + g];
      }
    }
  }
  for (int i = 0; i < R; ++i) store(c + int64_t(i) * ldc, total[i]);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
/** As panel_exact in halves: GCC keeps vectors of 64 bytes in memory here, and copies them in parts. */
template <int R>
void panel_fp8_halves(const Panels& p, const uint8_t* panel, const Activations& a, int m0, float* c, int64_t ldc) {
  const int64_t group_bytes = p.group_bytes(), code_bytes = p.code_bytes();
  __m256 total[2][R];
  for (int i = 0; i < R; ++i) total[0][i] = total[1][i] = _mm256_setzero_ps();
  for (int g = 0; g < p.k / p.group; ++g, panel += group_bytes) {
    prefetch_group(panel, group_bytes);
    __m256 t[2][R];
    for (int i = 0; i < R; ++i) t[0][i] = t[1][i] = _mm256_setzero_ps();
    const float* x = a.x + int64_t(m0) * a.k + g * p.group;
    for (int d = 0; d < p.group; ++d) {
      const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + d * 16)));
      const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xBFFF)));
      const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(half)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const __m256 xi = _mm256_set1_ps(x[int64_t(i) * a.k + d]);
        t[0][i] = _mm256_fmadd_ps(low, xi, t[0][i]);
        t[1][i] = _mm256_fmadd_ps(high, xi, t[1][i]);
      }
    }
    float scales[16];
    store(scales, panel_scale(panel + code_bytes, p.scales, 0));
    for (int h = 0; h < 2; ++h) {
      const __m256 scale = _mm256_loadu_ps(scales + 8 * h);
      for (int i = 0; i < R; ++i) total[h][i] = _mm256_fmadd_ps(_mm256_mul_ps(t[h][i], _mm256_set1_ps(256.f)), scale, total[h][i]);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(c + int64_t(i) * ldc + 8 * h, total[h][i]);
  }
}
#endif

// ---- digits --------------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__) || defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#define MLXLM_DIGITS 1
#if defined(__AVX512VNNI__)
constexpr int piece_bytes = 64;
#elif defined(__AVX2__)
constexpr int piece_bytes = 32;
#else
constexpr int piece_bytes = 16;
#endif
constexpr int pieces = 64 / piece_bytes, piece_rows = 16 / pieces;
typedef uint16_t H __attribute__((vector_size(piece_bytes)));  // codes: bytes, shifted in pairs
typedef int32_t D __attribute__((vector_size(piece_bytes)));
typedef float P __attribute__((vector_size(piece_bytes)));

inline H load_codes(const uint8_t* p) {
  H v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline P load_piece(const float* p) {
  P v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline int32_t four_digits(const int8_t* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return v;
}

/** acc + the dot product of 4 unsigned codes of each row with 4 digits. WIDE: codes above 127. */
template <bool WIDE>
inline D dot(D acc, H codes, int32_t digits) {
#if defined(__AVX512VNNI__)
  return (D)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(digits));
#elif defined(__AVX2__)
  const __m256i x = _mm256_set1_epi32(digits), ones = _mm256_set1_epi16(1);
  if constexpr (!WIDE) return acc + (D)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, x), ones);
  // Sums of two products of 8 bits do not fit 16: nibble by nibble.
  const __m256i low = _mm256_maddubs_epi16((__m256i)(codes & 0x0F0F), x), high = _mm256_maddubs_epi16((__m256i)((codes >> 4) & 0x0F0F), x);
  return acc + (D)_mm256_madd_epi16(low, ones) + (D)_mm256_madd_epi16(high, _mm256_set1_epi16(16));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (D)vusdotq_s32((int32x4_t)acc, (uint8x16_t)codes, vreinterpretq_s8_s32(vdupq_n_s32(digits)));
#else
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(digits));
  if constexpr (!WIDE) return (D)vdotq_s32((int32x4_t)acc, (int8x16_t)codes, x);
  const int32x4_t high = vdotq_s32(vdupq_n_s32(0), (int8x16_t)((codes >> 4) & 0x0F0F), x);
  return (D)vaddq_s32(vdotq_s32((int32x4_t)acc, (int8x16_t)(codes & 0x0F0F), x), vshlq_n_s32(high, 4));
#endif
}

/** The high nibble of each byte. */
inline H high_nibbles(H w) {
#if defined(__AVX512VNNI__) && defined(__GFNI__)
  return (H)_mm512_gf2p8affine_epi64_epi8((__m512i)w, _mm512_set1_epi64(0x1020408000000000), 0);  // one instruction for a shift and a mask
#else
  return (w >> 4) & 0x0F0F;
#endif
}

/** Twice the value of each e2m1 nibble, plus 12. */
inline H fp4_codes(H nibbles) {
#if defined(__AVX512VNNI__)
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  return (H)_mm512_shuffle_epi8(table, (__m512i)nibbles);
#elif defined(__AVX2__)
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  return (H)_mm256_shuffle_epi8(table, (__m256i)nibbles);
#else
  static const uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  return (H)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)nibbles);
#endif
}

/** Codes [8 * d, + 8) of a group as bytes: those at even and at odd places (8 bits: the first four and the others). `group` points at the
 * piece. */
template <Format C>
inline void codes_at(const uint8_t* group, int d, H& even, H& odd) {
  const uint8_t* block = group + (d / 4) * (64 * bits_of(C));
  const int e = d % 4;
  if constexpr (C == u8) {
    even = load_codes(group + d * 128);
    odd = load_codes(group + d * 128 + 64);
  } else if constexpr (C == u2 || C == u3) {
    const H w = load_codes(block + e / 2 * 64) >> (4 * (e % 2));
    even = w & 0x0303;
    odd = (w >> 2) & 0x0303;
    if constexpr (C == u3) {
      const H plane = load_codes(block + 128) >> (2 * e);
      even |= (plane << 2) & 0x0404;
      odd |= (plane << 1) & 0x0404;
    }
  } else {
    const H w = load_codes(C == u4 || C == fp4 ? group + d * 64 : block + e * 64);
    even = w & 0x0F0F;
    odd = high_nibbles(w);
    if constexpr (C == u5) {
      const H plane = load_codes(block + 256) >> (2 * e);
      even |= (plane << 4) & 0x1010;
      odd |= (plane << 3) & 0x1010;
    } else if constexpr (C == u6) {
      const H plane = load_codes(block + 256 + e / 2 * 64) >> (4 * (e % 2));
      even |= (plane << 4) & 0x3030;
      odd |= (plane << 2) & 0x3030;
    } else if constexpr (C == fp4) {
      even = fp4_codes(even);
      odd = fp4_codes(odd);
    }
  }
}

/** R rows that lie `stride` elements apart: every fourth has a pointer, the others are one, two or three strides from it, so that all of
 * them fit the registers. */
template <class T, int R>
class RowPointers {
 public:
  RowPointers(const T* first, int64_t stride) : stride_(stride), three_(3 * stride) {
    for (int i = 0; i < fours; ++i) base_[i] = first + 4 * i * stride;
  }
  /** To the same rows, so many elements further. */
  void advance(int64_t by) {
#pragma GCC unroll 4
    for (int i = 0; i < fours; ++i) {
      base_[i] += by;
      __asm__("" : "+r"(base_[i]));  // else the compiler keeps all R of them, in memory
    }
  }
  const T* operator[](int i) const { return base_[i / 4] + (i % 4 == 3 ? three_ : i % 4 * stride_); }

 private:
  static constexpr int fours = (R + 3) / 4;
  const T* base_[fours];
  int64_t stride_, three_;
};

/** Integer sums of one group: codes times high and low digits of R rows. A row alone has two sums of each, of even and of odd codes, so
 * that no product waits for the one before. */
template <Format C, int R, int DIGITS>
inline void group_dots(const uint8_t* group, int size, const RowPointers<int8_t, R>& x_high, const RowPointers<int8_t, R>& x_low, D* high,
                       D* low) {
  constexpr bool bytes = C == u8;
  D more_high = D{}, more_low = D{};
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) high[i] = low[i] = D{};
#pragma GCC unroll 16
  for (int d = 0; d < size / 8; ++d) {
    H even, odd;
    codes_at<C>(group, d, even, odd);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      high[i] = dot<bytes>(high[i], even, four_digits(x_high[i] + d * 8));
      if constexpr (DIGITS == 2) low[i] = dot<bytes>(low[i], even, four_digits(x_low[i] + d * 8));
      D &second_high = R == 1 ? more_high : high[i], &second_low = R == 1 ? more_low : low[i];
      second_high = dot<bytes>(second_high, odd, four_digits(x_high[i] + d * 8 + 4));
      if constexpr (DIGITS == 2) second_low = dot<bytes>(second_low, odd, four_digits(x_low[i] + d * 8 + 4));
    }
  }
  if constexpr (R == 1) {
    high[0] += more_high;
    low[0] += more_low;
  }
}

/** As group_dots, high << 7 plus low in one sum each: two passes over the codes, and registers for more rows. */
template <Format C, int R>
inline void group_dots_joined(const uint8_t* group, int size, const RowPointers<int8_t, R>& x_high, const RowPointers<int8_t, R>& x_low,
                              D* sums) {
  constexpr bool bytes = C == u8;
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) sums[i] = D{};
#pragma GCC unroll 2
  for (int low = 0; low < 2; ++low) {
    const auto& x = low == 0 ? x_high : x_low;
#pragma GCC unroll 16
    for (int d = 0; d < size / 8; ++d) {
      H even, odd;
      codes_at<C>(group, d, even, odd);
      if constexpr (!bytes) __asm__("" : "+v"(even), "+v"(odd));  // else they are kept for the second pass, in memory
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        sums[i] = dot<bytes>(sums[i], even, four_digits(x[i] + d * 8));
        sums[i] = dot<bytes>(sums[i], odd, four_digits(x[i] + d * 8 + 4));
      }
    }
    if (low == 0) {
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) sums[i] <<= 7;
    }
  }
}

/** A group's sum of codes times digits, in the units of the result. FOURS: codes of e2m1 (fp4_codes), digit_sum without the step. */
template <bool FOURS>
inline void add_group(P& total, D sum, P scale, P bias, float step, float digit_sum) {
  const P value = __builtin_convertvector(sum, P);
  if constexpr (FOURS) {  // sum and 12 * digits are whole and below 2^24: their difference is exact
    total += ((value - 12.f * digit_sum) * (0.5f * step)) * scale;
  } else {
    total += value * (scale * step);
    total += bias * digit_sum;
  }
}

/** Activations as integers a group: two digits (relative error about 4e-5, nearly as fast as one where memory is the limit) or one (5e-3).
 *  SIZE: of a group, with scales of 16 bits (e2m1: of 8), or 0 = whatever the panels say. */
template <Format C, int R, int DIGITS, int SIZE>
void panel_digits(const Panels& p, const uint8_t* panel, const Activations& a, int m0, float* c, int64_t ldc) {
  const int groups = p.k / p.group, size = SIZE > 0 ? SIZE : p.group;
  const int64_t code_bytes = SIZE > 0 ? SIZE * bits_of(C) * 2 : p.code_bytes(),
                group_bytes = SIZE > 0 ? code_bytes + (C == fp4 ? 16 : 64) : p.group_bytes(), row = DIGITS * int64_t(a.k);
  const Storage storage = p.scales;
  P total[pieces][R];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
    for (int q = 0; q < pieces; ++q) total[q][i] = P{};
  }
  RowPointers<int8_t, R> x_high(a.digits + int64_t(m0) * row, row), x_low(a.digits + int64_t(m0) * row + a.k, row);
  RowPointers<float, R> steps(a.steps + int64_t(m0) * a.groups, a.groups), digit_sums(a.digit_sums + int64_t(m0) * a.groups, a.groups);
  for (int g = 0; g < groups; ++g, panel += group_bytes) {
    prefetch_group(panel, group_bytes);
    const F scales = group_scale<C, SIZE>(panel + code_bytes, storage, 0),
            biases = C == fp4 ? F{} : group_scale<C, SIZE>(panel + code_bytes, storage, 1);
    float scale_of[16], bias_of[16];
    if constexpr (pieces > 1) {
      store(scale_of, scales);
      store(bias_of, biases);
    }
    for (int q = 0; q < pieces; ++q) {
      D high[R], low[R];
      if constexpr (R > 8 && DIGITS == 2) {
        group_dots_joined<C, R>(panel + q * piece_bytes, size, x_high, x_low, high);
      } else {
        group_dots<C, R, DIGITS>(panel + q * piece_bytes, size, x_high, x_low, high, low);
        if constexpr (DIGITS == 2) {
#pragma GCC unroll 12
          for (int i = 0; i < R; ++i) high[i] = (high[i] << 7) + low[i];
        }
      }
      P scale, bias;
      if constexpr (pieces == 1) {
        scale = (P)scales;
        bias = (P)biases;
      } else {
        scale = load_piece(scale_of + q * piece_rows);
        bias = load_piece(bias_of + q * piece_rows);
      }
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        add_group<C == fp4>(total[q][i], high[i], scale, bias, *steps[i], *digit_sums[i]);
      }
    }
    x_high.advance(size);
    if (DIGITS == 2) x_low.advance(size);
    steps.advance(1);
    digit_sums.advance(1);
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
    for (int q = 0; q < pieces; ++q) memcpy(c + int64_t(i) * ldc + q * piece_rows, &total[q][i], sizeof(P));
  }
}

/** Groups of the usual sizes and scales have kernels of their own: the compiler then knows all distances, and what is read. */
template <Format C, int R, int DIGITS>
void panel_digits_of(const Panels& p, const uint8_t* panel, const Activations& a, int m0, float* c, int64_t ldc) {
  if constexpr (C == fp4) {
    if (p.group == 32 && p.scales == Storage::e8m0) return panel_digits<C, R, DIGITS, 32>(p, panel, a, m0, c, ldc);
    if (p.group == 16 && p.scales == Storage::e4m3) return panel_digits<C, R, DIGITS, 16>(p, panel, a, m0, c, ldc);
  } else if (p.scales == Storage::f16 || p.scales == Storage::bf16) {
    if (p.group == 32) return panel_digits<C, R, DIGITS, 32>(p, panel, a, m0, c, ldc);
    if (p.group == 64) return panel_digits<C, R, DIGITS, 64>(p, panel, a, m0, c, ldc);
  }
  panel_digits<C, R, DIGITS, 0>(p, panel, a, m0, c, ldc);
}
#endif

template <Format C, int R>
inline void panel_rows(const Panels& p, const uint8_t* panel, const Activations& a, int m0, float* c, int64_t ldc) {
#if defined(MLXLM_DIGITS)
  if constexpr (C != fp8) {
    if (a.digits != nullptr && a.digit_count == 1) return panel_digits_of<C, R, 1>(p, panel, a, m0, c, ldc);
    if (a.digits != nullptr) return panel_digits_of<C, R, 2>(p, panel, a, m0, c, ldc);
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (C == fp8) return panel_fp8_halves<R>(p, panel, a, m0, c, ldc);
#endif
  panel_exact<C, R>(p, panel, a, m0, c, ldc);
}

template <Format C>
void panel_format(const Panels& p, const uint8_t* panel, const Activations& a, int m0, int count, float* c, int64_t ldc) {
  while (count > 0) {
#if defined(__AVX512VNNI__)
    if constexpr (C != fp8) {
      if (count >= 12 && a.digits != nullptr) {
        if (a.digit_count == 1)
          panel_digits_of<C, 12, 1>(p, panel, a, m0, c, ldc);
        else
          panel_digits_of<C, 12, 2>(p, panel, a, m0, c, ldc);
        m0 += 12;
        count -= 12;
        c += 12 * ldc;
        continue;
      }
    }
#endif
#if defined(__AVX512F__)
    const int most = 8;
#else
    const int most = a.digits != nullptr || C == fp8 ? 4 : 8;  // sums of more rows than that do not stay in registers
#endif
    const int rows = count >= most ? most : count >= 4 ? 4 : count >= 2 ? 2 : 1;
    if (rows == 8)
      panel_rows<C, 8>(p, panel, a, m0, c, ldc);
    else if (rows == 4)
      panel_rows<C, 4>(p, panel, a, m0, c, ldc);
    else if (rows == 2)
      panel_rows<C, 2>(p, panel, a, m0, c, ldc);
    else
      panel_rows<C, 1>(p, panel, a, m0, c, ldc);
    m0 += rows;
    count -= rows;
    c += rows * ldc;
  }
}

void panel_kernel(const Panels& p, const uint8_t* panel, const Activations& a, int m0, int count, float* c, int64_t ldc) {
  if (p.codes == Codes::e2m1) return panel_format<fp4>(p, panel, a, m0, count, c, ldc);
  if (p.codes == Codes::e4m3) return panel_format<fp8>(p, panel, a, m0, count, c, ldc);
  switch (p.bits) {
    case 2:
      return panel_format<u2>(p, panel, a, m0, count, c, ldc);
    case 3:
      return panel_format<u3>(p, panel, a, m0, count, c, ldc);
    case 4:
      return panel_format<u4>(p, panel, a, m0, count, c, ldc);
    case 5:
      return panel_format<u5>(p, panel, a, m0, count, c, ldc);
    case 6:
      return panel_format<u6>(p, panel, a, m0, count, c, ldc);
    default:
      return panel_format<u8>(p, panel, a, m0, count, c, ldc);
  }
}

#if defined(MLXLM_DIGITS)
constexpr bool has_digits = true;
#else
constexpr bool has_digits = false;
#endif

#if defined(__AVX512VNNI__)
void make_digits_kernel(const float* x, int k, int group, DigitForm form, int count, int8_t* digits, float* steps, float* sums) {
  const float most = count == 2 ? 16256.f : 127.f;  // 127 * 128
  const int shift = count == 2 ? 7 : 0, half = count == 2 ? 64 : 0;
  // Codes below 8 bits: even elements of 8 stand in low nibbles, odd ones in high nibbles.
  const __m128i even_odd = _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
  for (int g = 0; g < k / group; ++g) {
    const float* xg = x + g * group;
    __m512 peaks = _mm512_setzero_ps();
    __mmask16 strange = 0;
    for (int i = 0; i < group; i += 16) {
      const __m512 v = _mm512_abs_ps(_mm512_loadu_ps(xg + i));
      peaks = _mm512_max_ps(peaks, v);
      strange = static_cast<__mmask16>(strange | _mm512_cmp_ps_mask(v, _mm512_set1_ps(3.4e38f), _CMP_NLE_UQ));
    }
    const float peak = _mm512_reduce_max_ps(peaks), step = peak / most;
    if (strange != 0) {  // a NaN or an infinite activation must reach the result
      memset(digits + g * group, 0, group);
      if (count == 2) memset(digits + k + g * group, 0, group);
      steps[g] = sums[g] = NAN;
      continue;
    }
    // Below 1e-34 most / peak would overflow: the group counts as zero.
    const __m512 inverse = _mm512_set1_ps(peak > 1e-34f ? most / peak : 0.f);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < group; i += 16) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(xg + i), inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(half)), shift);
      total = _mm512_add_epi32(total, q);
      __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(_mm512_sub_epi32(q, _mm512_slli_epi32(high, shift)));
      if (form != DigitForm::bytes) {
        h = _mm_shuffle_epi8(h, even_odd);
        l = _mm_shuffle_epi8(l, even_odd);
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + g * group + i), h);
      if (count == 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + k + g * group + i), l);
    }
    steps[g] = step;
    const float digit_sum = float(_mm512_reduce_add_epi32(total));
    sums[g] = form == DigitForm::nibbles_raw ? digit_sum : step * digit_sum;
  }
}
#elif defined(MLXLM_DIGITS)
void make_digits_kernel(const float* x, int k, int group, DigitForm form, int count, int8_t* digits, float* steps, float* sums) {
  const float most = count == 2 ? 16256.f : 127.f;  // 127 * 128
  const int shift = count == 2 ? 7 : 0, half = count == 2 ? 64 : 0;
  static const int8_t in_order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static const int8_t even_odd[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
  const int8_t* order = form == DigitForm::bytes ? in_order : even_odd;
  for (int g = 0; g < k / group; ++g) {
    const float* xg = x + g * group;
    int8_t* to = digits + g * group;
    F peaks = F{};
    I strange = I{};
    for (int i = 0; i < group; i += 16) {
      const F v = (F)((U)load(xg + i) & 0x7FFFFFFFu);
      peaks = vmax(peaks, v);
      strange |= ~(v <= 3.4e38f);
    }
    float largest[16];
    int32_t bad[16], any_bad = 0;
    store(largest, peaks);
    memcpy(bad, &strange, sizeof bad);
    float peak = 0.f;
    for (int l = 0; l < 16; ++l) {
      peak = largest[l] > peak ? largest[l] : peak;
      any_bad |= bad[l];
    }
    if (any_bad != 0) {  // a NaN or an infinite activation must reach the result
      memset(to, 0, group);
      if (count == 2) memset(to + k, 0, group);
      steps[g] = sums[g] = NAN;
      continue;
    }
    // Below 1e-34 most / peak would overflow: the group counts as zero.
    const float inverse = peak > 1e-34f ? most / peak : 0.f;
    I total = I{};
    for (int i = 0; i < group; i += 16) {
      const I q = (I)(load(xg + i) * inverse + 12582912.f) - 0x4B400000;  // rounds to nearest, as far as 2^22
      const I high = (q + half) >> shift, low = q - (high << shift);
      total += q;
      int32_t h[16], r[16];
      memcpy(h, &high, sizeof h);
      memcpy(r, &low, sizeof r);
      for (int l = 0; l < 16; ++l) to[i + l] = static_cast<int8_t>(h[order[l]]);
      if (count == 2) {
        for (int l = 0; l < 16; ++l) to[k + i + l] = static_cast<int8_t>(r[order[l]]);
      }
    }
    int32_t parts[16], digit_sum = 0;
    memcpy(parts, &total, sizeof parts);
    for (int l = 0; l < 16; ++l) digit_sum += parts[l];
    const float step = peak / most;
    steps[g] = step;
    sums[g] = form == DigitForm::nibbles_raw ? float(digit_sum) : step * float(digit_sum);
  }
}
#else
void make_digits_kernel(const float*, int, int, DigitForm, int, int8_t*, float*, float*) {}  // uses_digits is false
#endif
