// Prints the machine's limits per thread count; every other program measures them again for itself.
#include "harness.h"
#include "machine_limits.h"

using namespace kn;
using namespace kn::bench;

static void program(const Options& options) {
  const int all = num_threads();
  for (int threads = 1;; threads = std::min(threads * 2, all)) {
    const Limits limits =
        measure_limits(threads, (options.quick ? 2 : 8) * last_level_cache_bytes());
    std::printf(
        options.json
            ? "{\"threads\": %d, \"read_bytes\": %.4g, \"fp32_flops\": %.4g, \"int8_ops\": %.4g}\n"
            : "threads=%-3d read %.4g B/s, fp32 multiply-add %.4g FLOP/s, int8 dot product %.4g "
              "OP/s\n",
        threads, limits.read_bytes, limits.fp32_flops, limits.int8_ops);
    if (threads >= all) break;
  }
}

int main(int argc, char** argv) { return run_main(argc, argv, program); }
