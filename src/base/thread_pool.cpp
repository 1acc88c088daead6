// Fixed workers that spin shortly, then sleep; chunks claimed from one counter.
#include "base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mlxlm {
namespace {

constexpr int spin_rounds = 20000;  // about 0.3 ms: longer than the gaps between the kernels of one token

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

/** A region is published by raising `generation`; each worker takes part in every region exactly once, so the caller's frame outlives them all. */
struct ThreadPool::State {
  explicit State(int count) : threads(count) {
    for (int i = 1; i < threads; ++i) workers.emplace_back([this, i] { work(i); });
  }
  ~State() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
      generation.fetch_add(1);
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
  }

  void take_chunks(int thread) {
    for (;;) {
      const int chunk = next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks) return;
      call(context, chunk, thread);
    }
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < spin_rounds && generation.load(std::memory_order_acquire) == seen; ++spin) pause_cpu();
      if (generation.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return generation.load() != seen; });
        sleeping.fetch_sub(1);
      }
      seen = generation.load(std::memory_order_acquire);
      if (stop) return;
      take_chunks(thread);
      finished.fetch_add(1, std::memory_order_release);
    }
  }

  int threads;
  std::vector<std::thread> workers;
  std::mutex region;  // one parallel region at a time
  std::mutex mutex;
  std::condition_variable wake;
  alignas(64) std::atomic<uint64_t> generation{0};
  alignas(64) std::atomic<int> next{0};
  alignas(64) std::atomic<int> finished{0};
  std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  int chunks = 0;
  void (*call)(void*, int, int) = nullptr;
  void* context = nullptr;
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>(std::max(1, threads))) {}
ThreadPool::~ThreadPool() = default;
int ThreadPool::threads() const { return state_->threads; }

void ThreadPool::run(int chunks, void (*call)(void*, int, int), void* context) {
  State& s = *state_;
  const std::lock_guard one(s.region);
  if (s.threads == 1 || chunks <= 1) {
    for (int chunk = 0; chunk < chunks; ++chunk) call(context, chunk, 0);
    return;
  }
  s.chunks = chunks;
  s.call = call;
  s.context = context;
  s.next.store(0, std::memory_order_relaxed);
  s.finished.store(0, std::memory_order_relaxed);
  s.generation.fetch_add(1);
  if (s.sleeping.load() > 0) {
    const std::lock_guard lock(s.mutex);  // a worker between its check and its wait holds it
    s.wake.notify_all();
  }
  s.take_chunks(0);
  for (int spin = 0; s.finished.load(std::memory_order_acquire) != s.threads - 1; ++spin) {
    if (spin < spin_rounds) pause_cpu();
    else std::this_thread::yield();
  }
}

int usable_cores() {
  int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = std::max(1, CPU_COUNT(&set));
  long long quota = 0, period = 0;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {  // "max 100000" when unlimited
    if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
      cores = std::min<long long>(cores, std::max(1LL, (quota + period - 1) / period));
    }
    std::fclose(file);
  }
#endif
  return cores;
}

namespace {
std::atomic<int> wanted_threads{0};
}

void set_compute_threads(int threads) { wanted_threads = threads; }

ThreadPool& compute_pool() {
  // Never destroyed: workers may be asleep in it when the process ends.
  static ThreadPool* const pool = new ThreadPool(wanted_threads > 0 ? wanted_threads.load() : usable_cores());
  return *pool;
}

}  // namespace mlxlm
