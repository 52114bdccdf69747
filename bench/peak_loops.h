// Loops that do nothing but one arithmetic instruction, to measure how fast this machine can.
#pragma once
#include <cstdint>
#include <vector>

namespace kn::bench {

// One unit of arithmetic. `loop(rounds)` runs its instruction on independent accumulators, enough
// of them to cover the latency, from registers alone.
struct PeakLoop {
  const char* unit;      // "fp32", "fp16", "bf16_dot", "int16_dot", "int8_dot", "amx_bf16", ...
  double ops_per_round;  // a multiply-add is two
  void (*loop)(int64_t rounds);
};

// What this processor and system offer, one loop per unit, in its widest form. Asks the kernel for
// AMX where the processor has it; call it before threads are started that shall use AMX.
std::vector<PeakLoop> peak_loops();

}  // namespace kn::bench
