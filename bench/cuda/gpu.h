// The GPU as the benchmark programs see it: memory, one stream, and calls that are captured once
// and replayed between two events. gpu.cpp is the CUDA runtime; rehearsal.cpp stands in for it
// where the kernels run in the shim, so that everything else is tried without a GPU.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace kn::bench::gpu {

struct Device {
  std::string name;  // "NVIDIA H200"
  std::string isa;   // "sm_90", in a rehearsal "simt"
  int multiprocessors;
  int64_t cache_bytes, free_bytes;
};

extern const bool kRehearsal;

// The current device. Throws std::runtime_error if there is none.
Device device();

// Device memory, every byte 0xff: what a kernel does not write stays NaN.
void* allocate(int64_t bytes);
void release(void* p) noexcept;

// Between host and device or on the device; waits.
void copy(void* to, const void* from, int64_t bytes);
// On the device; enqueued.
void enqueue_copy(void* to, const void* from, int64_t bytes);

void* stream();

// Waits for the stream. Throws std::runtime_error naming `what` if a kernel has failed.
void synchronize(const std::string& what);

// Seconds between the events before and after what `enqueue` enqueues.
double seconds(const std::function<void()>& enqueue);

// What `enqueue` enqueues, as a CUDA graph.
class Graph {
 public:
  explicit Graph(const std::function<void()>& enqueue);
  ~Graph();
  double replay_seconds() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// bf16 products per second of the library that comes with the machine, square, on random data; 0
// with the reason in `missing` if there is none.
double matmul_flops(std::string& missing);

}  // namespace kn::bench::gpu
