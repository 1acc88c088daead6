// Measures the engine on a real model, one JSON line a result: throughput by sequences, time between tokens while a long prompt is
// admitted, and prefix reuse against prefill. Run: bench_engine MODEL [throughput|admission|learned|stored|prefix|prefix_small|chunks]...
// (learned: admission with the default budget only; stored: the same while the prompt is saved as a prefix on disk; with
// MLXLM_BENCH_TRACE=1 every step of these, to the standard error)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <string>

#include <fmt/format.h>
#include <mlx/transforms.h>
#include <unistd.h>

#include "base/thread_pool.h"
#include "engine/engine.h"
#include "gen/memory.h"
#include "gen/prefix_files.h"
#include "gen/runner.h"

using namespace mlxlm;
namespace mx = mlx::core;

namespace {

/** Wall time; with MLXLM_BENCH_CPU_TIME=1 the time of this process on the CPU, which other work on the machine does not change: then use
 *  MLXLM_BENCH_THREADS=1, for threads that wait spin. */
double now_s() {
  static const bool cpu = std::getenv("MLXLM_BENCH_CPU_TIME") != nullptr;
  if (!cpu) return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::ranges::sort(values);
  return values[std::min(values.size() - 1, static_cast<std::size_t>(q * static_cast<double>(values.size())))];
}

std::vector<int> prompt(int length, int salt, int vocab) {
  std::vector<int> tokens;
  for (int i = 0; i < length; ++i) tokens.push_back((i * 7919 + salt * 104729 + 13) % std::min(vocab, 40000));
  return tokens;
}

struct Bench {
  model::CausalModel& model;

  void throughput(int sequences) {
    constexpr int kPrompt = 32, kSteps = 64;
    const engine::Limits limits{.max_sequences = sequences};
    gen::ModelRunner runner(model, limits);
    engine::Engine engine(runner, limits, now_s);
    for (int i = 0; i < sequences; ++i)
      engine.submit({.tokens = prompt(kPrompt, i, model.description().vocab), .max_tokens = kSteps + 2 * sequences});
    // Steps of all sequences and nothing else: prompts and the end, when some are done, are other measurements.
    std::vector<double> steps;
    while (engine.has_work() && steps.size() < kSteps) {
      const auto report = engine.step();
      if (report.decode_rows == sequences && report.prompt_tokens == 0) steps.push_back(report.seconds);
    }
    const double seconds = std::accumulate(steps.begin(), steps.end(), 0.0);
    fmt::print(
        "{{\"bench\":\"throughput\",\"sequences\":{},\"tokens_per_s\":{:.1f},\"step_ms_median\":{:.2f},\"threads\":{},\"executor\":\"{}\"}}"
        "\n",
        sequences, static_cast<double>(steps.size()) * sequences / seconds, quantile(steps, 0.5) * 1e3, compute_pool().threads(),
        model.executor());
    std::fflush(stdout);
  }

  /** What a chunk of a prompt costs beside nothing, by its size and place. */
  void chunks() {
    for (const int held : {256, 1024, 4096}) {
      for (const int count : {1, 2, 4, 8, 16, 32, 64}) {
        auto caches = cache::make_caches(model.description());
        const auto run = [&](int n) {
          const auto tokens = prompt(n, 0, model.description().vocab);
          mx::eval(model.run(mx::array(tokens.data(), {n}, mx::int32), {{n, 1, &caches}}));
        };
        for (int at = 0; at < held; at += 256) run(256);
        run(count);
        const double start = now_s();
        for (int i = 0; i < 4; ++i) run(count);
        fmt::print("{{\"bench\":\"chunk\",\"held_tokens\":{},\"tokens\":{},\"ms\":{:.2f},\"ms_a_token\":{:.2f}}}\n", held, count,
                   (now_s() - start) / 4 * 1e3, (now_s() - start) / 4 * 1e3 / count);
        std::fflush(stdout);
      }
    }
  }

  /** 16 sequences decode; then a prompt of 4096 tokens comes. step_tokens 0 = the budget that is learned. `stored`: 4000 of them are saved
   * in a folder meanwhile. */
  void admission(int step_tokens, bool stored = false) {
    constexpr int kSequences = 16, kPrompt = 4096, kStored = 4000, kWarm = 40;
    const engine::Limits limits{.step_tokens = step_tokens, .prefix_cache_bytes = stored ? int64_t{4} << 30 : 0};
    gen::ModelRunner runner(model, limits);
    const bool traced = std::getenv("MLXLM_BENCH_TRACE") != nullptr;
    const auto folder = std::filesystem::temp_directory_path() / fmt::format("bench_engine-{}", ::getpid());
    std::optional<gen::PrefixFiles> files;
    if (stored) files.emplace(gen::PrefixFolder{.folder = folder}, model, runner);
    engine::Engine engine(runner, limits, now_s);
    if (stored) engine.set_store(&*files);
    std::map<engine::SequenceId, double> last;
    for (int i = 0; i < kSequences; ++i)
      last[engine.submit({.tokens = prompt(256 + 16 * i, i, model.description().vocab), .max_tokens = -1})] = 0;
    std::map<engine::SequenceId, std::vector<double>> gaps;
    engine::SequenceId admitted = 0;
    double submitted = 0, first_token = 0, alone_worst = 0, shared_worst = 0;
    int steps = 0;
    std::vector<double> alone, shared;
    while (first_token == 0) {
      const auto report = engine.step();
      const double now = now_s();
      steps += report.decode_rows == kSequences;
      if (traced) {
        fmt::print(stderr, "{{\"trace\":\"step\",\"rows\":{},\"prompt_tokens\":{},\"ms\":{:.2f}}}\n", report.decode_rows,
                   report.prompt_tokens, report.seconds * 1e3);
      }
      for (const auto& e : report.events) {
        if (!e.chosen) continue;
        if (e.id == admitted) {
          first_token = now;
          continue;
        }
        if (last[e.id] > 0 && steps > 5) {
          (admitted == 0 ? alone : shared).push_back(now - last[e.id]);
          (admitted == 0 ? alone_worst : shared_worst) = std::max(admitted == 0 ? alone_worst : shared_worst, now - last[e.id]);
        }
        last[e.id] = now;
      }
      if (admitted == 0 && steps == kWarm) {
        engine::Request r;
        r.tokens = prompt(kPrompt, 99, model.description().vocab);
        r.max_tokens = 1;
        r.boundaries = {kStored};
        admitted = engine.submit(std::move(r));
        submitted = now_s();
      }
    }
    const double median = quantile(alone, 0.5);
    auto all = alone;
    all.insert(all.end(), shared.begin(), shared.end());
    fmt::print(
        "{{\"bench\":\"admission\",\"admission\":\"{}\",\"step_tokens\":{},\"gap_ms_median_alone\":{:.1f},\"gap_ms_worst_alone\":{:.1f},"
        "\"gap_ms_median\":{:.1f},"
        "\"gap_ms_p99\":{:.1f},\"gap_ms_worst\":{:.1f},\"worst_over_median_alone\":{:.2f},\"p99_over_median_alone\":{:.2f},"
        "\"worst_over_median\":{:.2f},\"first_token_s\":{:.2f},\"threads\":{},\"executor\":\"{}\"}}\n",
        stored ? "stored in a folder" : "not stored", step_tokens, median * 1e3, alone_worst * 1e3, quantile(shared, 0.5) * 1e3,
        quantile(shared, 0.99) * 1e3, shared_worst * 1e3, shared_worst / median, quantile(shared, 0.99) / median,
        shared_worst / quantile(all, 0.5), first_token - submitted, compute_pool().threads(), model.executor());
    std::fflush(stdout);
    engine.set_store(nullptr);
    if (stored) std::filesystem::remove_all(folder);
  }

  /** Requests that begin with the same tokens, all at once. `how`: computed (each for itself), copied or shared. */
  void prefix(const std::string& how, int requests, int shared_tokens) {
    const bool reuse = how != "computed";
    const engine::Limits limits{.max_sequences = requests, .prefix_cache_bytes = reuse ? int64_t{4} << 30 : 0};
    gen::ModelRunner runner(model, limits);
    runner.share_memory(how == "shared");
    engine::Engine engine(runner, limits, now_s);
    const double start = now_s();
    int64_t most = 0;
    std::vector<double> first;
    std::set<engine::SequenceId> seen;
    for (int i = 0; i < requests; ++i) {
      auto tokens = prompt(shared_tokens, 0, model.description().vocab);
      for (const int t : prompt(16, i + 1, model.description().vocab)) tokens.push_back(t);
      engine::Request r;
      r.tokens = std::move(tokens);
      r.max_tokens = 8;
      r.boundaries = {shared_tokens};
      r.use_prefix_cache = reuse;
      engine.submit(std::move(r));
    }
    while (engine.has_work()) {
      for (const auto& e : engine.step().events) {
        if (e.chosen && seen.insert(e.id).second) first.push_back(now_s() - start);
      }
      most = std::max(most, runner.held_bytes());
    }
    fmt::print(
        "{{\"bench\":\"prefix\",\"prefix\":\"{}\",\"requests\":{},\"shared_tokens\":{},\"seconds\":{:.2f},\"first_token_s_median\":{:.2f},"
        "\"prompt_tokens_run\":{},\"reused_tokens\":{},\"cache_mb_most\":{:.1f},\"threads\":{},\"executor\":\"{}\"}}\n",
        how, requests, shared_tokens, now_s() - start, quantile(first, 0.5), engine.counters().prompt_tokens,
        engine.counters().reused_tokens, static_cast<double>(most) / 1e6, compute_pool().threads(), model.executor());
    std::fflush(stdout);
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "usage: bench_engine MODEL [throughput|admission|learned|stored|prefix|prefix_small|chunks]...\n");
    return 1;
  }
  try {
    if (const char* threads = std::getenv("MLXLM_BENCH_THREADS")) set_compute_threads(std::atoi(threads));
    const auto loaded = model::load(argv[1]);
    Bench bench{*loaded.model};
    std::set<std::string> wanted(argv + 2, argv + argc);
    if (wanted.empty()) wanted = {"throughput", "admission", "prefix"};
    if (wanted.contains("throughput")) {
      for (const int n : {1, 8, 32}) bench.throughput(n);
    }
    if (wanted.contains("admission")) {
      for (const int tokens : {32, 48, 64, 128, 0}) bench.admission(tokens);
    }
    if (wanted.contains("chunks")) bench.chunks();
    if (wanted.contains("learned")) bench.admission(0);
    if (wanted.contains("stored")) bench.admission(0, /*stored=*/true);
    if (wanted.contains("prefix")) {
      for (const char* how : {"computed", "copied", "shared"}) bench.prefix(how, 32, 2048);
    }
    if (wanted.contains("prefix_small")) {
      for (const char* how : {"computed", "copied", "shared"}) bench.prefix(how, 8, 512);
    }
  } catch (const std::exception& e) {
    fmt::print(stderr, "bench_engine: error: {}\n", e.what());
    return 1;
  }
}
