// Workers spin for a few microseconds after a job, since the next op of a forward pass usually
// follows at once, then sleep on a condition variable. Never more runnable threads than
// num_threads(): the caller works too.
#include "core/threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/error.h"
#include "kimi_native/runtime.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kn {
namespace {

constexpr int kSpinRounds =
    2000;  // about 40 to 100 us of `pause`: longer than the gap between two ops of a layer
constexpr int kMaxThreads = 1024;

thread_local int current_thread = -1;  // index inside the running job, -1 outside of one

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

struct Job {
  void (*fn)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  int64_t num_tasks = 0;
};

class Pool {
 public:
  explicit Pool(int threads) {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
  }

  void run(const Job& job) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    pending_.store(int(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_tasks(0);
    // Workers may still be inside their last task: wait until each has left the job.
    for (int round = 0; pending_.load(std::memory_order_acquire) != 0; ++round) {
      if (round < kSpinRounds)
        relax();
      else
        std::this_thread::yield();
    }
  }

 private:
  void take_tasks(int thread) {
    current_thread = thread;
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= job_.num_tasks) break;
      job_.fn(job_.context, task, thread);
    }
    current_thread = -1;
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int round = 0;
           round < kSpinRounds && generation_.load(std::memory_order_acquire) == seen; ++round)
        relax();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_.load() || generation_.load() != seen; });
      }
      if (stop_.load()) return;
      seen = generation_.load(std::memory_order_acquire);
      take_tasks(thread);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  std::atomic<int> pending_{0};
  Job job_;
};

int default_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

struct State {
  std::mutex mutex;  // held for the length of a job: one job at a time
  std::unique_ptr<Pool> pool;
  int threads = default_threads();
};

State* state_ptr() {
  // Never destroyed: worker threads may outlive static destructors at process exit.
  static State* state = [] {
    static State* s = nullptr;
    s = new State;
    // A forked child has no workers; it starts with a fresh state and its own pool. The old one is
    // left alone.
    pthread_atfork(nullptr, nullptr, [] {
      const int threads = s->threads;
      s->pool.release();
      new (s) State;
      s->threads = threads;
    });
    return s;
  }();
  return state;
}

}  // namespace

int num_threads() { return state_ptr()->threads; }

void set_num_threads(int n) {
  KN_REQUIRE(n >= 1 && n <= kMaxThreads, "threads: number of threads must be 1 to ", kMaxThreads,
             " (got ", n, ")");
  State& state = *state_ptr();
  std::lock_guard<std::mutex> lock(state.mutex);
  if (n == state.threads) return;
  state.pool.reset();
  state.threads = n;
}

void run_tasks(int64_t num_tasks, void (*fn)(void*, int64_t, int), void* context) {
  if (num_tasks <= 0) return;
  State& state = *state_ptr();
  if (current_thread >= 0 || num_tasks == 1 || state.threads == 1) {
    for (int64_t task = 0; task < num_tasks; ++task)
      fn(context, task, current_thread < 0 ? 0 : current_thread);
    return;
  }
  std::lock_guard<std::mutex> lock(state.mutex);
  if (!state.pool) state.pool = std::make_unique<Pool>(state.threads);
  state.pool->run({fn, context, num_tasks});
}

}  // namespace kn
