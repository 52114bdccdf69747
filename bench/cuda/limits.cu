#include <algorithm>
#include <functional>

#include "cuda/device.cuh"
#include "device_buffer.h"
#include "limits.h"

namespace kn::bench::gpu {
namespace {

constexpr int kThreads = 256, kInFlight = 8;  // 16-byte loads of a thread before the first is used

__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* from, int64_t rounds, unsigned* out) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  const uint4* at = from + int64_t(blockIdx.x) * kThreads + threadIdx.x;
  unsigned sum = 0;
  for (int64_t r = 0; r < rounds; ++r) {
    uint4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) v[i] = at[(r * kInFlight + i) * threads];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  if (sum == 0x9e3779b9) *out = sum;  // hardly ever, but the loads must be made
}

__global__ void empty_kernel() {}

// The best of many replays, after a first call that loads the kernel: a limit is what the device
// can do.
double best(int times, const std::function<void()>& enqueue) {
  enqueue();
  synchronize("limits");
  const Graph graph(enqueue);
  double least = graph.replay_seconds();
  for (int i = 1; i < times; ++i) least = std::min(least, graph.replay_seconds());
  return least;
}

double read_bytes_per_s(int times, int blocks, const RandomBuffer<uint32_t>& from, unsigned* out) {
  const int64_t round = int64_t(blocks) * kThreads * kInFlight * int64_t(sizeof(uint4));
  const int64_t rounds = from.size() * 4 / round;
  const double seconds = best(times, [&] {
    cuda::launch({"read_limit", dim3(unsigned(blocks)), dim3(kThreads), 0, stream()}, read_kernel,
                 reinterpret_cast<const uint4*>(from.data()), rounds, out);
  });
  return double(rounds * round) / seconds;
}

}  // namespace

Limits measure_limits() {
  const int times = kRehearsal ? 1 : 30, launches = kRehearsal ? 2 : 1000;
  const int64_t bytes = kRehearsal ? 1 << 20 : int64_t(4) << 30;
  const int blocks = device().multiprocessors;
  Random random;
  const RandomBuffer<uint32_t> from(bytes / 4, [&] { return random.bits(); });
  const DeviceBuffer<uint32_t> to(bytes / 4);
  Limits l;
  l.copy = 2.0 * double(bytes) / best(times, [&] { enqueue_copy(to.data(), from.data(), bytes); });
  for (const int each : {4, 8})
    l.read = std::max(l.read, read_bytes_per_s(times, each * blocks, from, to.data()));
  const double all = best(times, [&] {
    for (int i = 0; i < launches; ++i)
      cuda::launch({"launch_limit", dim3(1), dim3(32), 0, stream()}, empty_kernel);
  });
  l.launch_s = all / launches;
  l.bf16 = matmul_flops(l.no_bf16);
  return l;
}

}  // namespace kn::bench::gpu
