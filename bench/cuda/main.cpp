// kn_cuda_bench: times the CUDA kernels against what this GPU was measured to reach.
#include <cstdio>
#include <exception>
#include <utility>

#include "programs.h"

namespace kn::bench::gpu {
namespace {

const std::pair<const char*, void (*)(Report&)> kPrograms[] = {
    {"moe_layer", programs::moe_layer},     {"mla_decode", programs::mla_decode},
    {"int4_gemm", programs::int4_gemm},     {"bf16_gemm", programs::bf16_gemm},
    {"int8_gemm", programs::int8_gemm},     {"moe_routing", programs::moe_routing},
    {"elementwise", programs::elementwise}, {"int4_pack", programs::int4_pack}};

std::string usage() {
  std::string text =
      "usage: kn_cuda_bench [PROGRAM ...] [--tokens N,...] [--shape TEXT]\n"
      "                     [--time-budget SECONDS] [--quick] [--json]\n"
      "Programs: list limits";
  for (const auto& [name, run] : kPrograms) text += std::string(" ") + name;
  return text +
         "\n(default: all but list, which prints their names, and limits, which prints nothing\n"
         "else). --shape keeps the shapes whose text contains TEXT. --time-budget is for one "
         "case.\n";
}

bool asked(const Options& options, const std::string& name) {
  return std::find(options.programs.begin(), options.programs.end(), name) !=
         options.programs.end();
}

void check(const Options& options) {
  if (!options.threads.empty() || options.pages != Pages::k2MiB)
    throw UsageError{"--threads, --pages: are options of kn_bench"};
  for (const std::string& name : options.programs) {
    bool known = name == "list" || name == "limits";
    for (const auto& [program, run] : kPrograms) known |= name == program;
    if (!known) throw UsageError{name + ": no such program"};
  }
}

// A program that fails does not keep the next one from its figures; the exit code tells.
int run(const Options& options) {
  if (asked(options, "list")) {
    for (const auto& [name, program] : kPrograms) std::printf("%s\n", name);
    return 0;
  }
  Report report(options);
  if (asked(options, "limits") && options.programs.size() == 1) return 0;
  int failed = 0;
  for (const auto& [name, program] : kPrograms) {
    if (!options.programs.empty() && !asked(options, name)) continue;
    try {
      program(report);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", name, error.what());
      ++failed;
    }
  }
  if (report.lines() == 0 && !failed) {
    std::fprintf(stderr, "kn_cuda_bench: no case matches (shape=%s)\n", options.shape.c_str());
    return 1;
  }
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace kn::bench::gpu

int main(int argc, char** argv) {
  using namespace kn::bench;
  try {
    const Options options = parse_options(argc, argv);
    gpu::check(options);
    return gpu::run(options);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "%s\n%s", error.text.c_str(), gpu::usage().c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
