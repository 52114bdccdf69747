// What other processes, and the hypervisor, took of the cores meanwhile.
#pragma once
#include <chrono>

namespace kn::bench {

class OtherLoad {
 public:
  OtherLoad();
  double share() const;  // of all cores since the constructor, 0 to 1

 private:
  std::chrono::steady_clock::time_point begin_;
  double busy_, own_;  // seconds
};

}  // namespace kn::bench
