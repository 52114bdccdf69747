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
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "core/error.h"
#include "kimi_native/runtime.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kn {
namespace {

// About 40 to 100 us of `pause`: longer than the gap between two ops of a layer.
constexpr int kSpinRounds = 2000;
constexpr int kMaxThreads = 1024;

thread_local int current_thread = -1;  // index inside the running job, -1 outside of one

struct Job {
  void (*fn)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  int64_t num_tasks = 0;
};

// One word says which job is open and who works on it: the job's number in the upper half, then
// kClosed, then the number of workers inside. A worker enters an open job only; once the caller has
// run out of tasks it closes the job and waits for those inside. So a worker that sleeps, or that
// the system has not scheduled yet, holds nobody up.
class Pool {
 public:
  explicit Pool(int threads) {
    try {
      for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
    } catch (const std::system_error& e) {
      stop();
      throw std::runtime_error(concat("threads: ", threads, " threads could not be started (",
                                      e.what(), "); set a smaller number"));
    }
  }
  ~Pool() { stop(); }

  void run(const Job& job) {
    job_ = job;  // nobody is inside and nobody can enter: the gate is closed
    next_.store(0, std::memory_order_relaxed);
    int64_t wake;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      gate_.store(((gate_.load(std::memory_order_relaxed) >> 32) + 1) << 32,
                  std::memory_order_release);
      wake = std::min<int64_t>(sleeping_, job.num_tasks - 1);
    }
    for (; wake > 0; --wake) wake_.notify_one();
    take_tasks(0);
    uint64_t gate = gate_.fetch_or(kClosed, std::memory_order_acquire);
    for (int round = 0; gate & kInside; ++round) {
      if (round < kSpinRounds)
        relax();
      else
        std::this_thread::yield();
      gate = gate_.load(std::memory_order_acquire);
    }
  }

 private:
  static constexpr uint64_t kClosed = uint64_t(1) << 31, kInside = kClosed - 1;

  void take_tasks(int thread) {
    current_thread = thread;
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= job_.num_tasks) break;
      job_.fn(job_.context, task, thread);
    }
    current_thread = -1;
  }

  // The number of the job at the gate.
  uint32_t number() const { return uint32_t(gate_.load(std::memory_order_acquire) >> 32); }

  // Joins the job at the gate unless it is closed; returns its number either way.
  uint32_t join(int thread) {
    uint64_t gate = gate_.load(std::memory_order_acquire);
    while (!(gate & kClosed))
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
        take_tasks(thread);
        gate_.fetch_sub(1, std::memory_order_release);
        break;
      }
    return uint32_t(gate >> 32);
  }

  void work(int thread) {
    for (uint32_t seen = 0;;) {
      for (int round = 0; round < kSpinRounds && number() == seen; ++round) relax();
      if (number() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return stop_ || number() != seen; });
        --sleeping_;
        if (stop_) return;
      }
      seen = join(thread);
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  int64_t sleeping_ = 0;  // under mutex_
  bool stop_ = false;     // under mutex_
  std::atomic<uint64_t> gate_{kClosed};
  std::atomic<int64_t> next_{0};
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
  std::atomic<int> threads = default_threads();
};

State* state_ptr() {
  // Never destroyed: worker threads may outlive static destructors at process exit.
  static State* state = [] {
    static State* s = nullptr;
    s = new State;
    // A forked child has no workers; it starts with a fresh state and its own pool. The old one is
    // left alone.
    pthread_atfork(nullptr, nullptr, [] {
      const int threads = s->threads.load();
      s->pool.release();
      new (s) State;
      s->threads.store(threads);
    });
    return s;
  }();
  return state;
}

}  // namespace

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int num_threads() { return state_ptr()->threads.load(); }

void set_num_threads(int n) {
  KN_REQUIRE(n >= 1 && n <= kMaxThreads, "threads: number of threads must be 1 to ", kMaxThreads,
             " (got ", n, ")");
  State& state = *state_ptr();
  std::lock_guard<std::mutex> lock(state.mutex);
  if (n == state.threads.load()) return;
  state.pool.reset();
  state.threads.store(n);
}

void run_tasks(int64_t num_tasks, void (*fn)(void*, int64_t, int), void* context) {
  if (num_tasks <= 0) return;
  State& state = *state_ptr();
  if (current_thread >= 0 || num_tasks == 1 || state.threads.load() == 1) {
    for (int64_t task = 0; task < num_tasks; ++task)
      fn(context, task, current_thread < 0 ? 0 : current_thread);
    return;
  }
  std::lock_guard<std::mutex> lock(state.mutex);
  if (!state.pool) state.pool = std::make_unique<Pool>(state.threads.load());
  state.pool->run({fn, context, num_tasks});
}

}  // namespace kn
