// The GPU for Python's ctypes, as tests/simt/driver.cpp is the shim: guarded device buffers,
// programs by name, and the replay of a call as a CUDA graph. A call returns "" or the text of the
// error.
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "programs.h"

namespace {

constexpr size_t kGuard = 4096;  // bytes of kCanary on both sides of a buffer
constexpr int kCanary = 0xa5;

thread_local std::string message;
std::map<void*, size_t> buffers;  // bytes by address
cudaStream_t stream = nullptr;

void check(const char* what, cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename F>
const char* call(F f) {
  message.clear();
  try {
    f();
  } catch (const std::invalid_argument& e) {
    message = std::string("value ") + e.what();
  } catch (const std::exception& e) {
    message = std::string("runtime ") + e.what();
  }
  return message.c_str();
}

void check_guard(const char* start) {
  std::vector<unsigned char> bytes(kGuard);
  check("guard", cudaMemcpy(bytes.data(), start, kGuard, cudaMemcpyDeviceToHost));
  for (const unsigned char b : bytes)
    if (b != kCanary) throw std::runtime_error("a buffer was written outside of its bytes");
}

}  // namespace

extern "C" {

// The stream that programs and ops run on; not the default one, which cannot be captured.
const char* kn_gpu_stream(void** out) {
  return call([=] {
    if (!stream) check("stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    *out = stream;
  });
}

const char* kn_gpu_allocate(void** out, uint64_t bytes) {
  return call([=] {
    char* memory = nullptr;
    check("allocate", cudaMalloc(reinterpret_cast<void**>(&memory), bytes + 2 * kGuard));
    check("allocate", cudaMemset(memory, kCanary, bytes + 2 * kGuard));
    check("allocate", cudaDeviceSynchronize());  // `stream` does not wait for the default one
    *out = memory + kGuard;
    buffers[*out] = bytes;
  });
}

const char* kn_gpu_free(void* p) {
  return call([=] {
    const size_t bytes = buffers.at(p);
    buffers.erase(p);
    char* memory = static_cast<char*>(p) - kGuard;
    check_guard(memory);
    check_guard(memory + kGuard + bytes);
    check("free", cudaFree(memory));
  });
}

const char* kn_gpu_copy(void* to, const void* from, uint64_t bytes) {
  return call([=] {
    check("copy", cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
    check("copy", cudaDeviceSynchronize());  // small ones return before their bytes are there
  });
}

const char* kn_gpu_synchronize() {
  return call([] { check("synchronize", cudaStreamSynchronize(stream)); });
}

const char* kn_gpu_begin_capture() {
  return call(
      [] { check("capture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal)); });
}

// Ends the capture and runs what was captured.
const char* kn_gpu_replay() {
  return call([] {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check("capture", cudaStreamEndCapture(stream, &graph));
    check("graph", cudaGraphInstantiate(&executable, graph, 0));
    check("replay", cudaGraphLaunch(executable, stream));
    check("replay", cudaStreamSynchronize(stream));
    check("graph", cudaGraphExecDestroy(executable));
    check("graph", cudaGraphDestroy(graph));
  });
}

const char* kn_gpu_program(const char* name, const programs::Buffers* b) {
  return call([=] {
    const auto found = programs::all().find(name);
    if (found == programs::all().end())
      throw std::invalid_argument(std::string("no program ") + name);
    found->second(*b);
    check(name, cudaGetLastError());
    check(name, cudaStreamSynchronize(stream));
  });
}

}  // extern "C"
