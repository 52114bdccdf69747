// What every .cu file starts from. The same source is compiled by nvcc for a GPU and by a C++
// compiler against simt/, where it runs as fibers. Three things differ, and each has one name here:
// dynamic shared memory (KN_SHARED, SharedPtr), launches (launch), and a loop that waits for
// another block (spin_until).
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "simt/cuda.h"
#endif

#include "kimi_native/types.h"

namespace kn::cuda {

constexpr int kSharedBytesAnywhere = 99 * 1024;  // of a block: what sm_86, sm_89 and sm_120 have

// Where and how a kernel runs. `op` names it in errors; `stream` is a cudaStream_t.
struct LaunchConfig {
  const char* op;
  dim3 grid, block;
  size_t shared_bytes = 0;
  void* stream = nullptr;
};

// The grid of an op's kernel. Throws std::invalid_argument beyond what a launch can have.
inline dim3 grid_of(const char* op, int64_t x, int64_t y = 1) {
  if (x < 1 || x > 0x7fffffff || y < 1 || y > 65535)
    throw std::invalid_argument(std::string(op) + ": too large for one launch (got a grid of " +
                                std::to_string(x) + " x " + std::to_string(y) + " blocks)");
  return dim3(unsigned(x), unsigned(y));
}

#if defined(__CUDACC__)

// A pointer into shared memory. In kernels: load and store whole values (`const uint4 v = p[i];`).
template <typename T>
using SharedPtr = T*;

#define KN_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// The bytes at `offset` of shared memory as T.
template <typename T>
__device__ __forceinline__ SharedPtr<T> shared_at(unsigned char* shared, int offset) {
  return reinterpret_cast<T*>(shared + offset);
}

// The same place as another type.
template <typename T, typename U>
__device__ __forceinline__ SharedPtr<T> shared_cast(U* p) {
  return reinterpret_cast<T*>(p);
}

// Throws std::runtime_error naming the op. With KIMI_NATIVE_SYNC=1 it waits for the kernel first,
// so that an error of the device names the op that caused it.
void check_launch(const char* op, cudaStream_t stream);
void check(const char* op, cudaError_t status);

// Lets a kernel have so much dynamic shared memory on the current device. What was allowed before
// stays: another thread may be about to launch with it.
void allow_shared(const char* op, const void* kernel, size_t bytes);

// How many blocks run at once, if each multiprocessor takes one.
int multiprocessors(const char* op);

// Whether the current device is Hopper (compute capability 9.0), with wgmma and TMA: no other is.
bool is_hopper(const char* op);

template <typename... P, typename... A>
void launch(const LaunchConfig& c, void (*kernel)(P...), A&&... arguments) {
  const auto stream = static_cast<cudaStream_t>(c.stream);
  allow_shared(c.op, reinterpret_cast<const void*>(kernel), c.shared_bytes);
  kernel<<<c.grid, c.block, c.shared_bytes, stream>>>(static_cast<P>(arguments)...);
  check_launch(c.op, stream);
}

template <typename F>
__device__ __forceinline__ void spin_until(F condition) {
  while (!condition()) __nanosleep(20);
}

// The input breaks a rule that only the device can see: the launch fails, and with it every later
// call on the device, instead of a wrong result. (An assertion would print the rule, and its call
// takes ten registers more.)
__device__ __forceinline__ void device_require(bool condition, const char*) {
  if (!condition) __trap();
}

#else

template <typename T>
using SharedPtr = simt::SharedPtr<T>;

#define KN_SHARED(name) \
  const kn::simt::SharedBytes name { kn::simt::self->block->shared.data() }

template <typename T>
SharedPtr<T> shared_at(simt::SharedBytes shared, int offset) {
  return SharedPtr<T>(reinterpret_cast<T*>(shared.data + offset));
}

template <typename T, typename U>
SharedPtr<T> shared_cast(SharedPtr<U> p) {
  return SharedPtr<T>(reinterpret_cast<T*>(p.raw()));
}

inline int multiprocessors(const char*) { return 3; }  // few, so that a test fills them
inline bool is_hopper(const char*) { return simt::options().hopper; }

template <typename... P, typename... A>
void launch(const LaunchConfig& c, void (*kernel)(P...), A&&... arguments) {
  simt::launch(c.op, c.grid, c.block, c.shared_bytes, kernel, static_cast<A&&>(arguments)...);
}

template <typename F>
void spin_until(F condition) {
  while (!condition()) simt::worker->spin("spin_until");
}

inline void device_require(bool condition, const char* rule) {
  if (!condition) simt::fail(rule);
}

#endif

}  // namespace kn::cuda
