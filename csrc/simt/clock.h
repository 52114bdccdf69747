// Who has seen whose work: vector clocks, the means by which unordered accesses to shared memory
// are told from ordered ones (happens-before, as in FastTrack, PLDI 2009).
//
// Component i is the latest moment of thread i that is known to have happened. A barrier of all
// threads orders everything before it, so it begins a new phase and every clock starts from zero:
// kernels that use nothing but __syncthreads never pay for a vector.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kn::simt {

class Clock {
 public:
  uint32_t at(size_t i, uint32_t phase) const {
    return phase_ == phase && i < moments_.size() ? moments_[i] : 0;
  }

  void set(size_t i, uint32_t moment, uint32_t phase, size_t width) {
    enter(phase, width);
    moments_[i] = std::max(moments_[i], moment);
  }

  void join(const Clock& other, uint32_t phase) {
    if (other.phase_ != phase || other.moments_.empty()) return;
    enter(phase, other.moments_.size());
    for (size_t i = 0; i < moments_.size(); ++i)
      moments_[i] = std::max(moments_[i], other.moments_[i]);
  }

 private:
  void enter(uint32_t phase, size_t width) {
    if (phase_ == phase && moments_.size() == width) return;
    moments_.assign(width, 0);
    phase_ = phase;
  }

  std::vector<uint32_t> moments_;
  uint32_t phase_ = 0;
};

}  // namespace kn::simt
