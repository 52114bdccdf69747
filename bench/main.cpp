// kn_bench: times the kernels of this machine against its measured limits.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <thread>
#include <utility>

#include "harness.h"

namespace kn::bench {

namespace {

const std::pair<const char*, void (*)(Report&)> kPrograms[] = {
    {"int4_gemm", programs::int4_gemm},
    {"int4_grouped_swiglu", programs::int4_grouped_swiglu},
    {"int4_grouped_gemm", programs::int4_grouped_gemm},
    {"moe_layer", programs::moe_layer},
    {"moe_route", programs::moe_route},
    {"moe_dispatch", programs::moe_dispatch},
    {"moe_combine", programs::moe_combine},
    {"bf16_gemm", programs::bf16_gemm},
    {"int8_gemm", programs::int8_gemm},
    {"int4_quantize", programs::int4_quantize},
    {"mla_decode", programs::mla_decode},
    {"rms_norm", programs::rms_norm},
    {"add_rms_norm", programs::add_rms_norm},
    {"rope_append", programs::rope_append},
    {"swiglu", programs::swiglu}};

std::vector<std::string> program_names() {
  std::vector<std::string> names = {"limits"};
  for (const auto& [name, run] : kPrograms) names.push_back(name);
  return names;
}

void check_programs(const Options& options) {
  const std::vector<std::string> known = program_names();
  for (const std::string& name : options.programs)
    if (std::find(known.begin(), known.end(), name) == known.end())
      throw UsageError{name + ": no such program"};
}

void run(const Options& options) {
  const auto asked = [&](const std::string& name) {
    return std::find(options.programs.begin(), options.programs.end(), name) !=
           options.programs.end();
  };
  std::vector<int> threads = options.threads;
  if (threads.empty()) threads = {1};
  if (options.threads.empty() && num_threads() > 1) threads.push_back(num_threads());
  const int cores = int(std::max(1u, std::thread::hardware_concurrency()));
  if (const int most = *std::max_element(threads.begin(), threads.end()); most > cores)
    throw UsageError{concat("--threads: must be at most the ", cores, " cores (got ", most, ")")};
  if (asked("limits")) {
    print_limits(measure_limits(threads, options.quick ? 2 : 12), options.json);
    if (options.programs.size() == 1) return;
  }
  Report report(options, threads);
  for (const auto& [name, program] : kPrograms)
    if (options.programs.empty() || asked(name)) program(report);
  if (report.lines() == 0)
    throw std::runtime_error("kn_bench: no case matches (shape=" + options.shape + ")");
}

}  // namespace
}  // namespace kn::bench

int main(int argc, char** argv) {
  using namespace kn::bench;
  try {
    const Options options = parse_options(argc, argv);
    check_programs(options);
    run(options);
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
      throw std::runtime_error("kn_bench: the results could not be written");
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "%s\n%s", error.text.c_str(), usage(program_names()).c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
