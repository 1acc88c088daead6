// State space scans, latent attention and quantized rows: against plain doubles, and the same bits however tokens are cut.
#include <array>

#include "kernels/cpu/eager.h"
#include "kernels/cpu/latent_attention.h"
#include "kernels_cpu_support.h"

namespace mlxlm::tests {
namespace {

struct ScanCase {
  int tokens, dims, width;
  bool from;
};

class Scan : public testing::TestWithParam<ScanCase> {
 protected:
  void SetUp() override {
    const auto& p = GetParam();
    x_ = noise(1, int64_t(p.tokens) * p.dims);
    b_ = noise(2, int64_t(p.tokens) * p.width);
    c_ = noise(3, int64_t(p.tokens) * p.width);
    for (int t = 0; t < p.tokens; ++t) {
      step_.push_back(0.1f + 0.01f * float(t % 7));
      decay_.push_back(0.95f - 0.1f * float(t % 3));
    }
    from_ = noise(4, int64_t(p.dims) * p.width);
  }

  /** In calls of at most `most` tokens. */
  std::pair<std::vector<float>, std::vector<float>> run(int most) const {
    const auto& p = GetParam();
    std::vector<float> y(x_.size(), -1.f), state(int64_t(p.dims) * p.width, -1.f);
    cpu::ScanHead s;
    s.x_stride = s.y_stride = p.dims;
    s.bc_stride = p.width;
    s.step_stride = 1;
    s.from = p.from ? from_.data() : nullptr;
    s.state = state.data();
    s.skip = 0.3f;
    s.dims = p.dims;
    s.width = p.width;
    for (int at = 0; at < p.tokens; at += most) {
      s.tokens = std::min(most, p.tokens - at);
      s.x = x_.data() + int64_t(at) * p.dims;
      s.b = b_.data() + int64_t(at) * p.width;
      s.c = c_.data() + int64_t(at) * p.width;
      s.step = step_.data() + at;
      s.decay = decay_.data() + at;
      s.y = y.data() + int64_t(at) * p.dims;
      cpu::isa().scan(s);
      s.from = s.state;
    }
    return {y, state};
  }

  std::vector<float> x_, b_, c_, step_, decay_, from_;
};

TEST_P(Scan, IsTheRecurrence) {
  const auto& p = GetParam();
  const auto [y, state] = run(p.tokens);
  for (int d = 0; d < p.dims; ++d) {
    std::vector<double> held(p.width, 0.);
    for (int n = 0; n < p.width && p.from; ++n) held[n] = from_[int64_t(d) * p.width + n];
    for (int t = 0; t < p.tokens; ++t) {
      const double x = x_[int64_t(t) * p.dims + d];
      double seen = 0.3 * x;
      for (int n = 0; n < p.width; ++n) {
        held[n] = held[n] * decay_[t] + double(step_[t]) * x * b_[int64_t(t) * p.width + n];
        seen += held[n] * c_[int64_t(t) * p.width + n];
      }
      EXPECT_NEAR(y[int64_t(t) * p.dims + d], seen, 2e-5 * (1 + std::abs(seen))) << "token " << t << " row " << d;
    }
    for (int n = 0; n < p.width; ++n) EXPECT_NEAR(state[int64_t(d) * p.width + n], held[n], 1e-5) << "column " << n;
  }
}

TEST_P(Scan, GivesTheSameBitsInPieces) {
  const auto whole = run(GetParam().tokens);
  for (const int most : {1, 2, 16}) EXPECT_EQ(run(most), whole) << "pieces of " << most;
}

INSTANTIATE_TEST_SUITE_P(Shapes, Scan,
                         testing::Values(ScanCase{1, 64, 128, true}, ScanCase{37, 5, 16, false}, ScanCase{19, 3, 7, true},
                                         ScanCase{21, 4, 219, true}, ScanCase{1, 1, 1, false}));

TEST(Convolve, IsTheSumOfItsTaps) {
  constexpr int channels = 37, taps = 4;
  const auto rows = noise(1, taps * channels), weight = noise(2, taps * channels), bias = noise(3, channels);
  std::array<const float*, taps> at{};
  for (int t = 0; t < taps; ++t) at[t] = rows.data() + t * channels;
  std::vector<float> out(channels, 7.f);
  cpu::isa().convolve(at.data(), weight.data(), bias.data(), taps, 2, 36, channels, out.data());
  for (int c = 0; c < channels; ++c) {
    double wanted = bias[c];
    for (int t = 0; t < taps; ++t) wanted += double(rows[t * channels + c]) * weight[t * channels + c];
    EXPECT_NEAR(out[c], c < 2 || c >= 36 ? 7. : wanted, 1e-5) << c;
  }
}

struct DeltaCase {
  int tokens, dims, width;
  bool from;
};

class Delta : public testing::TestWithParam<DeltaCase> {
 protected:
  void SetUp() override {
    const auto& p = GetParam();
    const float unit = 1.f / std::sqrt(float(p.width));
    q_ = noise(1, int64_t(p.tokens) * p.width, unit);
    k_ = noise(2, int64_t(p.tokens) * p.width, unit);
    v_ = noise(3, int64_t(p.tokens) * p.dims);
    for (int t = 0; t < p.tokens; ++t) {
      decay_.push_back(0.97f - 0.2f * float(t % 3));
      beta_.push_back(0.1f + 0.1f * float(t % 8));
    }
    from_ = noise(4, int64_t(p.dims) * p.width);
  }

  /** In calls of at most `most` tokens and `rows` rows. */
  std::pair<std::vector<float>, std::vector<float>> run(int most, int rows) const {
    const auto& p = GetParam();
    std::vector<float> y(v_.size(), -1.f), state(int64_t(p.dims) * p.width, -1.f);
    for (int row = 0; row < p.dims; row += rows) {
      cpu::DeltaHead s;
      s.qk_stride = s.width = p.width;
      s.v_stride = s.y_stride = p.dims;
      s.step_stride = 1;
      s.dims = std::min(rows, p.dims - row);
      s.state = state.data() + int64_t(row) * p.width;
      s.from = p.from ? from_.data() + int64_t(row) * p.width : nullptr;
      for (int at = 0; at < p.tokens; at += most) {
        s.tokens = std::min(most, p.tokens - at);
        s.q = q_.data() + int64_t(at) * p.width;
        s.k = k_.data() + int64_t(at) * p.width;
        s.v = v_.data() + int64_t(at) * p.dims + row;
        s.y = y.data() + int64_t(at) * p.dims + row;
        s.decay = decay_.data() + at;
        s.beta = beta_.data() + at;
        cpu::isa().delta(s);
        s.from = s.state;
      }
    }
    return {y, state};
  }

  std::vector<float> q_, k_, v_, decay_, beta_, from_;
};

TEST_P(Delta, IsTheRecurrence) {
  const auto& p = GetParam();
  const auto [y, state] = run(p.tokens, p.dims);
  for (int d = 0; d < p.dims; ++d) {
    std::vector<double> held(p.width, 0.);
    for (int n = 0; n < p.width && p.from; ++n) held[n] = from_[int64_t(d) * p.width + n];
    for (int t = 0; t < p.tokens; ++t) {
      const int64_t at = int64_t(t) * p.width;
      double seen = 0, answer = 0;
      for (int n = 0; n < p.width; ++n) {
        held[n] *= decay_[t];
        seen += held[n] * k_[at + n];
      }
      const double add = (v_[int64_t(t) * p.dims + d] - seen) * beta_[t];
      for (int n = 0; n < p.width; ++n) {
        held[n] += k_[at + n] * add;
        answer += held[n] * q_[at + n];
      }
      EXPECT_NEAR(y[int64_t(t) * p.dims + d], answer, 1e-5) << "token " << t << " row " << d;
    }
    for (int n = 0; n < p.width; ++n) EXPECT_NEAR(state[int64_t(d) * p.width + n], held[n], 1e-5) << "column " << n;
  }
}

TEST_P(Delta, GivesTheSameBitsInPieces) {
  const auto whole = run(GetParam().tokens, GetParam().dims);
  for (const int most : {1, 2, 16}) {
    for (const int rows : {1, 4}) EXPECT_EQ(run(most, rows), whole) << "pieces of " << most << " tokens, " << rows << " rows";
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Delta,
                         testing::Values(DeltaCase{1, 64, 128, true}, DeltaCase{37, 5, 16, false}, DeltaCase{19, 3, 7, true},
                                         DeltaCase{21, 9, 100, true}, DeltaCase{9, 4, 64, false}, DeltaCase{9, 6, 96, true},
                                         DeltaCase{33, 5, 192, true}, DeltaCase{8, 3, 256, false}, DeltaCase{1, 1, 1, false}));

TEST(Gates, MultiplyRows) {
  for (const int count : {1, 15, 16, 37}) {
    const auto gate = noise(1, count, 30.f), x = noise(2, count);
    std::vector<float> out(count), open(count), product(count);
    cpu::isa().sigmoid_mul(gate.data(), x.data(), out.data(), count);
    cpu::isa().sigmoid_mul(gate.data(), nullptr, open.data(), count);
    cpu::isa().multiply(gate.data(), x.data(), product.data(), count);
    for (int i = 0; i < count; ++i) {
      const double wanted = 1 / (1 + std::exp(-double(gate[i])));
      EXPECT_NEAR(open[i], wanted, 1e-6);
      EXPECT_NEAR(out[i], wanted * x[i], 1e-6);
      EXPECT_EQ(product[i], gate[i] * x[i]);
    }
  }
}

struct Latent {
  static constexpr int heads = 3, latent = 40, more = 12, keys = 1200;
  std::vector<float> q, k = noise(5, keys* latent), r = noise(6, keys* more);

  explicit Latent(int tokens) : q(noise(7, int64_t(tokens) * heads * (latent + more))) {}
  cpu::LatentAttention call(int first, int count, int visible, int window, std::vector<float>& out) const {
    return {q.data() + int64_t(first) * heads * (latent + more),
            out.data() + int64_t(first) * heads * latent,
            count,
            k.data(),
            r.data(),
            visible,
            window,
            {}};
  }
  double value(int row, int visible, int window, int dim) const {
    const float* query = q.data() + int64_t(row) * (latent + more);
    double total = 0, sum = 0;
    for (int j = window > 0 ? std::max(0, visible - window) : 0; j < visible; ++j) {
      double score = 0;
      for (int i = 0; i < latent; ++i) score += double(query[i]) * k[j * latent + i];
      for (int i = 0; i < more; ++i) score += double(query[latent + i]) * r[j * more + i];
      const double weight = std::exp(score * 0.2);
      total += weight;
      sum += weight * k[j * latent + dim];
    }
    return sum / total;
  }
};
constexpr cpu::LatentShape latent_shape{Latent::heads, Latent::latent, Latent::more, 0.2f, cpu::Storage::f32};

TEST(LatentAttention, IsAttentionOverBothParts) {
  for (const auto& [tokens, visible, window] :
       std::vector<std::array<int, 3>>{{1, 1, 0}, {1, 1200, 0}, {1, 1200, 70}, {60, 900, 0}, {5, 3, 0}, {50, 600, 65}}) {
    SCOPED_TRACE(testing::Message() << tokens << " tokens, " << visible << " keys, window " << window);
    const Latent l(tokens);
    std::vector<float> out(int64_t(tokens) * Latent::heads * Latent::latent);
    cpu::eager_latent_attention({l.call(0, tokens, visible, window, out)}, latent_shape);
    for (const int row : {0, tokens * Latent::heads - 1}) {
      for (const int dim : {0, 39})
        EXPECT_NEAR(out[int64_t(row) * Latent::latent + dim], l.value(row, visible + row / Latent::heads, window, dim), 1e-5);
    }
  }
}

TEST(LatentAttention, GivesTheSameBitsInPiecesAndBatches) {
  constexpr int tokens = 90;
  const Latent l(tokens);
  for (const int window : {0, 100}) {
    std::vector<float> whole(int64_t(tokens) * Latent::heads * Latent::latent), pieces = whole, batch = whole;
    cpu::eager_latent_attention({l.call(0, tokens, 1000, window, whole)}, latent_shape);
    std::vector<cpu::LatentAttention> together;
    for (int at = 0; at < tokens; at += 7) {
      const int count = std::min(7, tokens - at);
      cpu::eager_latent_attention({l.call(at, count, 1000 + at, window, pieces)}, latent_shape);
      together.push_back(l.call(at, count, 1000 + at, window, batch));
    }
    cpu::eager_latent_attention(together, latent_shape);
    EXPECT_EQ(pieces, whole);
    EXPECT_EQ(batch, whole);
  }
}

TEST(LatentAttention, ReadsSharedRowsFirst) {
  const Latent l(2);
  std::vector<float> whole(2 * Latent::heads * Latent::latent), cut = whole;
  auto call = l.call(0, 2, 1000, 0, whole);
  cpu::eager_latent_attention({call}, latent_shape);
  call.out = cut.data();
  call.shared = {{l.k.data(), l.r.data(), 64}, {l.k.data() + 64 * Latent::latent, l.r.data() + 64 * Latent::more, 128}};
  call.latent = l.k.data() + 192 * Latent::latent;
  call.more = l.r.data() + 192 * Latent::more;
  cpu::eager_latent_attention({call}, latent_shape);
  EXPECT_EQ(cut, whole);
}

TEST(QuantizeRow, IsMlxsQuantize) {
  for (const auto dtype : {mx::float32, mx::bfloat16}) {
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      for (const int group : {32, 64, 128}) {
        SCOPED_TRACE(testing::Message() << name_of(dtype) << ", " << bits << " bits, groups of " << group);
        constexpr int rows = 5, dims = 256;
        auto values = noise(8, rows * dims, 3.f);
        for (int i = 0; i < dims; ++i) values[i] = 0.f;            // a row of zeros
        for (int i = dims; i < 2 * dims; ++i) values[i] = -1.25f;  // and of one number
        const auto x = from(values, {rows, dims}, dtype);
        const auto wanted = mx::quantize(x, group, bits);
        const auto scales = values_of(wanted[1]), biases = values_of(wanted[2]);
        const auto packed = made(wanted[0]);
        const auto exact = values_of(x);
        const auto storage = dtype == mx::float32 ? cpu::Storage::f32 : cpu::Storage::bf16;
        for (int r = 0; r < rows; ++r) {
          std::vector<float> row(exact.begin() + r * dims, exact.begin() + (r + 1) * dims);
          std::vector<uint8_t> bytes(dims * bits / 8);
          std::vector<float> s(dims / group), b(dims / group);
          std::vector<uint8_t> s_raw(4 * s.size()), b_raw(4 * b.size());
          cpu::quantize_row(row.data(), dims, bits, group, storage, bytes.data(), s_raw.data(), b_raw.data());
          cpu::isa().load(s_raw.data(), storage, s.data(), static_cast<int64_t>(s.size()));
          cpu::isa().load(b_raw.data(), storage, b.data(), static_cast<int64_t>(b.size()));
          EXPECT_EQ(std::memcmp(bytes.data(), packed.data<uint8_t>() + r * bytes.size(), bytes.size()), 0) << "row " << r;
          for (std::size_t g = 0; g < s.size(); ++g) {
            EXPECT_EQ(s[g], scales[r * s.size() + g]);
            EXPECT_EQ(b[g], biases[r * s.size() + g]);
          }
        }
      }
    }
  }
}

TEST(QuantizeRow, TakesWhatIsNoNumber) {
  std::vector<float> row(32, std::numeric_limits<float>::quiet_NaN()), s(1), b(1);
  row[3] = std::numeric_limits<float>::infinity();
  std::vector<uint8_t> bytes(34, 0xAB);
  cpu::quantize_row(row.data(), 32, 8, 32, cpu::Storage::f32, bytes.data() + 1, s.data(), b.data());
  EXPECT_EQ(bytes.front(), 0xAB);
  EXPECT_EQ(bytes.back(), 0xAB);
}

}  // namespace
}  // namespace mlxlm::tests
