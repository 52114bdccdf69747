// Which kernels run, and on how many threads. Process-wide settings; set them before or between
// ops, not during one.
#pragma once
#include <string>
#include <vector>

namespace kn {

// CPU features by name, as this processor and operating system offer them ("avx2", "avx512vnni",
// ...).
std::vector<std::string> cpu_features();

// Kernel tiers this machine can run, best first ("avx512", "avx2", "generic").
std::vector<std::string> supported_isas();

// The tier in use: forced by force_isa or KIMI_NATIVE_CPU_ISA, else the best supported one.
std::string active_isa();

// Force a tier; an empty name returns to the default. Throws std::runtime_error if it is not
// supported here.
void force_isa(const std::string& name);

// Threads used by ops, the caller's included. Default: the cores this process may run on.
int num_threads();
void set_num_threads(int n);

}  // namespace kn
