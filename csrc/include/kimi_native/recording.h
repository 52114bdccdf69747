// A sequence of op calls on fixed buffers, run again as one call: what a CUDA graph is on a GPU.
// The host language between two ops costs more than a small op does, because its code and data have
// been streamed out of the caches by the weights.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace kn {

// Scratch memory that only grows.
class Scratch {
 public:
  void* reserve(int64_t bytes);  // 64-byte aligned; the content is lost when it grows

 private:
  std::unique_ptr<uint8_t[]> memory_;
  int64_t bytes_ = 0;
};

// Calls between begin() and end() on one thread, in order. A call keeps its arguments, pointers
// included: buffers must outlive the recording. Every check of an op is made again at each replay,
// on what the buffers then hold.
class Recording {
 public:
  // From now on, and until end(), this thread's calls made through run() are kept. Throws
  // std::runtime_error if the thread is recording already.
  void begin();
  static void end();

  void replay();
  int64_t num_calls() const { return int64_t(calls_.size()); }

  // The recording of this thread, or null.
  static Recording* active();
  void add(std::function<void(Scratch&)> call) { calls_.push_back(std::move(call)); }

 private:
  std::vector<std::function<void(Scratch&)>> calls_;
  Scratch scratch_;
};

// Runs an op, and keeps the call if this thread is recording.
template <typename Args>
void run(void (*op)(const Args&), const Args& args) {
  op(args);
  if (Recording* r = Recording::active()) r->add([op, args](Scratch&) { op(args); });
}

// The same for an op with a workspace: a replay brings its own, of the size needed then.
template <typename Args>
void run(void (*op)(const Args&), int64_t (*workspace_bytes)(const Args&), const Args& args) {
  op(args);
  if (Recording* r = Recording::active())
    r->add([op, workspace_bytes, a = Args(args)](Scratch& scratch) mutable {
      a.workspace_bytes = workspace_bytes(a);
      a.workspace = scratch.reserve(a.workspace_bytes);
      op(a);
    });
}

}  // namespace kn
