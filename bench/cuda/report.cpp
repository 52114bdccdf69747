#include "report.h"

#include <algorithm>
#include <cstdio>

namespace kn::bench::gpu {
namespace {

constexpr int kSamples = 20;
constexpr double kGraphSeconds = 400e-6;  // so that events, which tick in half microseconds, do
constexpr int64_t kMostCalls = 2048;      // not show

// Names and shapes are plain ASCII without quotes or backslashes.
std::string quoted(const std::string& text) { return "\"" + text + "\""; }

}  // namespace

Report::Report(const Options& options) : options_(options), device_(gpu::device()) {
  limits_ = measure_limits();
  print_limits();
}

bool Report::wants(const std::string& shape) const {
  const bool tiny = shape.rfind("tiny", 0) == 0;
  if (options_.shape.empty()) return tiny == kRehearsal;
  return shape.find(options_.shape) != std::string::npos;
}

std::vector<int64_t> Report::token_counts(const std::vector<int64_t>& usual) const {
  if (!options_.tokens.empty()) return options_.tokens;
  std::vector<int64_t> counts = usual;
  if (options_.quick && usual.size() > 2) counts = {usual[0], usual[2]};
  if (kRehearsal) std::erase_if(counts, [](int64_t tokens) { return tokens > 256; });
  return counts;
}

int64_t Report::num_copies(int64_t bytes) const {
  const int64_t rotation = 5 * device_.cache_bytes;
  return std::clamp<int64_t>((rotation + bytes - 1) / bytes, 2, kRehearsal ? 3 : 512);
}

bool Report::has_room(const std::string& shape, int64_t bytes) const {
  if (bytes < gpu::device().free_bytes) return true;
  std::fprintf(stderr, "%s: left out, needs %.1f GB of device memory (free: %.1f)\n", shape.c_str(),
               double(bytes) * 1e-9, double(gpu::device().free_bytes) * 1e-9);
  return false;
}

void Report::time(const Case& c, int64_t rotation, const std::function<void(int64_t)>& run) {
  const Timing t = measure(rotation, run);
  const Share share = share_of_limit(t, c.work);
  if (options_.json)
    print_json(c, t, share);
  else
    print_text(c, t, share);
  std::fflush(stdout);
  ++lines_;
}

Report::Timing Report::measure(int64_t rotation, const std::function<void(int64_t)>& run) const {
  const auto calls_of = [&](int64_t calls) {
    return [&run, calls] {
      for (int64_t i = 0; i < calls; ++i) run(i);
    };
  };
  int64_t calls = rotation, least = kSamples;
  if (kRehearsal) {  // that the calls work is all it can tell
    calls = least = 1;
  } else {
    run(0);  // a kernel's code is loaded at its first launch, which a capture may not allow
    synchronize("first call");
    const Graph once(calls_of(rotation));
    const double first = std::min(once.replay_seconds(), once.replay_seconds());
    if (first < kGraphSeconds)
      calls *= std::min(int64_t(kGraphSeconds / std::max(first, 1e-7)) + 1,
                        std::max<int64_t>(kMostCalls / rotation, 1));
  }
  const Graph graph(calls_of(calls));
  for (int64_t i = 0; i < least / 4; ++i) graph.replay_seconds();
  const double budget = kRehearsal ? 0.0 : options_.budget_s;
  std::vector<double> samples;
  double spent = 0.0;
  while (int64_t(samples.size()) < least || (spent < budget && samples.size() < 1000)) {
    const double s = graph.replay_seconds();
    spent += s;
    samples.push_back(s / double(calls));
  }
  std::sort(samples.begin(), samples.end());
  const size_t n = samples.size();
  const double median = samples[n / 2];
  return {median, 0.5 * (samples[n * 3 / 4] - samples[n / 4]) / median, int(n), calls};
}

// The limit that binds: the bytes at the read limit, or the products at the rate of a large bf16
// product. Where that was not measured, bytes alone.
Report::Share Report::share_of_limit(const Timing& t, const Work& w) const {
  if (w.cached) return {"cache", 0.0};
  const double read = w.bytes / limits_.read;
  const double compute = limits_.bf16 > 0 ? w.flops / limits_.bf16 : 0.0;
  if (read >= compute) return {"read", read / t.seconds};
  return {"bf16", compute / t.seconds};
}

void Report::print_limits() const {
  const Limits& l = limits_;
  if (!options_.json) {
    std::printf("# %s, %s, %d multiprocessors, L2 %.0f MiB; median ± half the quartile distance\n",
                device_.name.c_str(), device_.isa.c_str(), device_.multiprocessors,
                double(device_.cache_bytes) / 1048576.0);
    std::printf("# limits: read %.0f GB/s, copy %.0f GB/s, bf16 %.0f TFLOP/s%s%s, launch %.2f us\n",
                l.read * 1e-9, l.copy * 1e-9, l.bf16 * 1e-12, l.no_bf16.empty() ? "" : ": ",
                l.no_bf16.c_str(), l.launch_s * 1e6);
    return;
  }
  const std::string start =
      "{\"op\": \"limits\", \"device\": " + quoted(device_.name) + ", \"threads\": 0, \"limit\": ";
  std::printf("%s\"read\", \"gb_per_s\": %.5g}\n", start.c_str(), l.read * 1e-9);
  std::printf("%s\"copy\", \"gb_per_s\": %.5g}\n", start.c_str(), l.copy * 1e-9);
  std::printf("%s\"launch\", \"time_us\": %.4g}\n", start.c_str(), l.launch_s * 1e6);
  if (l.bf16 > 0)
    std::printf("%s\"bf16\", \"gflop_per_s\": %.6g}\n", start.c_str(), l.bf16 * 1e-9);
  else
    std::fprintf(stderr, "no bf16 limit: %s\n", l.no_bf16.c_str());
}

void Report::print_text(const Case& c, const Timing& t, const Share& share) const {
  std::printf("%-20s tokens=%-4d %-44s | %9.2f us ±%4.1f%% | %7.1f GB/s", c.op.c_str(),
              int(c.tokens), c.shape.c_str(), t.seconds * 1e6, t.spread * 100,
              c.work.bytes / t.seconds * 1e-9);
  if (c.work.flops > 0) std::printf(" | %6.1f TFLOP/s", c.work.flops / t.seconds * 1e-12);
  if (c.work.cached)
    std::printf(" | in cache");
  else
    std::printf(" | %3.0f %% of %s limit", share.part * 100, share.limit.c_str());
  if (c.work.hit > 0) std::printf(" | %.1f experts hit", c.work.hit);
  std::printf("\n");
}

void Report::print_json(const Case& c, const Timing& t, const Share& share) const {
  std::printf("{\"op\": %s, \"isa\": %s, \"device\": %s, \"threads\": 0, \"tokens\": %lld, ",
              quoted(c.op).c_str(), quoted(device_.isa).c_str(), quoted(device_.name).c_str(),
              static_cast<long long>(c.tokens));
  std::printf(
      "\"shape\": %s, \"time_us\": %.6g, \"spread\": %.4f, \"samples\": %d, \"calls\": %d, ",
      quoted(c.shape).c_str(), t.seconds * 1e6, t.spread, t.samples, int(t.calls));
  std::printf("\"bytes\": %.0f, \"gb_per_s\": %.6g, \"gflop_per_s\": %.6g, ", c.work.bytes,
              c.work.bytes / t.seconds * 1e-9, c.work.flops / t.seconds * 1e-9);
  if (c.work.hit > 0) std::printf("\"experts_hit\": %.1f, ", c.work.hit);
  std::printf("\"limit\": %s, \"percent_of_limit\": ", quoted(share.limit).c_str());
  if (c.work.cached)
    std::printf("null, ");
  else
    std::printf("%.2f, ", share.part * 100);
  std::printf("\"compute\": \"exact\"}\n");
}

}  // namespace kn::bench::gpu
