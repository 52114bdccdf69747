// What the benchmark programs share: random weights that rotate through more than the last-level
// cache, and the report of what was timed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "kimi_native/runtime.h"
#include "memory.h"
#include "report.h"
#include "values.h"

namespace kn::bench {

// Activations, results and workspaces.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : memory_(n * int64_t(sizeof(T)), Pages::k2MiB), n_(n) {}
  template <typename F>
  Buffer(int64_t n, F&& entry) : Buffer(n) {
    fill(data(), n, entry);
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return n_; }

 private:
  Memory memory_;
  int64_t n_;
};

// Copies of weights of one size, one after the other in one piece of memory. Each starts 8 bytes
// past a cache line, as most tensors of a mapped safetensors file do.
class Rotation {
 public:
  Rotation(int64_t copies, int64_t bytes, Pages pages)
      : copies_(copies), stride_((bytes + 127) / 64 * 64), memory_(copies * stride_ + 64, pages) {}
  uint8_t* copy(int64_t i) const { return memory_.data() + i % copies_ * stride_ + 8; }
  int64_t copies() const { return copies_; }
  bool fits_cache() const { return copies_ * stride_ <= last_level_cache_bytes(); }

 private:
  int64_t copies_, stride_;
  Memory memory_;
};

// Gives an op's Args the scratch it asks for.
template <typename Args>
Buffer<uint8_t> give_workspace(Args& a, int64_t bytes) {
  Buffer<uint8_t> workspace(bytes);
  a.workspace = workspace.data();
  a.workspace_bytes = bytes;
  return workspace;
}

// One per op, plus moe_layer; each checks its results, then times every case the report wants.
namespace programs {
void add_rms_norm(Report&);
void bf16_gemm(Report&);
void int4_gemm(Report&);
void int4_grouped_gemm(Report&);
void int4_grouped_swiglu(Report&);
void int4_quantize(Report&);
void int8_gemm(Report&);
void mla_decode(Report&);
void moe_combine(Report&);
void moe_dispatch(Report&);
void moe_layer(Report&);
void moe_route(Report&);
void rms_norm(Report&);
void rope_append(Report&);
void swiglu(Report&);
}  // namespace programs

}  // namespace kn::bench
