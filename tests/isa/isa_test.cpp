// The inner loops of every instruction set that this machine (or emulator) runs, against plain double arithmetic. Needs neither MLX nor
// GoogleTest, so that it can be built for another machine: tests/neon_qemu.sh. Arguments: names that must be among the instruction sets.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cpu/isa_list.h"
#include "kernels/cpu/panels.h"

namespace mlxlm::kernels::cpu {
namespace {

int failures = 0;

void check(bool fine, const std::string& what) {
  if (fine || ++failures > 20) return;
  std::printf("FAILED: %s\n", what.c_str());
}

uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}
float noise(uint64_t seed, uint64_t i) {
  return float(mixed(seed * 1000003 + i) >> 40) * 0x1p-23f - 1.f;
}

std::vector<float> noises(uint64_t seed, int64_t count, float size = 1.f) {
  std::vector<float> v(count);
  for (int64_t i = 0; i < count; ++i) v[i] = noise(seed, i) * size;
  return v;
}

struct Kind {
  int bits, group;
  Codes codes;
  Storage scales;
};

/** The bits that panels give to codes; as pack.cpp. */
int stored_bits(const Kind& kind) {
  return kind.group % 32 == 0 ? kind.bits : kind.bits <= 4 ? 4 : 8;
}

/** 16 rows of random codes and scales, and a panel of them. */
struct Sample {
  Panels panels;
  std::vector<uint8_t> codes[16], scales[16], biases[16];
  std::vector<uint8_t> panel;
  std::vector<float> values;  // [16][k]

  Sample(const Kind& kind, int groups, int used_rows) {
    const int k = kind.group * groups;
    panels = {nullptr, k, kind.group, stored_bits(kind), kind.scales, kind.codes};
    StoredRow rows[16];
    for (int r = 0; r < used_rows; ++r) {
      for (int i = 0; i < k * kind.bits / 8; ++i) codes[r].push_back(static_cast<uint8_t>(mixed(r * 100000 + i)));
      if (kind.codes == Codes::e4m3) {  // 127 is no number
        for (auto& c : codes[r]) c = c % 128 == 127 ? 3 : c;
      }
      const int item = panels.scale_bytes();
      scales[r].resize(groups * item);
      biases[r].resize(groups * item);
      for (int g = 0; g < groups; ++g) {
        const float scale = noise(7, r * 99 + g) * 0.01f, bias = noise(8, r * 99 + g) * 0.1f;
        if (item == 1) {
          scales[r][g] = static_cast<uint8_t>(kind.scales == Storage::e8m0 ? 110 + mixed(r + g) % 20 : 1 + mixed(r + g) % 120);
        } else {
          isa_generic().store(&scale, kind.scales, scales[r].data() + g * item, 1);
          isa_generic().store(&bias, kind.scales, biases[r].data() + g * item, 1);
        }
      }
      rows[r] = {codes[r].data(), scales[r].data(), biases[r].data()};
    }
    panel.assign(panels.panel_bytes() + 8192, 0xAA);
    write_panel(panels, kind.bits, rows, panel.data());
    values.resize(int64_t(16) * k);
    for (int r = 0; r < 16; ++r) expand_panel_row(panels, panel.data(), r, values.data() + int64_t(r) * k);
    check_values(kind, used_rows);
  }

  /** The expanded row against the stream of bits. */
  void check_values(const Kind& kind, int used_rows) const {
    const int k = panels.k;
    for (int r = 0; r < 16; ++r) {
      for (int i = 0; i < k; ++i) {
        double wanted = 0;
        if (r < used_rows) {
          int code = 0;
          for (int j = 0; j < kind.bits; ++j) code |= (codes[r][(i * kind.bits + j) / 8] >> ((i * kind.bits + j) % 8) & 1) << j;
          wanted = value_of(kind, r, i / kind.group, code);
        }
        check(std::abs(values[int64_t(r) * k + i] - wanted) <= 1e-6 * (std::abs(wanted) + 0.5),
              "a value of " + std::to_string(kind.bits) + " bits");
      }
    }
  }

  double small_float(int code, int exponent_bits, int mantissa_bits, int bias) const {
    const int e = code >> mantissa_bits & ((1 << exponent_bits) - 1), m = code & ((1 << mantissa_bits) - 1);
    const double size = e == 0 ? std::ldexp(m, 1 - bias - mantissa_bits) : std::ldexp((1 << mantissa_bits) + m, e - bias - mantissa_bits);
    return code >> (exponent_bits + mantissa_bits) & 1 ? -size : size;
  }

  double value_of(const Kind& kind, int r, int g, int code) const {
    if (kind.codes == Codes::affine) {
      float scale, bias;
      isa_generic().load(scales[r].data() + g * panels.scale_bytes(), kind.scales, &scale, 1);
      isa_generic().load(biases[r].data() + g * panels.scale_bytes(), kind.scales, &bias, 1);
      return double(scale) * code + bias;
    }
    const double scale = kind.scales == Storage::e8m0 ? std::ldexp(1.0, scales[r][g] - 127) : small_float(scales[r][g], 4, 3, 7);
    return scale * (kind.codes == Codes::e2m1 ? small_float(code, 2, 1, 1) : small_float(code, 4, 3, 7));
  }
};

struct Forms {
  Activations a;
  std::vector<float> x, sums, steps;
  std::vector<int8_t> digits;
  Forms(const Isa& isa, const Panels& p, const std::vector<float>& values, int m, int digit_count) : x(values) {
    const int groups = p.k / p.group;
    sums.resize(int64_t(m) * groups);
    steps.resize(int64_t(m) * groups);
    digits.resize(int64_t(2) * m * p.k + 64);
    for (int i = 0; i < m; ++i) {
      if (digit_count == 0) {
        isa.group_sums(x.data() + i * p.k, p.k, p.group, sums.data() + i * groups);
      } else {
        isa.make_digits(x.data() + i * p.k, p.k, p.group, p.digit_form(), digit_count, digits.data() + int64_t(digit_count) * i * p.k,
                        steps.data() + i * groups, sums.data() + i * groups);
      }
    }
    a = {x.data(), sums.data(), digit_count == 0 ? nullptr : digits.data(), digit_count, steps.data(), sums.data(), p.k, groups};
  }
};

/** Products of every format; a row's bits do not depend on the rows beside it. */
void test_panels(const Isa& isa) {
  std::vector<Kind> kinds;
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const int group : {16, 32, 64, 128}) kinds.push_back({bits, group, Codes::affine, Storage((bits + group / 32) % 3)});
  }
  kinds.push_back({4, 32, Codes::e2m1, Storage::e8m0});
  kinds.push_back({4, 16, Codes::e2m1, Storage::e4m3});
  kinds.push_back({8, 32, Codes::e4m3, Storage::e8m0});
  for (const auto& kind : kinds) {
    for (const int groups : {1, 3, 18}) {
      if (groups == 18 && kind.group != 32) continue;
      const Sample s(kind, groups, groups == 1 ? 16 : 13);
      const auto& p = s.panels;
      const int m = groups == 18 ? 35 : 27;
      for (const float size : {1.f, 1e-20f, 1e20f}) {
        auto values = noises(5 + groups, int64_t(m) * p.k, size);
        values[1] = 30 * size;                                // stands out
        std::fill_n(values.begin() + 2 * p.k, p.group, 0.f);  // a row of nothing
        for (const int digits : {0, 1, 2}) {
          if (digits > 0 && (!isa.uses_digits || !p.takes_digits())) continue;
          const std::string what = std::string(isa.name) + ", " + std::to_string(kind.bits) + " bits, codes " +
                                   std::to_string(int(kind.codes)) + ", group " + std::to_string(kind.group) + ", digits " +
                                   std::to_string(digits) + ", size " + std::to_string(std::log10(size));
          const Forms f(isa, p, values, m, digits);
          std::vector<float> c(m * 16, NAN);
          isa.panel(p, s.panel.data(), f.a, 0, m, c.data(), 16);
          for (int i = 0; i < m; ++i) {
            for (int r = 0; r < 16; ++r) {
              double wanted = 0, allowed = 0, norm = 0;
              for (int g = 0; g < groups; ++g) {
                double peak = 0;
                for (int j = g * p.group; j < (g + 1) * p.group; ++j) peak = std::max<double>(peak, std::abs(values[int64_t(i) * p.k + j]));
                for (int j = g * p.group; j < (g + 1) * p.group; ++j) {
                  const double w = s.values[int64_t(r) * p.k + j], x = values[int64_t(i) * p.k + j];
                  wanted += w * x;
                  norm += peak * 0.2 + std::abs(w * x);
                  if (digits > 0) allowed += std::abs(w) * peak / (digits == 2 ? 16256 : 127) * 0.502;
                }
              }
              const float got = c[i * 16 + r];
              check(std::abs(got - wanted) <= allowed + 2e-6 * norm,
                    what + ": got " + std::to_string(got) + ", wanted " + std::to_string(wanted));
            }
          }
          for (const int count : {1, 2, 3, 7, 12}) {
            for (int at = 0; at + count <= m; at += 5) {
              std::vector<float> part(count * 20, NAN);
              isa.panel(p, s.panel.data(), f.a, at, count, part.data(), 20);
              for (int i = 0; i < count; ++i) {
                check(std::memcmp(part.data() + i * 20, c.data() + (at + i) * 16, 64) == 0, what + ": a row depends on its batch");
              }
            }
          }
        }
      }
      // What is not a number stays in its row and reaches it.
      auto values = noises(9, 3 * int64_t(p.k));
      values[p.k + p.group / 2] = NAN;
      for (const int digits : {0, 2}) {
        if (digits > 0 && (!isa.uses_digits || !p.takes_digits())) continue;
        const Forms f(isa, p, values, 3, digits);
        float c[48];
        isa.panel(p, s.panel.data(), f.a, 0, 3, c, 16);
        for (int i = 0; i < 48; ++i) check(std::isnan(c[i]) == (i / 16 == 1), std::string(isa.name) + ": NaN");
      }
    }
  }
}

void test_dense(const Isa& isa) {
  for (const auto storage : {Storage::f32, Storage::f16, Storage::bf16}) {
    for (const int k : {1, 7, 15, 16, 17, 33, 100, 256}) {
      const int m = 7;
      const auto values = noises(k, 4 * k), x = noises(k + 1, int64_t(m) * k + 16);
      std::vector<uint8_t> w(16 * k + 64);
      std::vector<float> exact(4 * k);
      isa_generic().store(values.data(), storage, w.data(), 4 * k);
      isa_generic().load(w.data(), storage, exact.data(), 4 * k);
      for (const int count : {1, 3, 4}) {
        std::vector<float> c(m * 4, 0.f);
        isa.dense(w.data(), storage, k, count, x.data(), m, k, c.data(), 4);
        for (int i = 0; i < m; ++i) {
          for (int n = 0; n < count; ++n) {
            double wanted = 0;
            for (int j = 0; j < k; ++j) wanted += double(exact[n * k + j]) * x[i * k + j];
            check(std::abs(c[i * 4 + n] - wanted) <= 2e-6 * k, std::string(isa.name) + ": dense, k = " + std::to_string(k));
          }
        }
      }
    }
  }
}

/** Every 16-bit float, and floats to them, as the generic loops do it. */
void test_conversion(const Isa& isa) {
  std::vector<uint16_t> all(65536), back(65536), wanted(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> floats(65536), plain(65536), any(65536);
  for (int i = 0; i < 65536; ++i) {
    const uint32_t bits = static_cast<uint32_t>(mixed(i));
    std::memcpy(&any[i], &bits, 4);
    if (any[i] != any[i]) any[i] = float(i);
  }
  for (const auto storage : {Storage::f16, Storage::bf16}) {
    isa.load(all.data(), storage, floats.data(), 65536);
    isa_generic().load(all.data(), storage, plain.data(), 65536);
    for (int i = 0; i < 65536; ++i) {
      check(floats[i] == plain[i] || (floats[i] != floats[i] && plain[i] != plain[i]),
            std::string(isa.name) + ": load of " + std::to_string(i));
    }
    isa.store(any.data(), storage, back.data(), 65536);
    isa_generic().store(any.data(), storage, wanted.data(), 65536);
    for (int i = 0; i < 65536; ++i) check(back[i] == wanted[i], std::string(isa.name) + ": store of " + std::to_string(any[i]));
  }
}

void near(const Isa& isa, const std::string& what, const std::vector<float>& got, const std::vector<float>& wanted, float allowed) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    check(std::abs(got[i] - wanted[i]) <= allowed * (1 + std::abs(wanted[i])),
          std::string(isa.name) + ": " + what + ": got " + std::to_string(got[i]) + ", wanted " + std::to_string(wanted[i]));
  }
}

/** Loops over rows against the C library's functions. */
void test_rows(const Isa& isa) {
  for (const int n : {1, 15, 16, 17, 64, 100}) {
    const auto x = noises(1, n, 8.f), y = noises(2, n), weight = noises(3, n);
    std::vector<float> got(n), wanted(n);
    double squares = 0;
    for (int i = 0; i < n; ++i) squares += double(x[i]) * x[i];
    isa.rms_norm(x.data(), weight.data(), 1e-5f, n, got.data());
    for (int i = 0; i < n; ++i) wanted[i] = float(x[i] / std::sqrt(squares / n + 1e-5) * weight[i]);
    near(isa, "rms_norm", got, wanted, 2e-6f);
    isa.silu_mul(x.data(), y.data(), got.data(), n);
    for (int i = 0; i < n; ++i) wanted[i] = float(x[i] / (1 + std::exp(-double(x[i]))) * y[i]);
    near(isa, "silu", got, wanted, 2e-6f);
    isa.sigmoid_mul(x.data(), y.data(), got.data(), n);
    for (int i = 0; i < n; ++i) wanted[i] = float(y[i] / (1 + std::exp(-double(x[i]))));
    near(isa, "sigmoid", got, wanted, 2e-6f);
    isa.multiply(x.data(), y.data(), got.data(), n);
    for (int i = 0; i < n; ++i) wanted[i] = x[i] * y[i];
    near(isa, "multiply", got, wanted, 0.f);
    isa.gelu_tanh_mul(x.data(), y.data(), got.data(), n);
    for (int i = 0; i < n; ++i) {
      const double g = x[i];
      wanted[i] = float(g / 2 * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * y[i]);
    }
    near(isa, "gelu", got, wanted, 4e-6f);
    auto sum = x;
    isa.add_scaled(sum.data(), y.data(), 0.5f, n);
    for (int i = 0; i < n; ++i) wanted[i] = x[i] + 0.5f * y[i];
    near(isa, "add_scaled", sum, wanted, 1e-6f);
  }
  for (const bool traditional : {false, true}) {
    for (const int pairs : {3, 16, 20}) {
      const int heads = 3, width = 2 * pairs + 5;
      const auto x = noises(4, heads * width), cosines = noises(5, pairs), sines = noises(6, pairs);
      auto got = x, wanted = x;
      isa.rope(got.data(), heads, width, cosines.data(), sines.data(), pairs, traditional, 2.f);
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < pairs; ++i) {
          const int at = h * width + (traditional ? 2 * i : i), other = at + (traditional ? 1 : pairs);
          wanted[at] = 2 * x[at] * cosines[i] - 2 * x[other] * sines[i];
          wanted[other] = 2 * x[other] * cosines[i] + 2 * x[at] * sines[i];
        }
      }
      near(isa, "rope", got, wanted, 1e-6f);
    }
  }
}

void test_delta(const Isa& isa) {
  for (const int width : {7, 64, 100, 128, 192}) {
    const int dims = 3, tokens = 5;
    const float unit = 1 / std::sqrt(float(width)), decay = 0.8f, beta = 0.6f;
    const auto q = noises(1, tokens * width, unit), k = noises(2, tokens * width, unit), v = noises(3, tokens * dims),
               from = noises(4, dims * width);
    std::vector<float> got(tokens * dims), wanted(tokens * dims), state(dims * width), last(dims * width);
    const std::vector<float> decays(tokens, decay), betas(tokens, beta);
    for (int d = 0; d < dims; ++d) {
      std::vector<double> held(from.begin() + d * width, from.begin() + (d + 1) * width);
      for (int t = 0; t < tokens; ++t) {
        double seen = 0, answer = 0;
        for (int n = 0; n < width; ++n) seen += decay * held[n] * k[t * width + n];
        for (int n = 0; n < width; ++n) {
          held[n] = decay * held[n] + beta * (v[t * dims + d] - seen) * k[t * width + n];
          answer += held[n] * q[t * width + n];
        }
        wanted[t * dims + d] = float(answer);
      }
      for (int n = 0; n < width; ++n) last[d * width + n] = float(held[n]);
    }
    DeltaHead s;
    s.q = q.data();
    s.k = k.data();
    s.v = v.data();
    s.decay = decays.data();
    s.beta = betas.data();
    s.qk_stride = s.width = width;
    s.v_stride = s.y_stride = s.dims = dims;
    s.step_stride = 1;
    s.from = from.data();
    s.state = state.data();
    s.y = got.data();
    s.tokens = tokens;
    isa.delta(s);
    near(isa, "delta", got, wanted, 1e-5f);
    near(isa, "delta's state", state, last, 1e-5f);
  }
}

void test_attention(const Isa& isa) {
  for (const auto storage : {Storage::f32, Storage::f16, Storage::bf16}) {
    for (const int e : {16, 64, 72}) {
      for (const int rows : {1, 3, 4}) {
        const int keys = 37;
        const auto q = noises(1, 4 * e), k = noises(2, keys * e), v = noises(3, keys * e);
        std::vector<uint8_t> ks(keys * e * 4 + 64), vs(ks.size());
        isa_generic().store(k.data(), storage, ks.data(), keys * e);
        isa_generic().store(v.data(), storage, vs.data(), keys * e);
        std::vector<float> kf(keys * e), vf(keys * e), out(rows * e), wanted(rows * e), scores(4 * 64);
        isa_generic().load(ks.data(), storage, kf.data(), keys * e);
        isa_generic().load(vs.data(), storage, vf.data(), keys * e);
        AttentionTile t{};
        for (int r = 0; r < rows; ++r) {
          t.q[r] = q.data() + r * e;
          t.out[r] = out.data() + r * e;
          t.first[r] = r;
          t.visible[r] = keys - 2 * (rows - 1 - r);
          double total = 0;
          std::vector<double> sum(e, 0);
          for (int s = t.first[r]; s < t.visible[r]; ++s) {
            double score = 0;
            for (int j = 0; j < e; ++j) score += double(q[r * e + j]) * kf[s * e + j];
            total += std::exp(score);
            for (int j = 0; j < e; ++j) sum[j] += std::exp(score) * vf[s * e + j];
          }
          for (int j = 0; j < e; ++j) wanted[r * e + j] = float(sum[j] / total);
        }
        t.rows = rows;
        t.e = t.f = e;
        t.k = ks.data();
        t.v = vs.data();
        t.k_stride = t.v_stride = e;
        t.storage = storage;
        t.scores = scores.data();
        t.score_stride = 64;
        isa.attention(t);
        near(isa, "attention", out, wanted, 2e-5f);
      }
    }
  }
}

/** Rows over some blocks of keys; a row sees those in [first, last). */
struct BlockCase {
  int rows, keys, key_dims, value_dims;
  float softcap;
  std::vector<float> q, k, v;
  std::vector<int> first, last;

  BlockCase(int rows, int keys, int key_dims, int value_dims, float softcap)
      : rows(rows),
        keys(keys),
        key_dims(key_dims),
        value_dims(value_dims),
        softcap(softcap),
        q(noises(1, int64_t(rows) * key_dims)),
        k(noises(2, int64_t(keys) * key_dims)),
        v(noises(3, int64_t(keys) * value_dims)) {
    for (int r = 0; r < rows; ++r) {
      first.push_back(r % 5 == 0 ? std::min(r, keys - 1) : 0);
      last.push_back(r % 7 == 3 ? keys : std::max(first[r] + 1, keys - 2 * (rows - 1 - r)));
    }
  }

  struct State {
    std::vector<float> out, peaks, totals;
  };
  State run(const Isa& isa, bool in_lanes) const {
    const int room = (rows + most_lane_rows - 1) / most_lane_rows * most_lane_rows;
    State s{std::vector<float>(int64_t(room) * value_dims), std::vector<float>(room, -INFINITY), std::vector<float>(room)};
    std::vector<float> lanes(int64_t(room) * key_dims), scores(attention_block * most_lane_rows);
    if (in_lanes) isa.queries_to_lanes(q.data(), rows, key_dims, lanes.data());
    for (int at = 0; at < keys; at += attention_block) {
      const int count = std::min(attention_block, keys - at);
      std::vector<int> from, to;
      for (int r = 0; r < room; ++r) {
        from.push_back(std::clamp(first[std::min(r, rows - 1)] - at, 0, count));
        to.push_back(std::clamp(last[std::min(r, rows - 1)] - at, 0, count));
      }
      BlockAttention b{};
      b.q = q.data();
      b.q_lanes = in_lanes ? lanes.data() : nullptr;
      b.k = k.data() + int64_t(at) * key_dims;
      b.v = v.data() + int64_t(at) * value_dims;
      b.storage = Storage::f32;
      b.rows = rows;
      b.keys = count;
      b.key_dims = key_dims;
      b.value_dims = value_dims;
      b.first = from.data();
      b.last = to.data();
      b.softcap = softcap;
      b.out = s.out.data();
      b.peaks = s.peaks.data();
      b.totals = s.totals.data();
      b.scores = scores.data();
      isa.attention_block(b);
    }
    s.out.resize(int64_t(rows) * value_dims);
    s.peaks.resize(rows);
    s.totals.resize(rows);
    return s;
  }

  std::vector<float> wanted() const {
    std::vector<float> out;
    for (int r = 0; r < rows; ++r) {
      double total = 0;
      std::vector<double> sum(value_dims, 0);
      for (int j = first[r]; j < last[r]; ++j) {
        double score = 0;
        for (int i = 0; i < key_dims; ++i) score += double(q[r * key_dims + i]) * k[j * key_dims + i];
        if (softcap > 0.f) score = std::tanh(score / softcap) * softcap;
        total += std::exp(score);
        for (int i = 0; i < value_dims; ++i) sum[i] += std::exp(score) * v[j * value_dims + i];
      }
      for (const double s : sum) out.push_back(float(s / total));
    }
    return out;
  }
};

/** Rows in lanes get the bits that they get by themselves. */
void test_blocks(const Isa& isa) {
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  };
  for (const auto& [key_dims, value_dims] : {std::pair{16, 16}, {64, 64}, {80, 48}, {128, 128}}) {
    for (const int rows : {1, 2, 3, 4, 17, 32, 71}) {
      for (const int keys : {1, 37, 64, 65, 150}) {
        for (const float softcap : {0.f, 3.f}) {
          BlockCase c(rows, keys, key_dims, value_dims, softcap);
          const auto plain = c.run(isa, false), lanes = c.run(isa, true);
          auto out = plain.out;
          for (int r = 0; r < rows; ++r) {
            for (int i = 0; i < value_dims; ++i) out[r * value_dims + i] /= plain.totals[r];
          }
          const std::string what = std::to_string(rows) + " rows, " + std::to_string(keys) + " keys of " + std::to_string(key_dims);
          near(isa, "blocks of attention, " + what, out, c.wanted(), 2e-5f);
          check(same(plain.out, lanes.out) && same(plain.peaks, lanes.peaks) && same(plain.totals, lanes.totals),
                std::string(isa.name) + ": lanes give other bits, " + what);
          c.k[keys / 2 * key_dims] = NAN;
          const auto bad = c.run(isa, false), bad_lanes = c.run(isa, true);
          for (int r = 0; r < rows; ++r) {
            const bool seen = c.first[r] <= keys / 2 && keys / 2 < c.last[r];
            check(std::isnan(bad.totals[r]) == seen && std::isnan(bad_lanes.totals[r]) == seen, std::string(isa.name) + ": NaN, " + what);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace mlxlm::kernels::cpu

int main(int argc, char** argv) {
  namespace cpu = mlxlm::kernels::cpu;
  std::string names;
  for (const auto& [name, table] : cpu::isas_here()) {
    const auto& isa = table();
    cpu::test_panels(isa);
    cpu::test_dense(isa);
    cpu::test_conversion(isa);
    cpu::test_rows(isa);
    cpu::test_attention(isa);
    cpu::test_blocks(isa);
    cpu::test_delta(isa);
    names += " " + std::string(name);
  }
  for (int i = 1; i < argc; ++i)
    cpu::check((names + " ").find(" " + std::string(argv[i]) + " ") != std::string::npos, std::string("no ") + argv[i] + " here");
  std::printf("%s:%s\n", cpu::failures == 0 ? "passed" : "failed", names.c_str());
  return cpu::failures == 0 ? 0 : 1;
}
