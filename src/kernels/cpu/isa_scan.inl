// State space scans, part of isa.inl.

/** State columns [n, n + 16 V) of all rows, over all tokens: a column's value never depends on how many tokens come at once. */
template <int V>
void scan_columns(const ScanHead& s, int n) {
  for (int p = 0; p < s.dims; ++p) {
    float* held = s.state + int64_t(p) * s.width + n;
    const float* from = s.from == nullptr ? nullptr : s.from + int64_t(p) * s.width + n;
    F state[V];
    for (int v = 0; v < V; ++v) state[v] = from == nullptr ? F{} : load(from + 16 * v);
    for (int t = 0; t < s.tokens; ++t) {
      const float *b = s.b + t * s.bc_stride + n, *c = s.c + t * s.bc_stride + n;
      const F decay = set(s.decay[t * s.step_stride]), add = set(s.step[t * s.step_stride] * s.x[t * s.x_stride + p]);
      F seen = F{};
      for (int v = 0; v < V; ++v) {
        state[v] = state[v] * decay + add * load(b + 16 * v);
        seen += state[v] * load(c + 16 * v);
      }
      s.y[t * s.y_stride + p] += sum(seen);
    }
    for (int v = 0; v < V; ++v) store(held + 16 * v, state[v]);
  }
}

void scan_kernel(const ScanHead& s) {
  for (int t = 0; t < s.tokens; ++t) {
    for (int p = 0; p < s.dims; ++p) s.y[t * s.y_stride + p] = s.skip * s.x[t * s.x_stride + p];
  }
  int n = 0;
  for (; n + 128 <= s.width; n += 128) scan_columns<8>(s, n);
  for (; n + 64 <= s.width; n += 64) scan_columns<4>(s, n);
  for (; n + 16 <= s.width; n += 16) scan_columns<1>(s, n);
  for (; n < s.width; ++n) {
    for (int p = 0; p < s.dims; ++p) {
      float state = s.from == nullptr ? 0.f : s.from[int64_t(p) * s.width + n];
      for (int t = 0; t < s.tokens; ++t) {
        const int64_t at = t * s.step_stride, bc = t * s.bc_stride + n;
        state = state * s.decay[at] + s.step[at] * s.x[t * s.x_stride + p] * s.b[bc];
        s.y[t * s.y_stride + p] += state * s.c[bc];
      }
      s.state[int64_t(p) * s.width + n] = state;
    }
  }
}

void convolve_kernel(const float* const* rows, const float* weight, const float* bias, int taps, int64_t from, int64_t to, int64_t channels, float* out) {
  int64_t c = from;
  for (; c + 16 <= to; c += 16) {
    F sum = load(rows[0] + c) * load(weight + c);
    for (int t = 1; t < taps; ++t) sum += load(rows[t] + c) * load(weight + t * channels + c);
    if (bias != nullptr) sum += load(bias + c);
    store(out + c, sum);
  }
  for (; c < to; ++c) {
    float sum = rows[0][c] * weight[c];
    for (int t = 1; t < taps; ++t) sum += rows[t][c] * weight[t * channels + c];
    out[c] = bias == nullptr ? sum : sum + bias[c];
  }
}
