// In place of gpu.cpp and cublas.cpp: host memory, and kernels that run in the shim when they are
// launched. Times are those of the shim and mean nothing.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "gpu.h"
#include "simt/options.h"

namespace kn::bench::gpu {

const bool kRehearsal = true;

Device device() {
  simt::options().hopper = true;  // the kernels that few other tests run at these shapes
  return {"rehearsal", "simt", 3, 1 << 16, int64_t(8) << 30};
}

void* allocate(int64_t bytes) {
  const size_t whole = (size_t(bytes) + 255) / 256 * 256;
  void* p = std::aligned_alloc(256, whole);
  if (!p) throw std::bad_alloc();
  return std::memset(p, 0xff, whole);
}

void release(void* p) noexcept { std::free(p); }
void copy(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, size_t(bytes)); }
void enqueue_copy(void* to, const void* from, int64_t bytes) { copy(to, from, bytes); }
void* stream() { return nullptr; }
void synchronize(const std::string&) {}

double seconds(const std::function<void()>& enqueue) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  enqueue();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Graph::State {
  std::function<void()> enqueue;
};

Graph::Graph(const std::function<void()>& enqueue) : state_(std::make_unique<State>(enqueue)) {}
Graph::~Graph() = default;
double Graph::replay_seconds() const { return seconds(state_->enqueue); }

double matmul_flops(std::string& missing) {
  missing = "a rehearsal has no cuBLAS";
  return 0.0;
}

}  // namespace kn::bench::gpu
