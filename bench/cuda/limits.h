// What this device was measured to reach in the same run; every figure is held against it.
#pragma once
#include <string>

namespace kn::bench::gpu {

struct Limits {
  double copy = 0.0;      // bytes per second of cudaMemcpy on the device, read and written ones
  double read = 0.0;      // bytes per second of a kernel that only reads
  double bf16 = 0.0;      // FLOP per second of a large product; 0 if `no_bf16` says why not
  double launch_s = 0.0;  // of an empty kernel in a CUDA graph
  std::string no_bf16;
};

Limits measure_limits();

}  // namespace kn::bench::gpu
