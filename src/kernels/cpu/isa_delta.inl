// The gated delta rule, part of isa.inl. Token by token: a row's value never depends on how many tokens come at once. With s the state before a
// token, and its decay taken out of the sums:  add = beta * (v - decay * s k),  y = decay * s q + add * (k q),  state = decay * s + add * k.
// So one pass over a row of the state makes both sums, and a second one the new row, which the registers still hold.

/** The sum in each lane. */
inline F sums(F v) {
  v += swap8(v);
  v += swap4(v);
  v += swap2(v);
  return v + swap1(v);
}

/** What one token changes in row `row`; `from` may be `to`. */
template <int V>
inline float delta_row(const float* from, float* to, const F (&k)[V], const F (&q)[V], F kq, F v, F decay, F beta) {
  F held[V], with_k[2] = {F{}, F{}}, with_q[2] = {F{}, F{}};
  for (int i = 0; i < V; ++i) {
    held[i] = load(from + 16 * i);
    with_k[i % 2] += held[i] * k[i];
    with_q[i % 2] += held[i] * q[i];
  }
  const F seen = sums(with_k[0] + with_k[1]), answered = sums(with_q[0] + with_q[1]);
  const F add = beta * (v - decay * seen), y = decay * answered + add * kq;
  for (int i = 0; i < V; ++i) store(to + 16 * i, decay * held[i] + add * k[i]);
  return y[0];
}

/** Width 16 V. */
template <int V>
void delta_rows(const DeltaHead& s) {
  const float* from = s.from;
  for (int t = 0; t < s.tokens; ++t) {
    F k[V], q[V], both = F{};
    for (int i = 0; i < V; ++i) {
      k[i] = load(s.k + t * s.qk_stride + 16 * i);
      q[i] = load(s.q + t * s.qk_stride + 16 * i);
      both += k[i] * q[i];
    }
    const F kq = sums(both), decay = set(s.decay[t * s.step_stride]), beta = set(s.beta[t * s.step_stride]);
    const float* v = s.v + t * s.v_stride;
    float* y = s.y + t * s.y_stride;
    for (int row = 0; row < s.dims; ++row) {
      const int64_t at = int64_t(row) * s.width;
      y[row] = delta_row<V>(from + at, s.state + at, k, q, kq, set(v[row]), decay, beta);
    }
    from = s.state;
  }
}

/** Any width; ends of rows take the same operations on vectors that are filled with zeros. */
void delta_rows_of_any_width(const DeltaHead& s) {
  const float* from = s.from;
  const int whole = s.width / 16 * 16, rest = s.width - whole;
  for (int t = 0; t < s.tokens; ++t) {
    const float *k = s.k + t * s.qk_stride, *q = s.q + t * s.qk_stride, *v = s.v + t * s.v_stride;
    const F k_end = load_some(k, Storage::f32, whole, rest), q_end = load_some(q, Storage::f32, whole, rest);
    F both = k_end * q_end;
    for (int i = 0; i < whole; i += 16) both += load(k + i) * load(q + i);
    const F kq = sums(both), decay = set(s.decay[t * s.step_stride]), beta = set(s.beta[t * s.step_stride]);
    for (int row = 0; row < s.dims; ++row) {
      const float* old = from + int64_t(row) * s.width;
      float *held = s.state + int64_t(row) * s.width, end[16];
      const F held_end = load_some(old, Storage::f32, whole, rest);
      F with_k = held_end * k_end, with_q = held_end * q_end;
      for (int i = 0; i < whole; i += 16) {
        with_k += load(old + i) * load(k + i);
        with_q += load(old + i) * load(q + i);
      }
      const F seen = sums(with_k), answered = sums(with_q);
      const F add = beta * (set(v[row]) - decay * seen), y = decay * answered + add * kq;
      for (int i = 0; i < whole; i += 16) store(held + i, decay * load(old + i) + add * load(k + i));
      store(end, decay * held_end + add * k_end);
      memcpy(held + whole, end, rest * sizeof(float));
      s.y[t * s.y_stride + row] = y[0];
    }
    from = s.state;
  }
}

void delta_kernel(const DeltaHead& given) {
  DeltaHead s = given;
  if (s.from == nullptr) {
    memset(s.state, 0, int64_t(s.dims) * s.width * sizeof(float));
    s.from = s.state;
  }
  if (s.width == 64) delta_rows<4>(s);
  else if (s.width == 96) delta_rows<6>(s);
  else if (s.width == 128) delta_rows<8>(s);
  else if (s.width == 192) delta_rows<12>(s);
  else if (s.width == 256) delta_rows<16>(s);
  else delta_rows_of_any_width(s);
}
