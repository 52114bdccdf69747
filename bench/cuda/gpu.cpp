#include "gpu.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace kn::bench::gpu {
namespace {

void check(const std::string& what, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

cudaStream_t the_stream() {
  static const cudaStream_t s = [] {
    cudaStream_t made;  // not the default one, which cannot be captured
    check("stream", cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
  }();
  return s;
}

struct Events {
  cudaEvent_t begin, end;
  Events() {
    check("event", cudaEventCreate(&begin));
    check("event", cudaEventCreate(&end));
  }
  ~Events() {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
};

}  // namespace

const bool kRehearsal = false;

Device device() {
  int driver = 0, count = 0;  // the driver's version stays 0 where there is none
  check("cuda", cudaDriverGetVersion(&driver));
  if (driver == 0) throw std::runtime_error("cuda: no NVIDIA driver was found");
  check("cuda", cudaGetDeviceCount(&count));
  if (count == 0) throw std::runtime_error("cuda: no device");
  cudaDeviceProp p;
  check("cuda", cudaGetDeviceProperties(&p, 0));
  size_t free_bytes = 0, total = 0;
  check("cuda", cudaMemGetInfo(&free_bytes, &total));
  return {p.name, "sm_" + std::to_string(p.major * 10 + p.minor), p.multiProcessorCount,
          p.l2CacheSize, int64_t(free_bytes)};
}

void* allocate(int64_t bytes) {
  void* p = nullptr;
  check("allocate " + std::to_string(bytes) + " bytes", cudaMalloc(&p, size_t(bytes)));
  check("allocate", cudaMemset(p, 0xff, size_t(bytes)));
  check("allocate", cudaDeviceSynchronize());
  return p;
}

void release(void* p) noexcept { cudaFree(p); }

void copy(void* to, const void* from, int64_t bytes) {
  check("copy", cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, the_stream()));
  synchronize("copy");
}

void enqueue_copy(void* to, const void* from, int64_t bytes) {
  check("copy", cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, the_stream()));
}

void* stream() { return the_stream(); }

void synchronize(const std::string& what) {
  check(what, cudaGetLastError());
  check(what, cudaStreamSynchronize(the_stream()));
}

double seconds(const std::function<void()>& enqueue) {
  const Events e;
  check("event", cudaEventRecord(e.begin, the_stream()));
  enqueue();
  check("event", cudaEventRecord(e.end, the_stream()));
  check("event", cudaEventSynchronize(e.end));
  float ms = 0.0f;
  check("event", cudaEventElapsedTime(&ms, e.begin, e.end));
  return double(ms) * 1e-3;
}

struct Graph::State {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ~State() {
    if (executable) cudaGraphExecDestroy(executable);
    if (graph) cudaGraphDestroy(graph);
  }
};

Graph::Graph(const std::function<void()>& enqueue) : state_(std::make_unique<State>()) {
  check("capture", cudaStreamBeginCapture(the_stream(), cudaStreamCaptureModeThreadLocal));
  try {
    enqueue();
  } catch (...) {
    cudaStreamEndCapture(the_stream(), &state_->graph);  // or every later call fails too
    throw;
  }
  check("capture", cudaStreamEndCapture(the_stream(), &state_->graph));
  check("graph", cudaGraphInstantiate(&state_->executable, state_->graph, 0));
  check("graph", cudaGraphUpload(state_->executable, the_stream()));
}

Graph::~Graph() = default;

double Graph::replay_seconds() const {
  return seconds([&] { check("replay", cudaGraphLaunch(state_->executable, the_stream())); });
}

}  // namespace kn::bench::gpu
