// Norms, activations, rotation, cache writes and attention of the CPU kernels against plain double arithmetic.
#include <functional>

#include "base/error.h"
#include "kernels_cpu_support.h"

namespace mlxlm::tests {
namespace {

using Frequencies = std::shared_ptr<const std::vector<float>>;

/** The same values behind other strides: last axis apart, rows apart, axes swapped. */
std::vector<mx::array> views_of(const mx::array& a) {
  auto doubled = a.shape();
  doubled.back() *= 2;
  const auto wide = made(mx::reshape(mx::stack({a, mx::ones_like(a)}, -1), doubled));
  mx::Shape start(a.ndim(), 0), step(a.ndim(), 1);
  step.back() = 2;
  std::vector<mx::array> views{mx::slice(wide, start, wide.shape(), step)};
  const auto padded = made(mx::concatenate({mx::ones_like(a), a}, -1));
  start.back() = a.shape(-1);
  views.push_back(mx::slice(padded, start, padded.shape()));
  if (a.ndim() >= 2) views.push_back(mx::swapaxes(made(mx::swapaxes(a, 0, 1)), 0, 1));
  views.push_back(mx::swapaxes(made(mx::swapaxes(a, 0, -1)), 0, -1));
  return views;
}

// ---- norms ---------------------------------------------------------------------------------------------------------

std::vector<double> plain_rms_norm(const std::vector<double>& x, int width, const std::vector<double>& weight, double eps) {
  std::vector<double> y;
  for (std::size_t row = 0; row < x.size() / width; ++row) {
    double total = 0;
    for (int i = 0; i < width; ++i) total += x[row * width + i] * x[row * width + i];
    const double r = 1 / std::sqrt(total / width + eps);
    for (int i = 0; i < width; ++i) y.push_back(x[row * width + i] * r * (weight.empty() ? 1 : weight[i]));
  }
  return y;
}

TEST(RmsNorm, EveryWidthAndDtype) {
  for (const int width : {1, 2, 7, 15, 16, 17, 64, 100, 576}) {
    for (const auto dtype : float_dtypes()) {
      for (const auto weight_dtype : float_dtypes()) {
        const auto x = random(width, {3, 5, width}, dtype, 2.f), w = random(width + 1, {width}, weight_dtype);
        for (const bool plus_one : {false, true}) {
          auto weight = values_of(w);
          for (auto& value : weight) value += plus_one ? 1 : 0;
          const auto y = cpu::rms_norm(x, w, 1e-5f, plus_one);
          EXPECT_EQ(y.dtype(), dtype);
          EXPECT_EQ(y.shape(), x.shape());
          ASSERT_TRUE(near(y, plain_rms_norm(values_of(x), width, weight, 1e-5f), 1e-7, 2e-6)) << width << " " << name_of(dtype);
        }
      }
      const auto x = random(width, {4, width}, dtype);
      ASSERT_TRUE(near(cpu::rms_norm(x, std::nullopt, 1e-6f, false), plain_rms_norm(values_of(x), width, {}, 1e-6f), 1e-7, 2e-6));
    }
  }
}

TEST(RmsNorm, ManyRowsAndStrides) {
  for (const auto dtype : float_dtypes()) {
    const auto x = random(1, {40, 9, 64}, dtype), w = random(2, {64}, dtype);
    const auto plain = bits_of(cpu::rms_norm(x, w, 1e-5f, false));
    EXPECT_TRUE(near(cpu::rms_norm(x, w, 1e-5f, false), plain_rms_norm(values_of(x), 64, values_of(w), 1e-5f), 1e-7, 2e-6));
    for (const auto& view : views_of(x)) EXPECT_EQ(bits_of(cpu::rms_norm(view, w, 1e-5f, false)), plain);
    for (const auto& view : views_of(w)) EXPECT_EQ(bits_of(cpu::rms_norm(x, view, 1e-5f, false)), plain);
    EXPECT_EQ(bits_of(cpu::rms_norm(part(x, 7, 8), w, 1e-5f, false)), bits_of(part(cpu::rms_norm(x, w, 1e-5f, false), 7, 8)));
  }
}

TEST(RmsNorm, ExtremeRows) {
  const auto zeros = values_of(cpu::rms_norm(mx::zeros({2, 32}), std::nullopt, 1e-5f, false));
  for (const double value : zeros) EXPECT_EQ(value, 0.0);
  const auto large = from(noise(3, 64, 1e4f), {1, 64}, mx::float16);
  EXPECT_TRUE(near(cpu::rms_norm(large, std::nullopt, 1e-5f, false), plain_rms_norm(values_of(large), 64, {}, 1e-5f), 1e-7, 2e-6));
  const auto tiny = from(noise(4, 64, 1e-30f), {1, 64});
  EXPECT_TRUE(near(cpu::rms_norm(tiny, std::nullopt, 1e-5f, false), plain_rms_norm(values_of(tiny), 64, {}, 1e-5f), 1e-36, 2e-6));
  for (const float bad : {INFINITY, NAN}) {
    auto values = noise(5, 96);
    const auto clean = made(cpu::rms_norm(from(values, {3, 32}), std::nullopt, 1e-5f, false));
    values[40] = bad;
    const auto y = made(cpu::rms_norm(from(values, {3, 32}), std::nullopt, 1e-5f, false));
    EXPECT_TRUE(std::isnan(values_of(y)[40]));
    EXPECT_EQ(bits_of(part(y, 0, 1)), bits_of(part(clean, 0, 1)));
    EXPECT_EQ(bits_of(part(y, 2, 3)), bits_of(part(clean, 2, 3)));
  }
  EXPECT_EQ(made(cpu::rms_norm(mx::zeros({0, 8}), std::nullopt, 1e-5f, false)).size(), 0u);
}

// ---- activations ---------------------------------------------------------------------------------------------------

const std::vector<cpu::GluAct>& all_acts() {
  static const std::vector<cpu::GluAct> all{cpu::GluAct::silu, cpu::GluAct::gelu, cpu::GluAct::gelu_tanh, cpu::GluAct::relu2};
  return all;
}

double plain_act(cpu::GluAct act, double x) {
  switch (act) {
    case cpu::GluAct::silu:
      return x / (1 + std::exp(-x));
    case cpu::GluAct::gelu:
      return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case cpu::GluAct::gelu_tanh: {
      const double z = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
      return x / (1 + std::exp(-2 * z));
    }
    case cpu::GluAct::relu2:
      return x > 0 ? x * x : 0;
  }
  return NAN;
}

TEST(Activate, EveryActWidthAndDtype) {
  for (const auto act : all_acts()) {
    for (const int width : {1, 3, 15, 16, 17, 31, 64, 100}) {
      for (const auto dtype : float_dtypes()) {
        const auto x = random(width, {2, 3, width}, dtype, 3.f);
        std::vector<double> wanted;
        for (const double value : values_of(x)) wanted.push_back(plain_act(act, value));
        const auto y = cpu::activate(x, act);
        EXPECT_EQ(y.dtype(), dtype);
        ASSERT_TRUE(near(y, wanted, 1e-6, 1e-6)) << int(act) << " " << width << " " << name_of(dtype);
        for (const auto& view : views_of(x)) ASSERT_EQ(bits_of(cpu::activate(view, act)), bits_of(y));
      }
    }
  }
}

TEST(Glu, EveryActWidthAndDtype) {
  for (const auto act : all_acts()) {
    for (const int half : {1, 3, 15, 16, 17, 64, 100}) {
      for (const auto dtype : float_dtypes()) {
        const auto x = random(half, {7, 2 * half}, dtype, 2.f);
        const auto values = values_of(x);
        std::vector<double> wanted;
        for (int row = 0; row < 7; ++row) {
          for (int i = 0; i < half; ++i) wanted.push_back(plain_act(act, values[row * 2 * half + i]) * values[row * 2 * half + half + i]);
        }
        const auto y = cpu::glu(x, act);
        EXPECT_EQ(y.shape(), (mx::Shape{7, half}));
        ASSERT_TRUE(near(y, wanted, 4e-6, 1e-6)) << int(act) << " " << half << " " << name_of(dtype);
        for (const auto& view : views_of(x)) ASSERT_EQ(bits_of(cpu::glu(view, act)), bits_of(y));
      }
    }
  }
}

TEST(Glu, ManyRows) {
  const auto x = random(9, {300, 2 * 96}, mx::bfloat16);
  const auto whole = made(cpu::glu(x, cpu::GluAct::silu));
  for (const int row : {0, 1, 149, 299}) {
    EXPECT_EQ(bits_of(cpu::glu(part(x, row, row + 1), cpu::GluAct::silu)), bits_of(part(whole, row, row + 1)));
  }
}

/** Far from zero the gates are 0 and 1, also where the exponential overflows. */
TEST(Activate, FarFromZero) {
  std::vector<float> values;
  for (const float size : {20.f, 88.f, 89.f, 100.f, 104.f, 1e4f, 1e10f, 1e18f}) {
    values.push_back(size);
    values.push_back(-size);
  }
  const auto x = from(values, {1, static_cast<int>(values.size())});
  for (const auto act : all_acts()) {
    std::vector<double> wanted;
    for (const float value : values) wanted.push_back(plain_act(act, value));
    EXPECT_TRUE(near(cpu::activate(x, act), wanted, 1e-30, 1e-6)) << int(act);
  }
  const auto most = from({3e38f, -3e38f}, {2});
  for (const auto act : {cpu::GluAct::silu, cpu::GluAct::gelu, cpu::GluAct::gelu_tanh}) {
    const auto y = values_of(cpu::activate(most, act));
    EXPECT_EQ(y[0], double(3e38f)) << int(act);
    EXPECT_EQ(y[1], 0.0) << int(act);
  }
}

TEST(Activate, InfAndNan) {
  const auto x = from({INFINITY, NAN, 1.f}, {3});
  for (const auto act : all_acts()) {
    const auto y = values_of(cpu::activate(x, act));
    EXPECT_EQ(y[0], INFINITY) << int(act);
    EXPECT_TRUE(std::isnan(y[1])) << int(act);
    EXPECT_TRUE(std::isfinite(y[2])) << int(act);
  }
}

// ---- rotation ------------------------------------------------------------------------------------------------------

std::vector<double> plain_rope(const mx::array& x, const std::vector<float>& frequencies, int offset, bool traditional,
                               double input_scale) {
  const int batch = x.shape(0), length = x.shape(1), heads = x.shape(2), width = x.shape(3), pairs = static_cast<int>(frequencies.size());
  const auto in = values_of(x);
  std::vector<double> out(in.size());
  for (int b = 0; b < batch; ++b) {
    for (int l = 0; l < length; ++l) {
      for (int h = 0; h < heads; ++h) {
        const double* from = &in[((int64_t(b) * length + l) * heads + h) * width];
        double* to = &out[((int64_t(b) * heads + h) * length + l) * width];
        for (int i = 2 * pairs; i < width; ++i) to[i] = from[i];
        for (int i = 0; i < pairs; ++i) {
          const int a = traditional ? 2 * i : i, c = traditional ? 2 * i + 1 : pairs + i;
          const double angle = double(offset + l) * frequencies[i];
          to[a] = input_scale * (from[a] * std::cos(angle) - from[c] * std::sin(angle));
          to[c] = input_scale * (from[c] * std::cos(angle) + from[a] * std::sin(angle));
        }
      }
    }
  }
  return out;
}

Frequencies frequencies_of(int pairs, float base = 10000.f) {
  std::vector<float> f;
  for (int i = 0; i < pairs; ++i) f.push_back(std::pow(base, -float(i) / float(pairs)));
  return std::make_shared<const std::vector<float>>(f);
}

TEST(RopeHeads, AgreesWithDoubles) {
  for (const auto dtype : float_dtypes()) {
    for (const int length : {1, 2, 7, 70}) {
      for (const int width : {2, 10, 64}) {
        const auto x = random(length, {2, length, 3, width}, dtype);
        for (const int pairs : {1, width / 2}) {
          for (const bool traditional : {false, true}) {
            const auto f = frequencies_of(pairs);
            for (const auto& [offset, scale] : {std::pair{0, 1.f}, {5, 1.f}, {131000, 1.25f}}) {
              const auto y = cpu::rope_heads(x, f, offset, traditional, scale);
              EXPECT_EQ(y.shape(), (mx::Shape{2, 3, length, width}));
              EXPECT_EQ(y.dtype(), dtype);
              ASSERT_TRUE(near(y, plain_rope(x, *f, offset, traditional, scale), 1e-6, 1e-6)) << length << " " << width << " " << pairs;
            }
          }
        }
      }
    }
  }
}

TEST(RopeHeads, StridesAndPieces) {
  const auto f = frequencies_of(8);
  for (const auto dtype : float_dtypes()) {
    const auto x = random(1, {2, 9, 3, 20}, dtype);
    const auto whole = made(cpu::rope_heads(x, f, 4, false, 1.f));
    for (const auto& view : views_of(x)) EXPECT_EQ(bits_of(cpu::rope_heads(view, f, 4, false, 1.f)), bits_of(whole));
    const auto first = cpu::rope_heads(mx::slice(x, {0, 0, 0, 0}, {2, 5, 3, 20}), f, 4, false, 1.f);
    const auto second = cpu::rope_heads(mx::slice(x, {0, 5, 0, 0}, {2, 9, 3, 20}), f, 9, false, 1.f);
    EXPECT_EQ(bits_of(mx::concatenate({first, second}, 2)), bits_of(whole));
  }
}

TEST(RopeHeads, MoreDimsThanThereAreIsRefused) {
  EXPECT_THROW(cpu::rope_heads(random(1, {1, 1, 1, 6}), frequencies_of(4), 0, false, 1.f), Error);
  EXPECT_THROW(cpu::rope_heads(random(1, {1, 1, 6}), frequencies_of(2), 0, false, 1.f), Error);
}

// ---- writes --------------------------------------------------------------------------------------------------------

TEST(WriteRows, WritesThatPartOnly) {
  for (const auto dtype : float_dtypes()) {
    for (const auto& [start, length] : {std::pair{0, 1}, {3, 4}, {9, 1}, {0, 10}, {10, 0}}) {
      const auto plain = random(2, {2, 3, length, 6}, dtype);
      std::vector<mx::array> sources{plain};
      if (length > 0) {
        for (const auto& view : views_of(plain)) sources.push_back(view);
        sources.push_back(mx::swapaxes(made(mx::swapaxes(plain, 1, 2)), 1, 2));  // as heads come from a projection
      }
      for (const auto& source : sources) {
        const auto buffer = random(1, {2, 3, 10, 6}, dtype);
        const auto wanted =
            bits_of(mx::slice_update(made(mx::copy(buffer)), plain, mx::Shape{0, 0, start, 0}, mx::Shape{2, 3, start + length, 6}));
        EXPECT_EQ(bits_of(cpu::write_rows(buffer, source, start)), wanted) << start << " " << length;
      }
    }
  }
}

TEST(WriteRows, BroadcastSource) {
  const auto row = random(1, {1, 1, 1, 4});
  const auto written = cpu::write_rows(made(mx::zeros({2, 2, 5, 4})), mx::broadcast_to(row, {2, 2, 3, 4}), 1);
  const auto got = values_of(written), wanted = values_of(row);
  for (int i = 0; i < 80; ++i) EXPECT_EQ(got[i], i / 4 % 5 >= 1 && i / 4 % 5 <= 3 ? wanted[i % 4] : 0.0);
}

TEST(WriteRows, WhatDoesNotFitIsRefused) {
  const auto buffer = random(1, {2, 3, 10, 6});
  EXPECT_THROW(cpu::write_rows(buffer, random(1, {2, 3, 2, 6}), 9), Error);
  EXPECT_THROW(cpu::write_rows(buffer, random(1, {2, 3, 2, 6}), -1), Error);
  EXPECT_THROW(cpu::write_rows(buffer, random(1, {2, 3, 2, 6}, mx::float16), 0), Error);
  EXPECT_THROW(cpu::write_rows(buffer, random(1, {2, 3, 2, 7}), 0), Error);
  EXPECT_THROW(cpu::write_rows(buffer, random(1, {2, 4, 2, 6}), 0), Error);
  EXPECT_THROW(cpu::write_rows(buffer, random(1, {3, 3, 2, 6}), 0), Error);
}

// ---- attention -----------------------------------------------------------------------------------------------------

struct Sizes {
  int batch, heads, kv, length, keys, e, f;
};

std::vector<double> plain_attention(const mx::array& q, const mx::array& k, const mx::array& v, const cpu::AttentionOptions& o) {
  const int batch = q.shape(0), heads = q.shape(1), length = q.shape(2), e = q.shape(3), kv = k.shape(1), keys = k.shape(2), f = v.shape(3);
  const auto qs = values_of(q), ks = values_of(k), vs = values_of(v);
  std::vector<double> out(int64_t(batch) * length * heads * f), p(keys);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < heads; ++h) {
      const int64_t pair = int64_t(b) * kv + h / (heads / kv);
      for (int l = 0; l < length; ++l) {
        const int end = o.causal ? keys - length + l + 1 : keys, begin = o.window > 0 ? std::max(0, end - o.window) : 0;
        double peak = -INFINITY, total = 0;
        for (int s = begin; s < end; ++s) {
          p[s] = 0;
          for (int i = 0; i < e; ++i) p[s] += qs[((int64_t(b) * heads + h) * length + l) * e + i] * ks[(pair * keys + s) * e + i];
          p[s] *= o.scale;
          if (o.softcap > 0) p[s] = std::tanh(p[s] / o.softcap) * o.softcap;
          peak = std::max(peak, p[s]);
        }
        for (int s = begin; s < end; ++s) total += p[s] = std::exp(p[s] - peak);
        double* to = &out[((int64_t(b) * length + l) * heads + h) * f];
        for (int s = begin; s < end; ++s) {
          for (int i = 0; i < f; ++i) to[i] += p[s] / total * vs[(pair * keys + s) * f + i];
        }
      }
    }
  }
  return out;
}

struct Inputs {
  mx::array q, k, v;
};

Inputs inputs_of(const Sizes& s, mx::Dtype dtype, mx::Dtype kv_dtype) {
  return {random(1, {s.batch, s.heads, s.length, s.e}, dtype), random(2, {s.batch, s.kv, s.keys, s.e}, kv_dtype),
          random(3, {s.batch, s.kv, s.keys, s.f}, kv_dtype)};
}

TEST(Attention, EveryLengthAndGroup) {
  for (const auto dtype : float_dtypes()) {
    for (int length = 1; length <= 9; ++length) {
      for (const int more : {0, 1, 3, 20, 291}) {
        if (more == 291 && length % 4 != 1) continue;
        for (const auto& [heads, kv] : {std::pair{2, 2}, {4, 2}, {3, 1}, {8, 1}}) {
          const Sizes s{1, heads, kv, length, length + more, 32, 32};
          const auto [q, k, v] = inputs_of(s, dtype, dtype);
          for (const int window : {0, 1, 6, 64}) {
            for (const float softcap : {0.f, 3.f}) {
              const cpu::AttentionOptions options{.scale = 0.2f, .window = window, .softcap = softcap};
              const auto y = cpu::attention(q, k, v, options);
              EXPECT_EQ(y.dtype(), dtype);
              ASSERT_EQ(y.shape(), (mx::Shape{1, length, heads, 32}));
              ASSERT_TRUE(near(y, plain_attention(q, k, v, options), 1e-5))
                  << length << " of " << s.keys << " heads " << heads << "/" << kv << " window " << window << " softcap " << softcap << " "
                  << name_of(dtype);
            }
          }
        }
      }
    }
  }
}

TEST(Attention, EveryWidthBatchAndMixedDtypes) {
  for (const auto dtype : float_dtypes()) {
    for (const auto kv_dtype : float_dtypes()) {
      for (const auto& [e, f] : {std::pair{1, 1}, {7, 5}, {16, 64}, {20, 80}, {64, 16}, {80, 65}, {192, 128}, {96, 112}}) {
        const Sizes s{3, 4, 2, 3, 21, e, f};
        const auto [q, k, v] = inputs_of(s, dtype, kv_dtype);
        for (const bool causal : {true, false}) {
          const cpu::AttentionOptions options{.scale = 1.f / std::sqrt(float(e)), .causal = causal};
          ASSERT_TRUE(near(cpu::attention(q, k, v, options), plain_attention(q, k, v, options), 1e-5)) << e << " " << f << " " << causal;
        }
      }
    }
  }
  const auto [q, k, v] = inputs_of({1, 2, 1, 2, 9, 16, 16}, mx::float32, mx::float32);
  const auto narrow = mx::astype(v, mx::float16);  // values of another dtype than the keys
  EXPECT_TRUE(near(cpu::attention(q, k, narrow, {}), plain_attention(q, k, narrow, {}), 1e-5));
}

TEST(Attention, LongPrompt) {
  const auto [q, k, v] = inputs_of({1, 4, 2, 130, 300, 64, 64}, mx::bfloat16, mx::bfloat16);
  for (const int window : {0, 100}) {
    const cpu::AttentionOptions options{.scale = 0.125f, .window = window};
    EXPECT_TRUE(near(cpu::attention(q, k, v, options), plain_attention(q, k, v, options), 1e-5)) << window;
  }
}

TEST(Attention, Views) {
  for (const auto dtype : float_dtypes()) {
    const auto [q, k, v] = inputs_of({2, 4, 2, 3, 11, 24, 40}, dtype, dtype);
    const cpu::AttentionOptions options{.scale = 0.3f};
    const auto plain = bits_of(cpu::attention(q, k, v, options));
    for (const auto& view : views_of(q)) EXPECT_EQ(bits_of(cpu::attention(view, k, v, options)), plain);
    // Any strides of keys and values, the last axis too.
    for (const auto& view : views_of(k)) EXPECT_EQ(bits_of(cpu::attention(q, view, v, options)), plain);
    for (const auto& view : views_of(v)) EXPECT_EQ(bits_of(cpu::attention(q, k, view, options)), plain);
    // The used part of a cache with room.
    const auto room = [&](const mx::array& a) {
      const auto grown = made(mx::concatenate({a, mx::full({2, 2, 5, a.shape(3)}, NAN, dtype)}, 2));
      return mx::slice(grown, {0, 0, 0, 0}, a.shape());
    };
    EXPECT_EQ(bits_of(cpu::attention(q, room(k), room(v), options)), plain);
    // Heads as a projection gives them.
    const auto heads = [](const mx::array& a) { return mx::swapaxes(made(mx::swapaxes(a, 1, 2)), 1, 2); };
    EXPECT_EQ(bits_of(cpu::attention(heads(q), heads(k), heads(v), options)), plain);
  }
}

/** A token alone gives the same bits as within a prompt, whatever comes after it. */
TEST(Attention, TokensDoNotDependOnTheBatch) {
  for (const auto dtype : float_dtypes()) {
    for (const auto& [heads, kv] : {std::pair{4, 2}, {3, 1}, {2, 2}}) {
      for (const int window : {0, 7}) {
        const int length = 9, keys = 50;
        const auto [q, k, v] = inputs_of({1, heads, kv, length, keys, 40, 24}, dtype, dtype);
        const cpu::AttentionOptions options{.scale = 0.2f, .window = window};
        const auto whole = made(cpu::attention(q, k, v, options));
        for (int from = 0; from < length; ++from) {
          for (const int count : {1, 2, 5}) {
            const int to = std::min(length, from + count), seen = keys - length + to;
            const auto some =
                cpu::attention(mx::slice(q, {0, 0, from, 0}, {1, heads, to, 40}), mx::slice(k, {0, 0, 0, 0}, {1, kv, seen, 40}),
                               mx::slice(v, {0, 0, 0, 0}, {1, kv, seen, 24}), options);
            ASSERT_EQ(bits_of(some), bits_of(mx::slice(whole, {0, from, 0, 0}, {1, to, heads, 24})))
                << from << " " << count << " " << window;
          }
        }
      }
    }
  }
}

TEST(Attention, LargeScoresChooseOneKey) {
  const auto q = mx::full({1, 1, 1, 16}, 100.f), k = random(1, {1, 1, 30, 16}, mx::float32, 100.f), v = random(2, {1, 1, 30, 8});
  EXPECT_TRUE(near(cpu::attention(q, k, v, {}), plain_attention(q, k, v, {}), 1e-5));
}

/** What is not finite shows in the head that reads it. */
TEST(Attention, InfAndNan) {
  const auto [q, k, v] = inputs_of({1, 4, 2, 2, 20, 16, 16}, mx::float32, mx::float32);
  auto values = values_of(v);
  values[(20 + 3) * 16 + 5] = NAN;  // kv head 1, key 3
  const auto bad = from({values.begin(), values.end()}, {1, 2, 20, 16});
  const auto y = values_of(cpu::attention(q, k, bad, {})), clean = values_of(cpu::attention(q, k, v, {}));
  for (int i = 0; i < 2 * 4 * 16; ++i) {
    if (i / 16 % 4 >= 2 && i % 16 == 5)
      EXPECT_TRUE(std::isnan(y[i])) << i;
    else
      EXPECT_EQ(y[i], clean[i]) << i;
  }
  auto keys = values_of(k);
  keys[0] = NAN;
  const auto z = values_of(cpu::attention(q, from({keys.begin(), keys.end()}, {1, 2, 20, 16}), v, {}));
  for (int i = 0; i < 2 * 4 * 16; ++i) EXPECT_EQ(std::isnan(z[i]), i / 16 % 4 < 2) << i;
}

TEST(Attention, WhatDoesNotFitIsRefused) {
  const auto [q, k, v] = inputs_of({2, 4, 2, 3, 11, 24, 40}, mx::float32, mx::float32);
  int number = 0;
  const auto refused = [&](const mx::array& q, const mx::array& k, const mx::array& v) {
    EXPECT_THROW(cpu::attention(q, k, v, {}), Error) << "case " << number;
    ++number;
  };
  refused(q, mx::slice(k, {0, 0, 0, 0}, {2, 2, 2, 24}), mx::slice(v, {0, 0, 0, 0}, {2, 2, 2, 40}));  // fewer keys than queries
  refused(mx::slice(q, {0, 0, 0, 0}, {2, 3, 3, 24}), k, v);                                          // 3 heads over 2
  refused(part(q, 0, 1), k, v);
  refused(q, part(k, 0, 1), v);
  refused(q, k, part(v, 0, 1));
  refused(q, k, mx::slice(v, {0, 0, 0, 0}, {2, 2, 10, 40}));
  refused(q, k, mx::slice(v, {0, 0, 0, 0}, {2, 1, 11, 40}));
  refused(q, mx::slice(k, {0, 0, 0, 0}, {2, 2, 11, 20}), v);
  refused(q, mx::slice(k, {0, 0, 0, 0}, {2, 0, 11, 24}), v);
  refused(mx::astype(q, mx::int32), k, v);
  refused(q, mx::astype(k, mx::int32), v);
}

TEST(RowwiseBad, IsRefusedWhereItIsBuilt) {
  const auto ints = mx::zeros({2, 8}, mx::int32);
  EXPECT_THROW(cpu::rms_norm(ints, std::nullopt, 1e-5f, false), Error);
  EXPECT_THROW(cpu::rms_norm(random(1, {2, 8}), random(1, {9}), 1e-5f, false), Error);
  EXPECT_THROW(cpu::rms_norm(random(1, {2, 8}), random(1, {7}), 1e-5f, false), Error);
  EXPECT_THROW(cpu::rms_norm(random(1, {2, 8}), mx::zeros({8}, mx::int32), 1e-5f, false), Error);
  EXPECT_THROW(cpu::activate(ints, cpu::GluAct::silu), Error);
  EXPECT_THROW(cpu::glu(ints, cpu::GluAct::silu), Error);
  EXPECT_THROW(cpu::glu(random(1, {2, 7}), cpu::GluAct::silu), Error);
  EXPECT_THROW(cpu::rope_heads(mx::zeros({1, 1, 1, 8}, mx::int32), frequencies_of(4), 0, false, 1.f), Error);
}

}  // namespace
}  // namespace mlxlm::tests
