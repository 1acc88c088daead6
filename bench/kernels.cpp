// Kernel benchmarks: read bandwidth of this machine, matrix products at the shapes of a model's layers, and attention. Weights are rotated
// past the caches. Run by ./dev bench kernels; --benchmark_format=json for scripts.
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>
#include <mlx/ops.h>

#include "base/thread_pool.h"
#include "kernels/cpu/eager.h"
#include "kernels/cpu/latent_attention.h"

namespace mlxlm {
namespace {

namespace cpu = kernels::cpu;
namespace mx = mlx::core;

/** All threads read a buffer of so many MB once. */
void read_bandwidth(benchmark::State& state) {
  const int64_t words = state.range(0) * (1 << 20) / 8;
  const auto data = std::make_unique<int64_t[]>(words);
  std::iota(data.get(), data.get() + words, 0);
  auto& pool = compute_pool();
  for (auto _ : state) {
    pool.parallel_for(64, [&](int chunk, int) {
      int64_t sums[8] = {};
      for (int64_t i = words * chunk / 64; i + 8 <= words * (chunk + 1) / 64; i += 8) {
        for (int l = 0; l < 8; ++l) sums[l] += data[i + l];
      }
      benchmark::DoNotOptimize(sums);
    });
  }
  state.SetBytesProcessed(state.iterations() * words * 8);
}
BENCHMARK(read_bandwidth)->Arg(96)->Arg(1024)->UseRealTime()->Unit(benchmark::kMicrosecond);

/** Any bits will do: a product's time does not depend on the values. */
cpu::PackedMatrixPtr some_matrix(int rows, int k, int bits, int group) {
  if (bits == 16) {
    const std::vector<uint16_t> w(int64_t(rows) * k, 0x2E66);
    return cpu::pack_dense({mx::array(reinterpret_cast<const mx::float16_t*>(w.data()), {rows, k})});
  }
  const bool small_floats = group == 16 || group == 33;
  std::vector<uint32_t> words(int64_t(rows) * k * bits / 32);
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(i * 2654435761u);
  if (small_floats) {  // mxfp4, mxfp8 or, in groups of 16, nvfp4
    group = group == 33 ? 32 : group;
    const std::vector<uint8_t> bytes(int64_t(rows) * k / group, 120);
    return cpu::pack_float({mx::array(words.data(), {rows, k * bits / 32})}, {mx::array(bytes.data(), {rows, k / group})},
                           bits == 8     ? "mxfp8"
                           : group == 16 ? "nvfp4"
                                         : "mxfp4",
                           bits, group);
  }
  const std::vector<uint16_t> scales(int64_t(rows) * k / group, 0x2000);
  const mx::Shape shape{rows, k / group};
  const mx::array s(reinterpret_cast<const mx::float16_t*>(scales.data()), shape);
  return cpu::pack_affine({mx::array(words.data(), {rows, k * bits / 32})}, {s}, {s}, bits, group);
}

std::vector<float> some_floats(int64_t count) {
  std::vector<float> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(i % 97) / 97.f - 0.4f;
  return x;
}

/** One thread, 4-bit weights that stay in the second cache: what the inner loop alone can do. m, digits, group. */
void panel(benchmark::State& state) {
  const int m = static_cast<int>(state.range(0)), digits = static_cast<int>(state.range(1)), group = static_cast<int>(state.range(2));
  constexpr int k = 576, rows = 1536;
  const auto w = some_matrix(rows, k, 4, group);
  if (!cpu::isa().uses_digits) return state.SkipWithError("no dot products of bytes here");
  const auto x = some_floats(int64_t(m) * k);
  std::vector<int8_t> d(int64_t(m) * k * digits);
  std::vector<float> steps(int64_t(m) * k / group), sums(steps.size()), out(int64_t(m) * 16);
  for (int64_t i = 0; i < m; ++i) {
    cpu::isa().make_digits(x.data() + i * k, k, group, w->panels.digit_form(), digits, d.data() + i * k * digits,
                           steps.data() + i * k / group, sums.data() + i * k / group);
  }
  cpu::Activations a;
  a.x = x.data();
  a.digits = d.data();
  a.digit_count = digits;
  a.steps = steps.data();
  a.sums = a.digit_sums = sums.data();
  a.k = k;
  a.groups = k / group;
  for (auto _ : state) {
    for (int i = 0; i < w->panel_count(); ++i) cpu::isa().panel(w->panels, w->panel(0, i), a, 0, m, out.data(), 16);
    benchmark::DoNotOptimize(out.data());
  }
  state.SetBytesProcessed(state.iterations() * cpu::packed_bytes(*w));
  state.counters["flops"] = benchmark::Counter(2.0 * rows * k * m, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(panel)->ArgNames({"m", "digits", "group"})->ArgsProduct({{1, 8, 96}, {1, 2}, {32}})->Unit(benchmark::kMicrosecond);

/** rows, k, bits, group, m; bits 16 = dense float16; group 33 = mxfp4 or mxfp8, 16 = nvfp4. */
void product(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0)), k = static_cast<int>(state.range(1)), bits = static_cast<int>(state.range(2));
  const int group = static_cast<int>(state.range(3)), m = static_cast<int>(state.range(4));
  const auto first = some_matrix(rows, k, bits, group);
  const int64_t bytes = cpu::packed_bytes(*first);
  std::vector<cpu::EagerMap> maps;
  const int copies = static_cast<int>(std::max<int64_t>(1, (int64_t(96) << 20) / bytes));
  for (int i = 0; i < copies; ++i) maps.push_back({{{i == 0 ? first : some_matrix(rows, k, bits, group), {}}}, rows});
  const auto x = some_floats(int64_t(m) * k);
  std::vector<float> out(int64_t(m) * rows);
  std::size_t next = 0;
  for (auto _ : state) {
    cpu::eager_map(maps[next], m, [&](int row, float* to) { std::copy_n(x.data() + int64_t(row) * k, k, to); }, false, out.data(), rows);
    next = (next + 1) % maps.size();
  }
  state.SetBytesProcessed(state.iterations() * bytes);
  state.counters["flops"] = benchmark::Counter(2.0 * rows * k * m, benchmark::Counter::kIsIterationInvariantRate);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "k", "bits", "group", "m"});
  for (const int m : {1, 8, 32, 512}) {
    b->Args({960, 576, 4, 32, m})->Args({3072, 576, 4, 32, m})->Args({576, 1536, 4, 32, m});
    for (const int bits : {2, 3, 5, 6}) b->Args({8192, 2048, bits, 64, m});
    b->Args({8192, 2048, 4, 33, m})->Args({8192, 2048, 8, 33, m})->Args({8192, 2048, 4, 16, m});
    b->Args({8192, 2048, 4, 32, m})->Args({8192, 2048, 4, 64, m})->Args({8192, 2048, 8, 32, m})->Args({4096, 2048, 16, 0, m});
  }
}
BENCHMARK(product)->Apply(shapes)->UseRealTime()->Unit(benchmark::kMicrosecond);

/** heads, kv_heads, dims, tokens, keys (with the tokens), over float16 or, with bits, quantized keys and values. */
void attention(benchmark::State& state) {
  const int heads = static_cast<int>(state.range(0)), kv_heads = static_cast<int>(state.range(1)), dims = static_cast<int>(state.range(2));
  const int tokens = static_cast<int>(state.range(3)), keys = static_cast<int>(state.range(4)), bits = static_cast<int>(state.range(5));
  const auto q = some_floats(int64_t(tokens) * heads * dims);
  std::vector<float> out(q.size());
  const std::vector<uint16_t> rows(int64_t(kv_heads) * keys * dims, 0x2E66);
  const cpu::QuantizedSpan span{reinterpret_cast<const uint8_t*>(rows.data()),
                                rows.data(),
                                rows.data(),
                                cpu::Storage::f16,
                                dims * bits / 8,
                                dims / 32,
                                bits,
                                32,
                                dims};
  cpu::EagerAttention s{};
  s.q = q.data();
  s.out = out.data();
  s.q_stride = s.out_stride = int64_t(heads) * dims;
  s.tokens = tokens;
  s.keys = s.values = rows.data();
  s.capacity = keys;
  s.visible = keys - tokens + 1;
  if (bits > 0) s.quantized_keys = s.quantized_values = &span;
  for (auto _ : state) cpu::eager_attention({s}, {heads, kv_heads, dims, dims, 0.1f, 0.f, cpu::Storage::f16});
}
BENCHMARK(attention)
    ->ArgNames({"heads", "kv_heads", "dims", "tokens", "keys", "bits"})
    ->ArgsProduct({{9}, {3}, {64}, {1, 32}, {40, 500, 4000}, {0}})
    ->ArgsProduct({{32}, {8}, {128}, {1, 128}, {500, 4000}, {0, 8}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

/** heads, tokens, keys; the sizes of DeepSeek's latents. */
void latent_attention(benchmark::State& state) {
  const int heads = static_cast<int>(state.range(0)), tokens = static_cast<int>(state.range(1)), keys = static_cast<int>(state.range(2));
  const int latent = 512, more = 64;
  const auto q = some_floats(int64_t(tokens) * heads * (latent + more));
  std::vector<float> out(int64_t(tokens) * heads * latent);
  const std::vector<uint16_t> rows(int64_t(keys) * latent, 0x2E66);
  cpu::LatentAttention s{};
  s.q = q.data();
  s.out = out.data();
  s.tokens = tokens;
  s.latent = s.more = rows.data();
  s.visible = keys - tokens + 1;
  for (auto _ : state) cpu::eager_latent_attention({s}, {heads, latent, more, 0.1f, cpu::Storage::f16});
}
BENCHMARK(latent_attention)
    ->ArgNames({"heads", "tokens", "keys"})
    ->ArgsProduct({{16}, {1, 32}, {40, 500, 4000}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace mlxlm

BENCHMARK_MAIN();
