#include "other_load.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace kn::bench {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds that the cores were busy, all processes and the hypervisor's thefts together.
double busy_seconds() {
  std::ifstream file("/proc/stat");
  std::string cpu;
  double user = 0, nice = 0, system = 0, idle, iowait, irq = 0, softirq = 0, steal = 0;
  file >> cpu >> user >> nice >> system >> idle >> iowait >> irq >> softirq >> steal;
  return (user + nice + system + irq + softirq + steal) / double(sysconf(_SC_CLK_TCK));
}

double own_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

OtherLoad::OtherLoad() : begin_(Clock::now()), busy_(busy_seconds()), own_(own_seconds()) {}

double OtherLoad::share() const {
  const double wall = std::chrono::duration<double>(Clock::now() - begin_).count();
  const double others = (busy_seconds() - busy_) - (own_seconds() - own_);
  return std::clamp(others / (wall * double(sysconf(_SC_NPROCESSORS_ONLN))), 0.0, 1.0);
}

}  // namespace kn::bench
