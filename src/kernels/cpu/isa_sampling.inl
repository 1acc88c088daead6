// Loops over a row of scores of the vocabulary. Included by isa.inl.

float row_max_kernel(const float* x, int64_t count) {
  F most = set(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) most = vmax(load(x + i), most);
  float result = max_lane(most);
  for (; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

/** out[i] = exp(x[i] - shift), 0 for x[i] = -inf; returns their sum. */
float exps_kernel(const float* x, float shift, int64_t count, float* out) {
  // exp stops falling at the least normal number: what lies below that counts as nothing.
  const auto value = [&](F v) { return select(v - shift < -87.f, set(0.f), vexp(v - shift)); };
  F totals = set(0.f);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const F e = value(load(x + i));
    store(out + i, e);
    totals += e;
  }
  float rest[16], e[16];
  for (int l = 0; l < 16; ++l) rest[l] = i + l < count ? x[i + l] : -INFINITY;
  const F last = value(load(rest));
  store(e, last);
  for (int64_t l = i; l < count; ++l) out[l] = e[l - i];
  return sum(totals + last);
}
