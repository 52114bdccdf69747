// The thread pool: tasks 0 .. num_tasks-1 are handed out from one shared counter, so a slow core
// takes fewer of them. Which thread runs a task is not fixed; what a task computes must not depend
// on it.
#pragma once
#include <cstdint>

namespace kn {

// Tasks must not throw. Runs fn(context, task, thread) for every task and returns when all are
// done. `thread` is in [0, num_threads()). Calls from several user threads are served one after
// another; a call from inside a task runs in place.
void run_tasks(int64_t num_tasks, void (*fn)(void* context, int64_t task, int thread),
               void* context);

// One short wait inside a loop that spins.
void relax();

template <typename F>
void parallel_for(int64_t num_tasks, F&& f) {
  run_tasks(
      num_tasks,
      [](void* context, int64_t task, int thread) { (*static_cast<F*>(context))(task, thread); },
      &f);
}

}  // namespace kn
