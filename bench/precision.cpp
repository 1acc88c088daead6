// What the precision of activations (--cpu-precision) does to a model: perplexity on text, divergence from float32, and speed.
// Run: bench_precision MODEL TEXT_FILE... ; one line of JSON a precision.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "api/session.h"
#include "base/error.h"
#include "kernels/cpu/kernels.h"
#include "sample/sample.h"

using namespace mlxlm;
namespace mx = mlx::core;

namespace {

constexpr int chunk_tokens = 512;

std::string read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(Code::not_found, path, "cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Result {
  double negative_log_likelihood = 0, seconds = 0;
  std::vector<mx::array> logprobs{};  // of each chunk, float32 [chunk, V]
};

/** Each chunk stands alone, as a text of its own. */
Result measure(model::CausalModel& model, const std::vector<int>& tokens) {
  Result result;
  for (std::size_t begin = 0; begin + chunk_tokens < tokens.size(); begin += chunk_tokens) {
    auto caches = cache::make_caches(model.description());
    const auto start = std::chrono::steady_clock::now();
    auto logits = model.run(mx::array(tokens.data() + begin, {chunk_tokens}, mx::int32), {{chunk_tokens, chunk_tokens, &caches}});
    mx::eval(logits);
    result.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    auto logprobs = sample::log_probabilities(mx::reshape(logits, {chunk_tokens, -1}));
    const auto next = mx::array(tokens.data() + begin + 1, {chunk_tokens, 1}, mx::int32);
    result.negative_log_likelihood -= mx::sum(mx::take_along_axis(logprobs, next, -1)).item<float>();
    result.logprobs.push_back(logprobs);
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3) throw Error(Code::bad_request, "usage", "bench_precision MODEL TEXT_FILE...");
  auto session = open_session(argv[1]);
  std::vector<int> tokens;
  for (int i = 2; i < argc; ++i) {
    for (const int token : session.tokenizer.encode(read(argv[i]), false)) tokens.push_back(token);
  }
  const double count = static_cast<double>((tokens.size() - 1) / chunk_tokens * chunk_tokens);
  Result exact;
  using kernels::cpu::Precision;
  for (const auto& [name, precision] :
       {std::pair{"exact", Precision::exact}, {"default", Precision::standard}, {"fast", Precision::fast}}) {
    kernels::cpu::set_precision(precision);
    session.loaded = model::load(argv[1]);
    measure(*session.loaded.model, {tokens.begin(), tokens.begin() + chunk_tokens + 1});
    auto result = measure(*session.loaded.model, tokens);
    if (precision == Precision::exact) exact = result;
    double divergence = 0, same = 0;
    for (std::size_t i = 0; i < result.logprobs.size(); ++i) {
      const auto &p = exact.logprobs[i], &q = result.logprobs[i];
      divergence += mx::sum(mx::exp(p) * (p - q)).item<float>();
      same += mx::sum(mx::equal(sample::likeliest(p), sample::likeliest(q))).item<int>();
    }
    fmt::print(
        "{{\"precision\": \"{}\", \"tokens\": {}, \"perplexity\": {:.5f}, \"against_exact_percent\": {:.4f}, \"mean_kl\": {:.2e}, "
        "\"same_top_token_percent\": {:.2f}, "
        "\"tokens_per_s\": {:.0f}}}\n",
        name, count, std::exp(result.negative_log_likelihood / count),
        100 * (std::exp((result.negative_log_likelihood - exact.negative_log_likelihood) / count) - 1), divergence / count,
        100 * same / count, count / result.seconds);
    std::fflush(stdout);
  }
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "error: %s\n", e.what());
  return 1;
}
