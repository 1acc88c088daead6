// The thread pool: every chunk once, any number of threads on any number of cores, and quiet when idle.
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/thread_pool.h"

namespace mlxlm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/** Processor time of all threads of the process. */
double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) { return double(t.tv_sec) + 1e-6 * double(t.tv_usec); };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

/** How often each chunk ran. */
std::vector<int> counts(ThreadPool& pool, int chunks) {
  std::vector<std::atomic<int>> ran(chunks);
  std::atomic<int> outside{0};
  pool.parallel_for(chunks, [&](int chunk, int thread) {
    if (chunk < 0 || chunk >= chunks || thread < 0 || thread >= pool.threads()) {
      outside.fetch_add(1);
    } else {
      ran[chunk].fetch_add(1);
    }
  });
  EXPECT_EQ(outside.load(), 0);
  return {ran.begin(), ran.end()};
}

class Pool : public testing::TestWithParam<int> {
 protected:
  ThreadPool pool{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Threads, Pool, testing::Values(1, 2, 3, 8));

class SeveralThreads : public Pool {};
INSTANTIATE_TEST_SUITE_P(Threads, SeveralThreads, testing::Values(2, 3, 8));

TEST_P(Pool, HasTheThreadsThatWereWanted) {
  EXPECT_EQ(pool.threads(), GetParam());
}

TEST_P(Pool, EveryChunkRunsOnce) {
  for (const int chunks : {1, 2, 3, 7, 8, 9, 64, 1000, 20000}) EXPECT_EQ(counts(pool, chunks), std::vector<int>(chunks, 1)) << chunks;
}

TEST_P(Pool, NoChunks) {
  for (const int chunks : {0, -1, -1000}) {
    int calls = 0;
    pool.parallel_for(chunks, [&](int, int) { ++calls; });
    EXPECT_EQ(calls, 0) << chunks;
  }
  EXPECT_EQ(counts(pool, 5), std::vector<int>(5, 1));
}

/** What chunks wrote is visible to the caller, and what the caller wrote to the chunks. */
TEST_P(Pool, WritesAreVisibleAfterwards) {
  std::vector<int> values(64), sums(64);  // plain memory: a race shows here and under TSan
  for (int round = 1; round <= 2000; ++round) {
    std::iota(values.begin(), values.end(), round);
    pool.parallel_for(64, [&](int chunk, int) { sums[chunk] = values[chunk] * 2; });
    for (int i = 0; i < 64; ++i) ASSERT_EQ(sums[i], (round + i) * 2) << round;
  }
}

/** Two chunks of one thread never overlap, so it may have memory of its own. */
TEST_P(Pool, AThreadNumberIsOneThreadAtATime) {
  std::vector<std::atomic<int>> inside(pool.threads());
  std::atomic<int> overlaps{0};
  for (int round = 0; round < 200; ++round) {
    pool.parallel_for(50, [&](int, int thread) {
      if (inside[thread].fetch_add(1) != 0) overlaps.fetch_add(1);
      inside[thread].fetch_sub(1);
    });
  }
  EXPECT_EQ(overlaps.load(), 0);
}

/** Decoding opens tens of thousands of regions a second. More threads than cores take turns, which costs time slices but ends. */
TEST_P(Pool, ManyQuickRegions) {
  const int regions = GetParam() <= usable_cores() ? 100000 : 2000, chunks = GetParam() * 2;
  std::atomic<int64_t> total{0};
  const auto start = Clock::now();
  int done = 0;
  // Bounded, so that a slow pool fails here and not by a time limit.
  for (; done < regions && (done % 100 != 0 || seconds_since(start) < 60); ++done) {
    pool.parallel_for(chunks, [&](int chunk, int) { total.fetch_add(chunk + 1, std::memory_order_relaxed); });
  }
  EXPECT_EQ(done, regions) << "regions in 60 s";
  EXPECT_EQ(total.load(), int64_t(done) * chunks * (chunks + 1) / 2);
}

/** With work in each chunk, threads beyond the cores must cost little. */
TEST_P(Pool, MoreThreadsThanCoresDoNotStall) {
  auto work = [](int, int) {
    volatile float x = 1.f;
    for (int i = 0; i < 2000; ++i) x = x * 1.0001f;
  };
  const auto run = [&](ThreadPool& p) {
    const auto start = Clock::now();
    for (int region = 0; region < 500; ++region) p.parallel_for(16, work);
    return seconds_since(start);
  };
  ThreadPool one(1);
  const double alone = run(one), together = run(pool);
  EXPECT_LT(together, alone * 10 + 2) << "alone " << alone << " s";
}

/** A region may be opened from any thread; they take turns. */
TEST_P(Pool, RegionsFromTwoThreads) {
  constexpr int rounds = 3000, chunks = 20;
  std::atomic<int> wrong{0};
  const auto caller = [&](int sign) {
    std::vector<int> values(chunks);
    for (int round = 1; round <= rounds; ++round) {
      pool.parallel_for(chunks, [&](int chunk, int) { values[chunk] = sign * (round + chunk); });
      for (int i = 0; i < chunks; ++i) wrong.fetch_add(values[i] != sign * (round + i));
    }
  };
  std::thread other(caller, -1);
  caller(1);
  other.join();
  EXPECT_EQ(wrong.load(), 0);
}

/** A slow chunk does not keep the others waiting: one thread takes it, the rest take what is left. */
TEST_P(SeveralThreads, ASlowChunkDoesNotHoldTheOthers) {
  std::atomic<int> quick{0};
  bool all_before_slow_ended = false;
  pool.parallel_for(20, [&](int chunk, int) {
    if (chunk == 0) {
      const auto start = Clock::now();
      while (quick.load() < 19 && seconds_since(start) < 10) std::this_thread::yield();
      all_before_slow_ended = quick.load() == 19;
    } else {
      quick.fetch_add(1);
    }
  });
  EXPECT_TRUE(all_before_slow_ended);
}

TEST_P(Pool, IdleUsesNoProcessorTime) {
  counts(pool, 100);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // workers may spin shortly
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(cpu_seconds() - before, 0.03);
}

TEST_P(Pool, WakesAfterSleeping) {
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(counts(pool, 40), std::vector<int>(40, 1));
  }
}

TEST(ThreadPool, ComesAndGoes) {
  for (int round = 0; round < 200; ++round) {
    ThreadPool pool(1 + round % 6);
    EXPECT_EQ(counts(pool, round % 11), std::vector<int>(round % 11, 1));
  }
  ThreadPool asleep(4);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
}

TEST(ThreadPool, FewerThanOneThreadIsOne) {
  for (const int threads : {0, -3}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), 1);
    EXPECT_EQ(counts(pool, 3), std::vector<int>(3, 1));
  }
}

TEST(ThreadPool, OneThreadIsTheCaller) {
  ThreadPool pool(1);
  std::set<std::thread::id> seen;
  pool.parallel_for(10, [&](int, int) { seen.insert(std::this_thread::get_id()); });
  EXPECT_EQ(seen, std::set{std::this_thread::get_id()});
}

TEST(ThreadPool, OfTheKernels) {
  EXPECT_GE(usable_cores(), 1);
  EXPECT_LE(usable_cores(), static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  set_compute_threads(0);
  auto& pool = compute_pool();
  EXPECT_EQ(pool.threads(), usable_cores());
  EXPECT_EQ(&pool, &compute_pool());
  EXPECT_EQ(counts(pool, 100), std::vector<int>(100, 1));
}

}  // namespace
}  // namespace mlxlm
