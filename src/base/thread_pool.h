// One pool for all CPU kernels: fixed threads that spin shortly, then sleep.
#pragma once

#include <memory>
#include <type_traits>

namespace mlxlm {

/** Runs a function over chunk indices on all threads of the pool, the caller included.
 *  Each thread begins with a run of neighbouring chunks, which suits memory that is read once, and takes chunks of others when it has no
 *  more, so a busy core or a sleeping thread does not stall the rest. Thread-safe: one parallel region at a time. */
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  /** body(chunk, thread) for chunk in [0, chunks), thread in [0, threads()). Returns when all are done.
   *  body must not throw and must not call parallel_for. */
  template <class Body>
  void parallel_for(int chunks, Body&& body) {
    run(chunks, false, call_body<Body>, const_cast<void*>(static_cast<const void*>(&body)));
  }

  /** The same, but chunks begin in their order: for work whose longest chunks come first. */
  template <class Body>
  void parallel_for_in_order(int chunks, Body&& body) {
    run(chunks, true, call_body<Body>, const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  template <class Body>
  static void call_body(void* context, int chunk, int thread) {
    (*static_cast<std::remove_reference_t<Body>*>(context))(chunk, thread);
  }
  void run(int chunks, bool in_order, void (*call)(void*, int, int), void* context);
  struct State;
  std::unique_ptr<State> state_;
};

/** Physical cores that this process may use: affinity mask and cgroup quota honoured. At least 1. */
int usable_cores();

/** The pool that kernels use; made at first use with usable_cores() threads, or with what set_compute_threads said. */
ThreadPool& compute_pool();

/** Must be called before the first kernel runs; threads <= 0 means the default. */
void set_compute_threads(int threads);

}  // namespace mlxlm
