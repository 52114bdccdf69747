#include "report.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

#include "kimi_native/runtime.h"
#include "other_load.h"

namespace kn::bench {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Text inside a JSON string: names and shapes are plain ASCII without quotes or backslashes.
std::string quoted(const std::string& text) { return "\"" + text + "\""; }

}  // namespace

Timing measure(const std::function<void(int64_t)>& run, double budget_s, bool quick) {
  int64_t call = 0;
  const auto sample = [&](int64_t calls) {
    const auto begin = Clock::now();
    for (int64_t i = 0; i < calls; ++i) run(call++);
    return since(begin) / double(calls);
  };
  // A sample is as many calls as take 200 us, so that the clock's own cost does not show.
  const double first = sample(1);
  const double typical = first < 0.02 ? sample(2) : first;
  const int64_t calls = std::max<int64_t>(1, int64_t(200e-6 / std::max(typical, 1e-9)));
  const size_t least = quick ? 3 : 20;
  std::vector<double> samples;
  const OtherLoad load;
  const auto begin = Clock::now();
  while (samples.size() < least || (since(begin) < budget_s && samples.size() < 1000))
    samples.push_back(sample(calls));
  const double others = load.share();
  std::sort(samples.begin(), samples.end());
  const size_t n = samples.size();
  const double median = samples[n / 2];
  return {median, 0.5 * (samples[n * 3 / 4] - samples[n / 4]) / median, int(n), others};
}

Report::Report(const Options& options, const std::vector<int>& thread_counts)
    : options_(options), thread_counts_(thread_counts) {
  limits_ = measure_limits(thread_counts, options.quick ? 2 : 3);
  if (options.json) {
    print_limits(limits_, true);
    return;
  }
  std::printf(
      "# isa=%s, last-level cache %.0f MiB, weights rotate through %.0f MiB (at most %.0f) on %s "
      "pages,\n# median ± half the quartile distance; others: core time taken by other processes\n",
      active_isa().c_str(), double(last_level_cache_bytes()) / 1048576.0,
      double(rotation_bytes()) / 1048576.0, double(kMaxRotationBytes) / 1048576.0,
      options.pages == Pages::k2MiB ? "2 MiB" : "4 KiB");
  for (const auto& [threads, l] : limits_) {
    std::printf("# limits, threads=%d: read %.1f GB/s (%s pages, %s)", threads,
                l.best_read().bytes_per_s * 1e-9, l.best_read().pages.c_str(),
                l.best_read().pattern.c_str());
    for (const auto& [unit, peak] : l.peaks) std::printf(", %s %.0f", unit.c_str(), peak * 1e-9);
    std::printf(" G/s");
    if (l.others > 0.1) std::printf(" | others %.0f %%", l.others * 100);
    std::printf("\n");
  }
}

bool Report::wants(const std::string& shape) const {
  if (options_.shape.empty()) return shape.rfind("tiny", 0) != 0;
  return shape.find(options_.shape) != std::string::npos;
}

std::vector<int64_t> Report::token_counts(const std::vector<int64_t>& usual) const {
  if (!options_.tokens.empty()) return options_.tokens;
  if (!options_.quick || usual.size() < 3) return usual;
  return {usual[0], usual[2]};
}

void Report::time(const Case& c, const std::function<void(int64_t)>& run) {
  const Timing t = measure(run, options_.budget_s, options_.quick);
  const Share share = share_of_limit(t, c.work);
  if (options_.json)
    print_json(c, t, share);
  else
    print_text(c, t, share);
  std::fflush(stdout);
  ++lines_;
}

// The limit that binds: time at the read limit against time at the peak of the fastest unit that
// the kernel tier in use could form the result with. By int8 dot products an exact one takes two
// products each (low and high limb of the activation).
Report::Share Report::share_of_limit(const Timing& t, const Work& w) const {
  if (w.cached) return {"cache", 0.0};
  const Limits& l = limits_.at(num_threads());
  std::pair<std::string, double> unit = {"fp32", l.peak("fp32")};
  const auto consider = [&](const std::string& name, double rate) {
    if (rate > unit.second) unit = {name, rate};
  };
  const bool one_limb = w.compute == Compute::kInt8;
  const auto consider_limbs = [&](const std::string& name) {
    consider(one_limb ? name : name + "/2", l.peak(name) / (one_limb ? 1 : 2));
  };
  if (w.limbs) consider_limbs("int8_dot");
  if (w.dots && active_isa().starts_with("a") && active_isa() != "avx2")
    consider("bf16_dot", l.peak("bf16_dot"));
  if (active_isa() == "amx") {
    consider("amx_bf16", l.peak("amx_bf16"));
    if (w.limbs) consider_limbs("amx_int8");
  }
  const double read = w.bytes / l.best_read().bytes_per_s, compute = w.flops / unit.second;
  if (read >= compute) return {"read", read / t.seconds};
  return {unit.first, compute / t.seconds};
}

void Report::print_text(const Case& c, const Timing& t, const Share& share) const {
  std::printf("%-20s %-7s threads=%-2d tokens=%-4d %-32s | %10.1f us ±%4.1f%% | %6.1f GB/s",
              (c.op + (c.work.compute == Compute::kInt8 ? " (int8)" : "")).c_str(),
              active_isa().c_str(), num_threads(), int(c.tokens), c.shape.c_str(), t.seconds * 1e6,
              t.spread * 100, c.work.bytes / t.seconds * 1e-9);
  if (c.work.flops > 0) std::printf(" | %7.1f GFLOP/s", c.work.flops / t.seconds * 1e-9);
  if (c.work.cached)
    std::printf(" | in cache");
  else
    std::printf(" | %3.0f %% of %s limit", share.part * 100, share.limit.c_str());
  if (t.samples < 20) std::printf(" | %d samples", t.samples);
  if (t.others > 0.1) std::printf(" | others %.0f %%", t.others * 100);
  std::printf("\n");
}

void Report::print_json(const Case& c, const Timing& t, const Share& share) const {
  std::printf("{\"op\": %s, \"isa\": %s, \"threads\": %d, \"tokens\": %lld, \"shape\": %s, ",
              quoted(c.op).c_str(), quoted(active_isa()).c_str(), num_threads(),
              static_cast<long long>(c.tokens), quoted(c.shape).c_str());
  std::printf("\"time_us\": %.6g, \"spread\": %.4f, \"samples\": %d, \"others\": %.3f, ",
              t.seconds * 1e6, t.spread, t.samples, t.others);
  std::printf("\"bytes\": %.0f, \"gb_per_s\": %.4g, \"gflop_per_s\": %.4g, ", c.work.bytes,
              c.work.bytes / t.seconds * 1e-9, c.work.flops / t.seconds * 1e-9);
  std::printf("\"limit\": %s, \"percent_of_limit\": ", quoted(share.limit).c_str());
  if (c.work.cached)
    std::printf("null, ");
  else
    std::printf("%.2f, ", share.part * 100);
  std::printf("\"compute\": \"%s\", \"pages\": \"%s\"}\n",
              c.work.compute == Compute::kInt8 ? "int8" : "exact",
              options_.pages == Pages::k2MiB ? "2m" : "4k");
}

}  // namespace kn::bench
