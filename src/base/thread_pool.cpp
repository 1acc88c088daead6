// Fixed workers that spin shortly, then sleep; chunks claimed from one counter.
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

/** A claim names its region, so a thread that comes late can't take it for another: generation, number of chunks, next chunk. */
struct Ticket {
  static constexpr int index_bits = 24, chunk_bits = 20;
  uint64_t bits;
  uint64_t generation() const { return bits >> (index_bits + chunk_bits); }
  int chunks() const { return static_cast<int>(bits >> index_bits & ((1u << chunk_bits) - 1)); }
  int index() const { return static_cast<int>(bits & ((1u << index_bits) - 1)); }
  bool open() const { return index() < chunks(); }
  static Ticket first(uint64_t generation, int chunks) {
    return {generation << (index_bits + chunk_bits) | static_cast<uint64_t>(chunks) << index_bits};
  }
};
constexpr int most_chunks = (1 << Ticket::chunk_bits) - 1;

}  // namespace

/** A region ends when its chunks are done, whichever threads did them: a worker that sleeps or has lost its core is not waited for. */
struct ThreadPool::State {
  explicit State(int count) : threads(count) {
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
    for (;;) {
      const Ticket now{ticket.fetch_add(1, std::memory_order_acq_rel)};
      if (!now.open()) return;
      call(context, now.index(), thread);  // valid while a claimed chunk is not done
      done.fetch_add(1, std::memory_order_release);
    }
  }

  bool open() const { return Ticket{ticket.load()}.open(); }

  void work(int thread) {
    constexpr std::chrono::microseconds spin_time{300};  // longer than the gaps between the kernels of one token
    for (;;) {
      if (!spin_until([this] { return open() || stop.load(std::memory_order_relaxed); }, spin_time)) {
        std::unique_lock lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [this] { return open() || stop; });
        sleeping.fetch_sub(1);
      }
      if (stop) return;
      take_chunks(thread);
    }
  }

  int threads;
  std::vector<std::thread> workers;
  std::mutex region;  // one parallel region at a time
  std::mutex mutex;
  std::condition_variable wake;
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int> done{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  uint64_t generation = 0;
  void (*call)(void*, int, int) = nullptr;
  void* context = nullptr;
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>(std::max(1, threads))) {}
ThreadPool::~ThreadPool() = default;
int ThreadPool::threads() const {
  return state_->threads;
}

void ThreadPool::run(int chunks, void (*call)(void*, int, int), void* context) {
  if (chunks > most_chunks) {  // more than a ticket can count: several to a chunk
    const int each = chunks / most_chunks + 1;
    struct Several {
      void (*call)(void*, int, int);
      void* context;
      int each, chunks;
    } several{call, context, each, chunks};
    const auto call_several = [](void* all, int index, int thread) {
      const auto& a = *static_cast<Several*>(all);
      for (int i = index * a.each; i < std::min(a.chunks, (index + 1) * a.each); ++i) a.call(a.context, i, thread);
    };
    return run_region((chunks + each - 1) / each, call_several, &several);
  }
  run_region(chunks, call, context);
}

void ThreadPool::run_region(int chunks, void (*call)(void*, int, int), void* context) {
  State& s = *state_;
  const std::lock_guard one(s.region);
  if (s.threads == 1 || chunks <= 1) {
    for (int chunk = 0; chunk < chunks; ++chunk) call(context, chunk, 0);
    return;
  }
  s.call = call;
  s.context = context;
  s.done.store(0, std::memory_order_relaxed);
  s.ticket.store(Ticket::first(++s.generation, chunks).bits);
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
