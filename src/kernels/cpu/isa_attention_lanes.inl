// Attention of many rows over one block of keys, a row a lane: no sum within a vector, and keys need no other order than theirs. Part of
// isa.inl. Every row gets the bits that block_rows gives it: sums over dims and over keys have its order, 16 partial sums joined as sum()
// does.

#if defined(__AVX512F__)
constexpr int lane_vectors = 2, keys_at_once = 2;  // the partial sums under way fill the registers
#else
constexpr int lane_vectors = 1, keys_at_once = 1;
#endif
constexpr int lane_rows = 16 * lane_vectors;
static_assert(most_lane_rows % lane_rows == 0);

/** Partial sum `n` of 16 in the order in which sum() joins them, two by two: 0, 8, 4, 12, 2, ... */
constexpr int nth_partial(int n) {
  return (n & 1) << 3 | (n & 2) << 1 | (n & 4) >> 1 | (n & 8) >> 3;
}

/** Keeps the compiler from reading the value again for each use, and from joining a product with the sum that it goes into. */
inline F in_register(F v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

inline void transpose16(F* v) {
  F t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 16; ++i) {
    if (i & 2) continue;
    v[i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    v[i + 2] = __builtin_shufflevector(t[i], t[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 16; ++i) {
    if (i & 4) continue;
    t[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    t[i + 4] = __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = __builtin_shufflevector(t[i], t[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    v[i + 8] = __builtin_shufflevector(t[i], t[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

/** Rows of queries [rows][dims] as scores_in_lanes reads them, in order: for each lane_rows of them, for each partial sum, its dims, each
 * of all the rows. Rows that are missing are zeros. */
void queries_to_lanes_kernel(const float* q, int rows, int dims, float* to) {
  const int steps = dims / 16;
  for (int r0 = 0; r0 < rows; r0 += lane_rows, to += int64_t(dims) * lane_rows) {
    for (int n = 0; n < lane_vectors; ++n) {
      for (int i = 0; i < steps; ++i) {
        F v[16];
        for (int r = 0; r < 16; ++r) {
          const int row = r0 + 16 * n + r;
          v[r] = row < rows ? load(q + int64_t(row) * dims + 16 * i) : F{};
        }
        transpose16(v);
        for (int l = 0; l < 16; ++l) store(to + (int64_t(l) * steps + i) * lane_rows + 16 * n, v[nth_partial(l)]);
      }
    }
  }
}

/** Partial sums [N, N + COUNT) of some keys' scores, joined. STEPS: dims / 16, or 0 = as given. */
template <int N, int COUNT, int STEPS>
__attribute__((always_inline)) inline void partial_scores(const float*& q, const float* const* k, int steps,
                                                          F (&sums)[keys_at_once][lane_vectors]) {
  if constexpr (COUNT == 1) {
    constexpr int lane = nth_partial(N);
    F row[lane_vectors];
    for (int n = 0; n < lane_vectors; ++n) row[n] = in_register(load(q + 16 * n));
    for (int key = 0; key < keys_at_once; ++key) {
      for (int n = 0; n < lane_vectors; ++n) sums[key][n] = in_register(row[n] * k[key][lane]);
    }
    q += lane_rows;
#pragma GCC unroll 8
    for (int i = 1; i < (STEPS > 0 ? STEPS : steps); ++i, q += lane_rows) {
      for (int n = 0; n < lane_vectors; ++n) row[n] = in_register(load(q + 16 * n));
      for (int key = 0; key < keys_at_once; ++key) {
        for (int n = 0; n < lane_vectors; ++n) sums[key][n] += row[n] * k[key][lane + 16 * i];
      }
    }
  } else {
    F more[keys_at_once][lane_vectors];
    partial_scores<N, COUNT / 2, STEPS>(q, k, steps, sums);
    partial_scores<N + COUNT / 2, COUNT / 2, STEPS>(q, k, steps, more);
    for (int key = 0; key < keys_at_once; ++key) {
      for (int n = 0; n < lane_vectors; ++n) sums[key][n] += more[key][n];
    }
  }
}

/** scores[j][r] for keys [0, keys); returns each row's largest. */
template <int STEPS>
void scores_in_lanes(const float* q, const float* k, int keys, int dims, float* scores, F* best) {
  for (int n = 0; n < lane_vectors; ++n) best[n] = set(-INFINITY);
  for (int j = 0; j < keys; j += keys_at_once) {
    const float *from = q, *key[keys_at_once];
    for (int i = 0; i < keys_at_once; ++i) key[i] = k + int64_t(j + i < keys ? j + i : keys - 1) * dims;
    F sums[keys_at_once][lane_vectors];
    partial_scores<0, 16, STEPS>(from, key, dims / 16, sums);
    for (int i = 0; i < keys_at_once; ++i) {
      for (int n = 0; n < lane_vectors; ++n) {
        store(scores + (j + i) * lane_rows + 16 * n, sums[i][n]);
        best[n] = vmax(sums[i][n], best[n]);
      }
    }
  }
}

/** Scores of the keys that rows do not see to -infinity, the others through the soft cap. */
void mask_lanes(float* scores, int keys, const int* first, const int* last, float softcap, F* best) {
  for (int n = 0; n < lane_vectors; ++n) {
    I from, to;
    memcpy(&from, first + 16 * n, sizeof from);
    memcpy(&to, last + 16 * n, sizeof to);
    best[n] = set(-INFINITY);
    for (int j = 0; j < keys; ++j) {
      float* s = scores + j * lane_rows + 16 * n;
      F x = load(s);
      if (softcap > 0.f) x = with_softcap(x, softcap);
      x = select((from <= j) & (to > j), x, set(-INFINITY));
      store(s, x);
      best[n] = vmax(x, best[n]);
    }
  }
}

/** Partial sums [N, N + COUNT) of 16 rows' weights, joined. */
template <int N, int COUNT>
__attribute__((always_inline)) inline F partial_totals(const float* weights, int keys) {
  if constexpr (COUNT == 1) {
    F total = F{};
    for (int j = nth_partial(N); j < keys; j += 16) total += load(weights + j * lane_rows);
    return total;
  } else {
    const F a = partial_totals<N, COUNT / 2>(weights, keys);
    return a + partial_totals<N + COUNT / 2, COUNT / 2>(weights, keys);
  }
}

/** 16 rows' scores to weights; returns their sums. */
F weights_in_lanes(float* scores, int keys, F peak) {
#pragma GCC unroll 2
  for (int j = 0; j < keys; ++j) store(scores + j * lane_rows, vexp_weight(load(scores + j * lane_rows) - peak));
  if (keys != attention_block) return partial_totals<0, 16>(scores, keys);
  return partial_totals<0, 16>(scores, attention_block);
}

/** lane_rows rows from row r0. */
void rows_in_lanes(const BlockAttention& b, int r0) {
  const int *first = b.first + r0, *last = b.last + r0;
  int from = b.keys, keys = 0, latest = 0, earliest = b.keys;  // keys that any row sees, and that all see
  for (int r = 0; r < lane_rows; ++r) {
    from = first[r] < from ? first[r] : from;
    latest = first[r] > latest ? first[r] : latest;
    keys = last[r] > keys ? last[r] : keys;
    earliest = last[r] < earliest ? last[r] : earliest;
  }
  if (from >= keys) return;
  const auto* k = static_cast<const float*>(b.k);
  const float* q = b.q_lanes + int64_t(r0) * b.key_dims;
  F best[lane_vectors];
  if (b.key_dims == 64) scores_in_lanes<4>(q, k, keys, b.key_dims, b.scores, best);
  else if (b.key_dims == 128) scores_in_lanes<8>(q, k, keys, b.key_dims, b.scores, best);
  else scores_in_lanes<0>(q, k, keys, b.key_dims, b.scores, best);
  if (latest > 0 || earliest < keys || b.softcap > 0.f) mask_lanes(b.scores, keys, first, last, b.softcap, best);
  for (int n = 0; n < lane_vectors; ++n) {
    float *peaks = b.peaks + r0 + 16 * n, *totals = b.totals + r0 + 16 * n;
    const F old = load(peaks), now = vmax(best[n], old), by = worth(old, now);
    const F t = weights_in_lanes(b.scores + 16 * n, keys, select(now == -INFINITY, F{}, now));
    store(peaks, now);
    store(totals, load(totals) * by + t);
    for (int r = 0; r < 16; ++r) {
      if (by[r] != 1.f) rescale(b.out + int64_t(r0 + 16 * n + r) * b.value_dims, by[r], b.value_dims);
    }
  }
  for (int r = 0; r < lane_rows && r0 + r < b.rows; r += 4) {
    const float* p[4];
    float* out[4];
    for (int i = 0; i < 4; ++i) {
      p[i] = b.scores + r + i;
      out[i] = b.out + int64_t(r0 + r + i) * b.value_dims;
    }
    add_values<Storage::f32, 4, lane_rows>(p, {b.v, b.value_dims}, keys, b.value_dims, out);
  }
}

void block_in_lanes(const BlockAttention& b) {
  for (int r = 0; r < b.rows; r += lane_rows) rows_in_lanes(b, r);
}
