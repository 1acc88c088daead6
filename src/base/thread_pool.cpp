// Fixed workers that spin shortly, then sleep. Each has a share of the chunks, and helps others when its own is done.
#include "base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
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

using Clock = std::chrono::steady_clock;

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

/** Waits until done(), at first without giving the core away, then yielding it to whoever wants it; false when `limit` has passed. */
template <class Done>
bool spin_until(Done&& done, std::chrono::microseconds limit) {
  constexpr int short_rounds = 400, rounds_between_yields = 40;  // about 10 us and 1 us
  for (int i = 0; i < short_rounds; ++i) {
    if (done()) return true;
    pause_cpu();
  }
  const auto end = Clock::now() + limit;
  while (Clock::now() < end) {
    std::this_thread::yield();
    for (int i = 0; i < rounds_between_yields; ++i) {
      if (done()) return true;
      pause_cpu();
    }
  }
  return done();
}

/** Chunks that are left of a run of neighbours. Its owner takes them from the front, others from the back.
 *  A claim is a compare-and-swap of both ends: whoever comes so late that the same ends mean a newer region has a chunk of that region. */
struct alignas(64) Share {
  std::atomic<uint64_t> ends{0};  // the first, and above it the one after the last

  void set(int first, int last) { ends.store(pack(first, last), std::memory_order_release); }

  /** -1: none is left. */
  int claim(bool front) {
    uint64_t now = ends.load(std::memory_order_relaxed);
    for (;;) {
      const int first = static_cast<int>(now & 0xFFFFFFFFu), last = static_cast<int>(now >> 32);
      if (first >= last) return -1;
      const uint64_t then = front ? pack(first + 1, last) : pack(first, last - 1);
      if (ends.compare_exchange_weak(now, then, std::memory_order_acq_rel, std::memory_order_relaxed)) return front ? first : last - 1;
    }
  }

 private:
  static uint64_t pack(int first, int last) { return static_cast<uint64_t>(last) << 32 | static_cast<uint32_t>(first); }
};

}  // namespace

/** A region ends when its chunks are done, whichever threads did them: a worker that sleeps or has lost its core is not waited for. */
struct ThreadPool::State {
  explicit State(int count) : threads(count), shares(count) {
    for (int i = 1; i < threads; ++i) workers.emplace_back([this, i] { work(i); });
  }
  ~State() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
  }

  /** Until the region has no more chunks. */
  void take_chunks(int thread) {
    int taken = 0;
    for (int i = 0; i < threads; ++i) {
      const int owner = thread + i < threads ? thread + i : thread + i - threads;
      for (int chunk; (chunk = shares[owner].claim(i == 0 || in_order)) >= 0; ++taken) {
        call(context, chunk, thread);  // valid while a claimed chunk is not counted
      }
    }
    if (taken > 0) done.fetch_add(taken, std::memory_order_release);
  }

  void work(int thread) {
    constexpr std::chrono::microseconds spin_time{300};  // longer than the gaps between the kernels of one token
    uint64_t seen = 0;
    const auto news = [&] { return regions.load() != seen || stop.load(std::memory_order_relaxed); };
    for (;;) {
      if (!spin_until(news, spin_time)) {
        std::unique_lock lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, news);
        sleeping.fetch_sub(1);
      }
      if (stop) return;
      seen = regions.load();
      take_chunks(thread);
    }
  }

  int threads;
  std::vector<Share> shares;  // one a thread
  std::vector<std::thread> workers;
  std::mutex region;  // one parallel region at a time
  std::mutex mutex;
  std::condition_variable wake;
  alignas(64) std::atomic<uint64_t> regions{0};  // begun so far
  alignas(64) std::atomic<int> done{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  std::atomic<bool> in_order{false};
  void (*call)(void*, int, int) = nullptr;
  void* context = nullptr;
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>(std::max(1, threads))) {}
ThreadPool::~ThreadPool() = default;
int ThreadPool::threads() const {
  return state_->threads;
}

void ThreadPool::run(int chunks, bool in_order, void (*call)(void*, int, int), void* context) {
  State& s = *state_;
  const std::lock_guard one(s.region);
  if (s.threads == 1 || chunks <= 1) {
    for (int chunk = 0; chunk < chunks; ++chunk) call(context, chunk, 0);
    return;
  }
  s.call = call;
  s.context = context;
  s.in_order.store(in_order, std::memory_order_relaxed);
  s.done.store(0, std::memory_order_relaxed);
  for (int64_t i = 0; i < s.threads; ++i) {
    if (in_order)
      s.shares[i].set(0, i == 0 ? chunks : 0);
    else
      s.shares[i].set(static_cast<int>(chunks * i / s.threads), static_cast<int>(chunks * (i + 1) / s.threads));
  }
  s.regions.fetch_add(1);
  if (s.sleeping.load() > 0) {
    const std::lock_guard lock(s.mutex);  // a worker between its check and its wait holds it
    s.wake.notify_all();
  }
  s.take_chunks(0);
  // A chunk that takes longer belongs to a worker without a core: an idle one may then take it over, a busy one would not.
  constexpr std::chrono::microseconds spin_time{100}, nap{20};
  const auto all_done = [&] { return s.done.load(std::memory_order_acquire) == chunks; };
  for (bool finished = spin_until(all_done, spin_time); !finished; finished = all_done()) std::this_thread::sleep_for(nap);
}

#if defined(__linux__)
namespace {

/** CPUs of the set that are the first of their core in it: two hardware threads share one vector unit. */
int physical_cores(const cpu_set_t& set) {
  int count = 0;
  std::set<std::string> seen;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    const bool known = static_cast<bool>(std::getline(file, siblings)) && !siblings.empty();
    if (!known || seen.insert(siblings).second) ++count;
  }
  return count;
}

}  // namespace
#endif

int usable_cores() {
  int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = std::max(1, physical_cores(set));
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

void set_compute_threads(int threads) {
  wanted_threads = threads;
}

ThreadPool& compute_pool() {
  // Never destroyed: workers may be asleep in it when the process ends.
  static ThreadPool* const pool = new ThreadPool(wanted_threads > 0 ? wanted_threads.load() : usable_cores());
  return *pool;
}

}  // namespace mlxlm
