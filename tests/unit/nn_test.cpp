// Linear maps, routers, convolutions and the scan: against recorded answers, plain doubles, and themselves in pieces.
#include <filesystem>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "kernels_cpu_support.h"
#include "nn/nn.h"

namespace mlxlm::tests {
namespace {

// ---- routers -------------------------------------------------------------------------------------------------------

arch::Route route_named(const std::string& name) {
  return name == "softmax" ? arch::Route::softmax : name == "sigmoid" ? arch::Route::sigmoid : arch::Route::softmax_after_topk;
}

TEST(Route, AsTheReference) {
  const auto cases = read_json_file(std::filesystem::path(MLXLM_TEST_DATA) / "nn" / "route.json");
  ASSERT_GT(cases.size(), 30u);
  for (std::size_t number = 0; number < cases.size(); ++number) {
    SCOPED_TRACE("case " + std::to_string(number));
    const auto& c = cases[number];
    const auto rows = c.at("logits").get<std::vector<std::vector<float>>>();
    const int tokens = static_cast<int>(rows.size()), experts = static_cast<int>(rows[0].size());
    std::vector<float> flat;
    for (const auto& row : rows) flat.insert(flat.end(), row.begin(), row.end());
    arch::Moe spec;
    spec.experts = experts;
    spec.route = route_named(c.at("route"));
    spec.top_k = c.at("top_k");
    spec.renormalize = c.at("renormalize");
    spec.renormalize_eps = c.at("eps");
    spec.scale = c.at("scale");
    spec.groups = c.at("groups");
    spec.groups_kept = c.at("groups_kept");
    std::optional<mx::array> bias;
    if (!c.at("bias").is_null()) bias = from(c.at("bias").get<std::vector<float>>(), {experts});
    const auto chosen = nn::route(from(flat, {tokens, experts}), spec, bias);
    ASSERT_EQ(chosen.size(), 2u);
    ASSERT_EQ(chosen[0].shape(), (mx::Shape{tokens, spec.top_k}));
    ASSERT_EQ(chosen[1].shape(), chosen[0].shape());
    EXPECT_EQ(chosen[1].dtype(), mx::float32);
    const auto indices = values_of(chosen[0]), weights = values_of(chosen[1]);
    for (int t = 0; t < tokens; ++t) {
      std::vector<std::pair<int, double>> got;  // in any order
      for (int i = t * spec.top_k; i < (t + 1) * spec.top_k; ++i) got.emplace_back(static_cast<int>(indices[i]), weights[i]);
      std::ranges::sort(got);
      for (int j = 0; j < spec.top_k; ++j) {
        EXPECT_EQ(got[j].first, c.at("indices")[t][j].get<int>()) << "token " << t;
        EXPECT_NEAR(got[j].second, c.at("weights")[t][j].get<double>(), 1e-6) << "token " << t;
      }
    }
  }
}

TEST(Route, NarrowLogitsAreWeighedInF32) {
  arch::Moe spec;
  spec.experts = 8;
  spec.top_k = 3;
  for (const auto dtype : float_dtypes()) {
    const auto logits = random(1, {4, 8}, dtype);
    const auto narrow = nn::route(logits, spec, std::nullopt), wide = nn::route(mx::astype(logits, mx::float32), spec, std::nullopt);
    EXPECT_EQ(bits_of(narrow[0]), bits_of(wide[0]));
    EXPECT_EQ(bits_of(narrow[1]), bits_of(wide[1]));
  }
}

// ---- linear maps ---------------------------------------------------------------------------------------------------

nn::Linear::Weights dense(uint32_t seed, mx::Shape shape, mx::Dtype dtype = mx::float32, bool bias = false) {
  nn::Linear::Weights w{.weight = random(seed, shape, dtype, 0.2f)};
  if (bias) w.bias = random(seed + 1, {shape[shape.size() - 2]}, dtype);
  return w;
}

nn::Linear::Weights quantized(uint32_t seed, mx::Shape shape, const plan::Quant& quant, bool bias = false) {
  const auto parts = mx::quantize(random(seed, shape, mx::float32, 0.2f), quant.group_size, quant.bits, quant.mode);
  nn::Linear::Weights w{.weight = made(parts[0]), .scales = made(parts[1])};
  if (parts.size() > 2) w.biases = made(parts[2]);
  w.quant = quant;
  if (bias) w.bias = random(seed + 1, {shape[shape.size() - 2]});
  return w;
}

const std::vector<plan::Quant>& quants() {
  static const std::vector<plan::Quant> all{{"affine", 4, 32}, {"affine", 8, 64}, {"affine", 3, 128},
                                            {"mxfp4", 4, 32},  {"mxfp8", 8, 32},  {"nvfp4", 4, 16}};
  return all;
}

/** MLX's own matmul, in float32. */
mx::array plain(const mx::array& x, const nn::Linear::Weights& w) {
  const auto input = mx::astype(x, mx::float32);
  auto weight = mx::astype(w.weight, mx::float32);
  if (w.quant) {
    weight = mx::dequantize(w.weight, *w.scales, w.biases, w.quant->group_size, w.quant->bits, w.quant->mode, std::nullopt, mx::float32);
  }
  const auto y = mx::matmul(input, mx::swapaxes(weight, -1, -2));
  return w.bias ? mx::add(y, mx::astype(*w.bias, mx::float32)) : y;
}

TEST(Linear, OnePart) {
  const auto x = random(1, {2, 3, 128});
  for (const bool bias : {false, true}) {
    const auto d = dense(2, {20, 128}, mx::float32, bias);
    EXPECT_TRUE(near(nn::Linear({d})(x), values_of(plain(x, d)), 1e-5));
    for (const auto& quant : quants()) {
      const auto q = quantized(2, {20, 128}, quant, bias);
      const nn::Linear map({q});
      EXPECT_EQ(map.out_dims(), 20);
      EXPECT_GT(map.bytes(), 0);
      EXPECT_TRUE(near(map(x), values_of(plain(x, q)), 2e-5)) << quant.mode << quant.bits;
    }
  }
}

/** Parts of one kind become one matrix, parts of several kinds stay apart: the result is theirs, one beside the other. */
TEST(Linear, SeveralParts) {
  const plan::Quant four{"affine", 4, 32}, eight{"affine", 8, 32}, wide{"affine", 4, 64};
  const std::vector<std::vector<nn::Linear::Weights>> lists{
      {dense(1, {20, 64}), dense(2, {4, 64}), dense(3, {9, 64})},
      {dense(1, {20, 64}, mx::float32, true), dense(2, {4, 64}, mx::float32, true)},
      {dense(1, {20, 64}, mx::float32, true), dense(2, {4, 64})},  // one without a bias
      {dense(1, {20, 64}, mx::float16), dense(2, {4, 64}, mx::bfloat16)},
      {quantized(1, {20, 64}, four), quantized(2, {5, 64}, four), quantized(3, {5, 64}, four)},
      {quantized(1, {20, 64}, four, true), quantized(2, {5, 64}, four, true)},
      {quantized(1, {20, 64}, four), quantized(2, {5, 64}, eight)},
      {quantized(1, {20, 64}, four), quantized(2, {5, 64}, wide), dense(3, {7, 64})},
      {quantized(1, {20, 64}, {"mxfp4", 4, 32}), quantized(2, {5, 64}, {"mxfp8", 8, 32}, true)},
  };
  for (std::size_t i = 0; i < lists.size(); ++i) {
    for (const auto dtype : float_dtypes()) {
      const auto x = random(5, {3, 64}, dtype);
      std::vector<mx::array> separate, wanted;
      for (const auto& part : lists[i]) {
        separate.push_back(nn::Linear({part})(x));
        wanted.push_back(plain(x, part));
      }
      const auto y = nn::Linear(lists[i])(x);
      EXPECT_EQ(y.dtype(), dtype);
      EXPECT_EQ(bits_of(y), bits_of(mx::concatenate(separate, -1))) << "list " << i;
      EXPECT_TRUE(near(y, values_of(mx::concatenate(wanted, -1)), dtype == mx::float32 ? 1e-5 : 2e-3)) << "list " << i;
    }
  }
  EXPECT_THROW(nn::Linear({}), Error);
}

TEST(Linear, Experts) {
  const plan::Quant four{"affine", 4, 32};
  const int chosen[] = {2, 0, 1, 1, 0, 2};
  const auto indices = mx::array(chosen, {3, 2}, mx::int32);
  const std::vector<std::vector<nn::Linear::Weights>> lists{{dense(1, {3, 20, 64})},
                                                            {quantized(1, {3, 20, 64}, four)},
                                                            {quantized(1, {3, 20, 64}, four), quantized(2, {3, 6, 64}, four)},
                                                            {quantized(1, {3, 20, 64}, four), dense(2, {3, 6, 64})}};
  for (const auto& list : lists) {
    const nn::Linear map(list);
    for (const bool own : {false, true}) {
      const auto x = own ? random(3, {3, 2, 64}) : random(3, {3, 64});
      const auto y = map.gather(x, indices, own);
      ASSERT_EQ(y.shape(), (mx::Shape{3, 2, map.out_dims()}));
      for (int i = 0; i < 6; ++i) {
        const auto row =
            mx::reshape(own ? mx::slice(x, {i / 2, i % 2, 0}, {i / 2 + 1, i % 2 + 1, 64}) : part(x, i / 2, i / 2 + 1), {1, 64});
        std::vector<mx::array> wanted;
        for (auto one : list) {
          one.weight = mx::squeeze(part(one.weight, chosen[i], chosen[i] + 1), 0);
          if (one.scales) one.scales = mx::squeeze(part(*one.scales, chosen[i], chosen[i] + 1), 0);
          if (one.biases) one.biases = mx::squeeze(part(*one.biases, chosen[i], chosen[i] + 1), 0);
          wanted.push_back(plain(row, one));
        }
        const auto got = mx::slice(y, {i / 2, i % 2, 0}, {i / 2 + 1, i % 2 + 1, map.out_dims()});
        EXPECT_TRUE(near(got, values_of(mx::concatenate(wanted, -1)), 1e-5)) << i;
      }
    }
  }
}

TEST(Linear, AsAnEmbedding) {
  const int tokens[] = {3, 0, 19, 3};
  const auto ids = mx::array(tokens, {2, 2}, mx::int32);
  for (const auto& quant : quants()) {
    const auto q = quantized(4, {20, 128}, quant);
    const auto table = mx::dequantize(q.weight, *q.scales, q.biases, quant.group_size, quant.bits, quant.mode, std::nullopt, mx::float32);
    for (const auto dtype : float_dtypes()) {
      const auto rows = nn::Linear({q}).embed(ids, dtype);
      EXPECT_EQ(rows.dtype(), dtype);
      EXPECT_EQ(rows.shape(), (mx::Shape{2, 2, 128}));
      EXPECT_TRUE(near(rows, values_of(mx::take(table, ids, 0)), 1e-7)) << quant.mode;
    }
  }
}

TEST(HeadMaps, BothWays) {
  const auto x = random(1, {2, 3, 4, 16}), z = random(2, {2, 3, 4, 8});
  const auto w = dense(3, {3, 8, 16});
  const nn::HeadMaps maps(w, mx::float32);
  EXPECT_TRUE(near(maps(x, true), values_of(mx::matmul(x, mx::swapaxes(w.weight, -1, -2))), 1e-6));
  EXPECT_TRUE(near(maps(z, false), values_of(mx::matmul(z, w.weight)), 1e-6));
  const nn::HeadMaps shared(dense(3, {3, 8, 16}), mx::float32);
  EXPECT_EQ(shared(random(4, {2, 1, 4, 8}), false).shape(), (mx::Shape{2, 3, 4, 16}));
  const auto q = quantized(5, {3, 8, 32}, {"affine", 4, 32});
  const auto y = random(6, {1, 3, 2, 32});
  EXPECT_TRUE(near(nn::HeadMaps(q, mx::float32)(y, true), values_of(plain(y, q)), 1e-5));
}

// ---- norms, activations, rotation, attention -----------------------------------------------------------------------

TEST(Norm, RmsAndLayer) {
  const auto x = random(1, {2, 3, 40}, mx::float32, 2.f), w = random(2, {40}), b = random(3, {40});
  const auto xs = values_of(x), ws = values_of(w), bs = values_of(b);
  std::vector<double> rms, plus, layer;
  for (int row = 0; row < 6; ++row) {
    double sum = 0, squares = 0;
    for (int i = 0; i < 40; ++i) {
      sum += xs[row * 40 + i];
      squares += xs[row * 40 + i] * xs[row * 40 + i];
    }
    const double mean = sum / 40, r = 1 / std::sqrt(squares / 40 + 1e-5), d = 1 / std::sqrt(squares / 40 - mean * mean + 1e-5);
    for (int i = 0; i < 40; ++i) {
      rms.push_back(xs[row * 40 + i] * r * ws[i]);
      plus.push_back(xs[row * 40 + i] * r * (ws[i] + 1));
      layer.push_back((xs[row * 40 + i] - mean) * d * ws[i] + bs[i]);
    }
  }
  arch::Norm spec{.eps = 1e-5f};
  EXPECT_TRUE(near(nn::norm(x, spec, w, std::nullopt), rms, 1e-5));
  spec.plus_one = true;
  EXPECT_TRUE(near(nn::norm(x, spec, w, std::nullopt), plus, 1e-5));
  spec = {.eps = 1e-5f, .kind = arch::NormKind::layer};
  EXPECT_TRUE(near(nn::norm(x, spec, w, b), layer, 1e-5));
}

TEST(Activations, GateTimesUp) {
  const auto x = random(1, {3, 20});
  for (const auto act : {arch::Act::silu, arch::Act::gelu, arch::Act::gelu_tanh, arch::Act::relu2}) {
    const auto gate = mx::slice(x, {0, 0}, {3, 10}), up = mx::slice(x, {0, 10}, {3, 20});
    EXPECT_TRUE(near(nn::glu(x, act), values_of(mx::multiply(nn::activate(gate, act), up)), 1e-6));
  }
}

TEST(RopeHeadsOfNn, NoneOnlyMovesTheHeads) {
  const auto x = random(1, {2, 5, 3, 8});
  EXPECT_EQ(bits_of(nn::rope_heads(x, nullptr, nullptr, 7)), bits_of(mx::transpose(x, {0, 2, 1, 3})));
  arch::Rope rope{.dims = 6, .traditional = true, .input_scale = 1.5f};
  const auto f = std::make_shared<const std::vector<float>>(std::vector<float>{1.f, 0.1f, 0.01f});
  EXPECT_EQ(bits_of(nn::rope_heads(x, &rope, f, 7)), bits_of(cpu::rope_heads(x, f, 7, true, 1.5f)));
}

TEST(AttentionOfNn, HeadsSideBySide) {
  const auto q = random(1, {2, 4, 3, 16}), k = random(2, {2, 2, 9, 16}), v = random(3, {2, 2, 9, 8});
  const auto y = nn::attention(q, k, v, 0.25f, 4, 20.f);
  EXPECT_EQ(y.shape(), (mx::Shape{2, 3, 32}));
  EXPECT_EQ(bits_of(y), bits_of(cpu::attention(q, k, v, {.scale = 0.25f, .window = 4, .softcap = 20.f})));
}

// ---- short convolutions --------------------------------------------------------------------------------------------

mx::array tokens(const mx::array& a, int from, int to) {
  mx::Shape start(a.ndim(), 0), stop = a.shape();
  start[1] = from;
  stop[1] = to;
  return mx::slice(a, start, stop);
}

TEST(ShortConv, AgreesWithDoubles) {
  const int batch = 2, length = 7, channels = 5;
  for (const int taps : {1, 2, 4}) {
    const auto x = random(1, {batch, length, channels}), w = random(2, {channels, taps, 1}), bias = random(3, {channels});
    const auto tail = random(4, {batch, taps - 1, channels});
    for (const bool with_tail : {false, true}) {
      const auto xs = values_of(x), ws = values_of(w), bs = values_of(bias), ts = values_of(tail);
      const auto at = [&](int b, int l, int c) {  // l counts from before the tail
        if (l >= taps - 1) return xs[(b * length + l - (taps - 1)) * channels + c];
        return with_tail ? ts[(b * (taps - 1) + l) * channels + c] : 0.0;
      };
      std::vector<double> wanted, wanted_tail;
      for (int b = 0; b < batch; ++b) {
        for (int l = 0; l < length; ++l) {
          for (int c = 0; c < channels; ++c) {
            double total = bs[c];
            for (int t = 0; t < taps; ++t) total += at(b, l + t, c) * ws[c * taps + t];
            wanted.push_back(total);
          }
        }
        for (int l = length; l < length + taps - 1; ++l) {
          for (int c = 0; c < channels; ++c) wanted_tail.push_back(at(b, l, c));
        }
      }
      const auto y = nn::short_conv(x, with_tail ? std::optional(tail) : std::nullopt, w, bias);
      ASSERT_EQ(y.size(), 2u);
      EXPECT_TRUE(near(y[0], wanted, 1e-5)) << taps;
      EXPECT_EQ(y[1].shape(), (mx::Shape{batch, taps - 1, channels}));
      EXPECT_EQ(values_of(y[1]), wanted_tail) << taps;
    }
  }
}

TEST(ShortConv, InPiecesAsWhole) {
  for (const auto dtype : float_dtypes()) {
    const auto x = random(1, {2, 12, 6}, dtype), w = random(2, {6, 4, 1}, dtype);
    const auto whole = nn::short_conv(x, std::nullopt, w, std::nullopt);
    std::vector<mx::array> ys;
    std::optional<mx::array> tail;
    int at = 0;
    for (const int count : {1, 1, 2, 5, 3}) {
      const auto piece = nn::short_conv(tokens(x, at, at + count), tail, w, std::nullopt);
      ys.push_back(piece[0]);
      tail = piece[1];
      at += count;
    }
    EXPECT_EQ(bits_of(mx::concatenate(ys, 1)), bits_of(whole[0]));
    EXPECT_EQ(bits_of(*tail), bits_of(whole[1]));
  }
}

// ---- Mamba-2 -------------------------------------------------------------------------------------------------------

struct Scan {
  int batch, length, heads, dims, groups, width;
  mx::array x = random(1, {batch, length, heads, dims});
  mx::array a_log = random(2, {heads}, mx::float32, 0.5f);
  mx::array b = random(3, {batch, length, groups, width}), c = random(4, {batch, length, groups, width});
  mx::array d = random(5, {heads}), dt = random(6, {batch, length, heads}), dt_bias = random(7, {heads});
  mx::array state = random(8, {batch, heads, dims, width});
  float dt_min = 0.f, dt_max = 1e30f;

  std::vector<mx::array> run(int from, int to, const std::optional<mx::array>& before) const {
    return nn::ssm_scan(tokens(x, from, to), a_log, tokens(b, from, to), tokens(c, from, to), d, tokens(dt, from, to), dt_bias, before,
                        dt_min, dt_max);
  }
};

struct ScanAnswer {
  std::vector<double> y, state;
};

/** One token after the other. */
ScanAnswer plain_scan(const Scan& s, bool with_state) {
  const auto x = values_of(s.x), a = values_of(s.a_log), b = values_of(s.b), c = values_of(s.c), d = values_of(s.d), dt = values_of(s.dt),
             dt_bias = values_of(s.dt_bias);
  ScanAnswer answer{std::vector<double>(x.size()), values_of(s.state)};
  if (!with_state) answer.state.assign(answer.state.size(), 0.0);
  for (int n = 0; n < s.batch; ++n) {
    for (int l = 0; l < s.length; ++l) {
      for (int h = 0; h < s.heads; ++h) {
        const int64_t token = int64_t(n) * s.length + l, group = token * s.groups + h / (s.heads / s.groups);
        const double step = std::clamp(std::log1p(std::exp(dt[token * s.heads + h] + dt_bias[h])), double(s.dt_min), double(s.dt_max));
        const double decay = std::exp(-std::exp(a[h]) * step);
        for (int p = 0; p < s.dims; ++p) {
          const int64_t at = (token * s.heads + h) * s.dims + p;
          double total = 0;
          for (int w = 0; w < s.width; ++w) {
            double& held = answer.state[((int64_t(n) * s.heads + h) * s.dims + p) * s.width + w];
            held = held * decay + step * x[at] * b[group * s.width + w];
            total += held * c[group * s.width + w];
          }
          answer.y[at] = total + d[h] * x[at];
        }
      }
    }
  }
  return answer;
}

TEST(SsmScan, AgreesWithTheRecurrence) {
  for (const auto& [length, groups] : {std::pair{1, 1}, {2, 2}, {17, 4}, {256, 1}, {257, 2}, {300, 1}}) {
    Scan s{2, length, 4, 3, groups, 5};
    for (const bool limited : {false, true}) {
      if (limited) {
        s.dt_min = 0.4f;
        s.dt_max = 0.9f;
      }
      for (const bool with_state : {false, true}) {
        const auto wanted = plain_scan(s, with_state);
        const auto got = s.run(0, length, with_state ? std::optional(s.state) : std::nullopt);
        ASSERT_EQ(got.size(), 2u);
        EXPECT_TRUE(near(got[0], wanted.y, 1e-4, 1e-4)) << length << " " << groups << " " << with_state;
        EXPECT_TRUE(near(got[1], wanted.state, 1e-4, 1e-4)) << length << " " << groups << " " << with_state;
      }
    }
  }
}

TEST(SsmScan, InPiecesAsWhole) {
  const Scan s{1, 290, 4, 3, 2, 5};
  const auto whole = s.run(0, 290, std::nullopt);
  for (const auto& pieces : {std::vector<int>{1, 1, 1, 287}, {256, 34}, {257, 33}, {100, 100, 90}}) {
    std::vector<mx::array> ys;
    std::optional<mx::array> state;
    int at = 0;
    for (const int count : pieces) {
      const auto piece = s.run(at, at + count, state);
      ys.push_back(piece[0]);
      state = piece[1];
      at += count;
    }
    EXPECT_TRUE(near(mx::concatenate(ys, 1), values_of(whole[0]), 1e-4, 1e-4));
    EXPECT_TRUE(near(*state, values_of(whole[1]), 1e-4, 1e-4));
  }
}

/** Long decays underflow to zero; they must not become NaN. */
TEST(SsmScan, StrongDecayStaysFinite) {
  Scan s{1, 300, 4, 3, 1, 5};
  s.a_log = mx::full({4}, 4.f);
  s.dt = mx::full({1, 300, 4}, 20.f);
  const auto got = s.run(0, 300, s.state);
  const auto wanted = plain_scan(s, true);
  EXPECT_TRUE(near(got[0], wanted.y, 1e-4, 1e-4));
  EXPECT_TRUE(near(got[1], wanted.state, 1e-4, 1e-4));
}

TEST(SsmScan, NarrowActivations) {
  for (const auto dtype : {mx::float16, mx::bfloat16}) {
    Scan s{1, 20, 4, 3, 2, 5};
    for (auto* a : {&s.x, &s.b, &s.c, &s.dt}) *a = made(mx::astype(*a, dtype));
    s.dt_bias = made(mx::astype(s.dt_bias, dtype));
    s.d = made(mx::astype(s.d, dtype));
    const auto wanted = plain_scan(s, false);
    const auto got = s.run(0, 20, std::nullopt);
    const double allowed = dtype == mx::float16 ? 0.03 : 0.25;
    EXPECT_TRUE(near(got[0], wanted.y, allowed, allowed)) << name_of(dtype);
  }
}

// ---- gated delta rule ----------------------------------------------------------------------------------------------

TEST(GatedDelta, KernelAndOperationsAgree) {
  for (const auto& [length, groups, width] : {std::array{1, 1, 7}, {9, 2, 64}, {5, 4, 40}}) {
    constexpr int batch = 2, heads = 4, dims = 35;
    for (const auto dtype : {mx::float32, mx::float16}) {
      const auto small = [&](int seed) {
        return mx::astype(mx::multiply(random(seed, {batch, length, groups, width}), mx::array(0.1f)), dtype);
      };
      const auto q = small(1), k = small(2), v = mx::astype(random(3, {batch, length, heads, dims}), dtype);
      const auto decay = mx::sigmoid(random(4, {batch, length, heads})), beta = mx::sigmoid(random(5, {batch, length, heads}));
      const auto state = random(6, {batch, heads, dims, width}, mx::float32);
      for (const bool with_state : {false, true}) {
        const auto before = with_state ? std::optional(state) : std::nullopt;
        const auto got = nn::gated_delta(q, k, v, decay, beta, before), wanted = nn::gated_delta_by_ops(q, k, v, decay, beta, before);
        EXPECT_EQ(got[0].dtype(), dtype);
        EXPECT_EQ(got[1].dtype(), mx::float32);
        EXPECT_TRUE(near(got[0], values_of(wanted[0]), dtype == mx::float32 ? 1e-5 : 2e-3, 1e-3));
        EXPECT_TRUE(near(got[1], values_of(wanted[1]), 1e-5, 1e-4));
      }
    }
  }
}

}  // namespace
}  // namespace mlxlm::tests
