// mlx-lm benchmark: speed of prefill and decode with random tokens. Reference: mlx_lm/benchmark.py
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "api/session.h"
#include "base/error.h"
#include "base/json.h"
#include "base/thread_pool.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "gen/generate.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/packed.h"
#include "sample/sample.h"

namespace mlxlm::cli {

namespace {

namespace mx = mlx::core;
using Clock = std::chrono::steady_clock;

struct Arguments {
  std::string model, cpu_precision = "default", executor = "best";
  int prompt_tokens = 512, generation_tokens = 1024, batch_size = 1, trials = 5, prefill_step_size = 2048, delay_s = 0, threads = 0;
  CacheFlags cache{.max_kv_size = {}, .kv_bits = {}, .kv_group_size = {}, .quantized_kv_start = 0};
  bool pipeline = false, quantize_activations = false, trust_remote_code = false, json = false, bandwidth = false;
};

struct Trial {
  double prompt_tps = 0, generation_tps = 0, peak_memory_gb = 0, total_s = 0;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void check(const Arguments& a) {
  check_at_least("--prompt-tokens", a.prompt_tokens, 1);
  check_at_least("--generation-tokens", a.generation_tokens, 1);
  check_at_least("--batch-size", a.batch_size, 1);
  check_at_least("--num-trials", a.trials, 1);
  check_at_least("--prefill-step-size", a.prefill_step_size, 1);
  check_at_least("--delay", a.delay_s, 0);
  if (a.pipeline) throw Error(Code::unsupported, "--pipeline", "several machines are not supported yet");
}

/** Seeded, so that two runs measure the same. */
std::vector<std::vector<int>> random_prompts(const Arguments& a, int vocab) {
  std::mt19937 random(0);
  std::uniform_int_distribution<int> token(0, vocab - 1);
  std::vector<std::vector<int>> prompts(a.batch_size, std::vector<int>(a.prompt_tokens));
  for (auto& prompt : prompts) std::ranges::generate(prompt, [&] { return token(random); });
  return prompts;
}

Trial single(const Arguments& a, Session& session, const std::vector<int>& prompt) {
  gen::Options options;
  options.max_tokens = a.generation_tokens;
  options.prefill_step_tokens = a.prefill_step_size;
  options.ignore_eos = true;
  options.cancel = &InterruptGuard::flag();
  options.kv_quantization = a.cache.quantization();
  const auto last =
      gen::stream_generate(*session.loaded.model, session.tokenizer, prompt, options, [](const gen::Response&) { return true; });
  if (last.finish == gen::Finish::cancelled) throw Error(Code::cancelled, "benchmark", "interrupted");
  return {last.prompt_tokens_per_s, last.generation_tokens_per_s, last.peak_memory_gb};
}

/** All sequences together: prompts in chunks of the step size, then one token of each a step, greedy. */
Trial batched(const Arguments& a, Session& session, const std::vector<std::vector<int>>& prompts) {
  auto& model = *session.loaded.model;
  std::vector<cache::Caches> caches;
  for (std::size_t i = 0; i < prompts.size(); ++i) caches.push_back(cache::make_caches(model.description()));
  const auto quantization = a.cache.quantization();
  const auto stop_if_asked = [] {
    if (InterruptGuard::flag()) throw Error(Code::cancelled, "benchmark", "interrupted");
  };
  const auto start = Clock::now();
  std::vector<mx::array> first;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    for (int at = 0; at < a.prompt_tokens; at += a.prefill_step_size) {
      stop_if_asked();
      const int count = std::min(a.prefill_step_size, a.prompt_tokens - at);
      const bool last = at + count == a.prompt_tokens;
      const auto logits = model.run(mx::array(prompts[i].data() + at, {count}, mx::int32), {{count, last ? 1 : 0, &caches[i]}});
      cache::quantize_caches(caches[i], quantization);
      mx::eval(logits);
      if (last) first.push_back(sample::likeliest(logits));
    }
  }
  auto tokens = mx::astype(mx::concatenate(first), mx::int32);
  mx::eval(tokens);
  const double prefill_s = seconds_since(start);
  std::vector<model::Segment> segments;
  for (auto& c : caches) segments.push_back({1, 1, &c});
  const auto decode = Clock::now();
  for (int i = 1; i < a.generation_tokens; ++i) {
    stop_if_asked();
    auto next = sample::likeliest(model.run(tokens, segments));
    mx::async_eval(next);
    mx::eval(tokens);
    tokens = next;
  }
  mx::eval(tokens);
  const double total = double(prompts.size());
  return {total * a.prompt_tokens / prefill_s, total * std::max(1, a.generation_tokens - 1) / std::max(1e-9, seconds_since(decode)),
          gen::peak_memory_gb()};
}

/** GB/s at which all threads read `bytes` over and over, the best of five: of memory when no cache holds them, of the last cache below. */
double read_bandwidth_gb_s(int64_t bytes) {
  typedef uint64_t Part __attribute__((vector_size(16)));  // wider ones GCC would keep in memory, for processors without such registers
  struct Line {
    Part parts[4];
  };
  constexpr int64_t ahead = 64;  // lines
  const int64_t lines = bytes / 64, times = std::max<int64_t>(1, (int64_t(1) << 30) / bytes);
  const kernels::cpu::Arena memory(lines * 64);
  const auto* data = reinterpret_cast<const Line*>(memory.data());
  std::memset(memory.data(), 0, lines * 64);
  auto& pool = compute_pool();
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = Clock::now();
    std::atomic<uint64_t> sum{0};
    for (int64_t time = 0; time < times; ++time) {
      pool.parallel_for(64, [&](int chunk, int) {
        Part total[4] = {};
        for (int64_t i = lines * chunk / 64; i < lines * (chunk + 1) / 64; ++i) {
          __builtin_prefetch(data + i + ahead);
          for (int part = 0; part < 4; ++part) total[part] += data[i].parts[part];
        }
        for (const auto& part : total) sum += part[0] + part[1];
      });
    }
    if (sum != 0) throw Error(Code::internal, "benchmark", "memory does not hold what was written");
    best = std::max(best, lines * 64 * times / seconds_since(start) / 1e9);
  }
  return best;
}

/** What the machine reads, GB/s. */
struct Bandwidth {
  double memory;   // 1 GB
  double weights;  // as many bytes as the model's weights, which caches may hold in part
};

void print_json(const Arguments& a, const Session& session, const std::vector<Trial>& trials, const std::optional<Bandwidth>& bandwidth) {
  const auto column = [&](double Trial::* field) {
    json values = json::array();
    for (const auto& t : trials) values.push_back(t.*field);
    return values;
  };
  json result{{"model", session.loaded.path.string()},
              {"executor", session.loaded.model->executor()},
              {"cpu_kernels", kernels::cpu::isa_name()},
              {"threads", compute_pool().threads()},
              {"weight_bytes", session.loaded.model->weight_bytes()},
              {"prompt_tokens", a.prompt_tokens},
              {"generation_tokens", a.generation_tokens},
              {"batch_size", a.batch_size},
              {"prompt_tps", column(&Trial::prompt_tps)},
              {"generation_tps", column(&Trial::generation_tps)},
              {"peak_memory_gb", column(&Trial::peak_memory_gb)},
              {"total_time_s", column(&Trial::total_s)}};
  if (bandwidth) {
    result["read_bandwidth_gb_s"] = bandwidth->memory;
    result["reread_bandwidth_gb_s"] = bandwidth->weights;
  }
  fmt::print("{}\n", to_text(result));
}

int run(const Arguments& a) {
  check(a);
  use_threads(a.threads);
  set_cpu_precision(a.cpu_precision);
  auto session = open_session(find_model(a.model), {.executor = a.executor == "graph" ? model::Executor::graph : model::Executor::best,
                                                    .adapter = {},
                                                    .quantize_activations = a.quantize_activations});
  const auto prompts = random_prompts(a, session.loaded.model->description().vocab);
  const InterruptGuard guard;
  const auto once = [&] { return a.batch_size == 1 ? single(a, session, prompts[0]) : batched(a, session, prompts); };
  const auto say = [&](const std::string& text) {
    if (a.json) return;
    fmt::print("{}\n", text);
    std::fflush(stdout);
  };
  say("Running warmup..");
  once();
  std::optional<Bandwidth> bandwidth;
  const auto weight_bytes = static_cast<int64_t>(session.loaded.model->weight_bytes());
  if (a.bandwidth) bandwidth = {read_bandwidth_gb_s(int64_t(1) << 30), read_bandwidth_gb_s(weight_bytes)};
  say(fmt::format("Timing with prompt_tokens={}, generation_tokens={}, batch_size={}.", a.prompt_tokens, a.generation_tokens,
                  a.batch_size));
  const auto line = [](const Trial& t) {
    return fmt::format("prompt_tps={:.3f}, generation_tps={:.3f}, peak_memory={:.3f}", t.prompt_tps, t.generation_tps, t.peak_memory_gb);
  };
  std::vector<Trial> trials;
  Trial mean;
  for (int i = 0; i < a.trials; ++i) {
    if (a.delay_s > 0) std::this_thread::sleep_for(std::chrono::seconds(a.delay_s));
    const auto start = Clock::now();
    auto trial = once();
    trial.total_s = seconds_since(start);
    say(fmt::format("Trial {}:  {}, total_time={:.3f}", i + 1, line(trial), trial.total_s));
    mean.prompt_tps += trial.prompt_tps / a.trials;
    mean.generation_tps += trial.generation_tps / a.trials;
    mean.peak_memory_gb += trial.peak_memory_gb / a.trials;
    trials.push_back(trial);
  }
  say("Averages: " + line(mean));
  if (bandwidth) {
    const double read = mean.generation_tps / a.batch_size * static_cast<double>(weight_bytes) / 1e9;
    say(fmt::format("Weights read while decoding: {:.1f} GB/s, {:.0f} % of the {:.1f} GB/s that this machine reads from memory,", read,
                    100 * read / bandwidth->memory, bandwidth->memory));
    say(fmt::format("{:.0f} % of the {:.1f} GB/s at which it reads as many bytes over and over", 100 * read / bandwidth->weights,
                    bandwidth->weights));
  }
  if (a.json) print_json(a, session, trials, bandwidth);
  return 0;
}

}  // namespace

void add_benchmark(CLI::App& app, Action& action) {
  auto a = std::make_shared<Arguments>();
  auto& c = *app.add_subcommand("benchmark", "Measure prefill and decode with random tokens");
  c.add_option("--model", a->model, "Folder, .gguf file or repository (org/name); the default model when not given");
  c.add_option("-p,--prompt-tokens", a->prompt_tokens, "Length of each prompt")->capture_default_str();
  c.add_option("-g,--generation-tokens", a->generation_tokens, "Tokens to generate for each")->capture_default_str();
  c.add_option("-b,--batch-size", a->batch_size, "Sequences at a time")->capture_default_str();
  c.add_option("-n,--num-trials", a->trials, "Trials, after one that does not count")->capture_default_str();
  c.add_flag("--pipeline", a->pipeline, "Pipeline over several machines (not supported yet)");
  c.add_flag("--quantize-activations", a->quantize_activations, "Round activations to the format of the weights, mxfp8 or nvfp4; also -qa");
  c.add_option("--prefill-step-size", a->prefill_step_size, "Prompt tokens processed at a time")->capture_default_str();
  c.add_option("--executor", a->executor, "best: our kernels for whole steps where there are; graph: MLX operations")
      ->check(CLI::IsMember({"best", "graph"}))
      ->capture_default_str();
  c.add_option("--delay", a->delay_s, "Seconds between trials")->capture_default_str();
  c.add_flag("--trust-remote-code", a->trust_remote_code, "Accepted for compatibility: no code of a model is ever run");
  add_kv_bits(c, a->cache);
  add_threads(c, a->threads);
  add_cpu_precision(c, a->cpu_precision);
  c.add_flag("--bandwidth", a->bandwidth, "Also measure how fast this machine reads memory (1 GB), and the share that decoding reaches");
  c.add_flag("--json", a->json, "Print one JSON object with every trial");
  c.footer("Example:\n  mlx-lm benchmark --model org/name --prompt-tokens 512 --generation-tokens 128 --num-trials 3");
  c.callback([a, &action] { action = [a] { return run(*a); }; });
}

}  // namespace mlxlm::cli
