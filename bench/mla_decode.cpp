// mla_decode: one new token per sequence over the paged latent cache, K2's and Moonlight's heads.
#include <numeric>

#include "harness.h"
#include "kimi_native/ops.h"

using namespace kn;
using namespace kn::bench;

namespace {

constexpr int64_t kLatent = 512, kRope = 64, kWidth = kLatent + kRope, kPageSize = 64;
constexpr float kScale = 0.1f;

struct Shape {
  const char* name;
  int64_t heads, batch, length;
};

std::vector<Shape> shapes(const Options& options) {
  if (options.quick) return {{"k2", 64, 1, 4096}, {"k2", 64, 16, 1024}, {"moonlight", 16, 1, 4096}};
  std::vector<Shape> all;
  for (const auto& [name, heads] : {std::pair{"k2", 64}, std::pair{"moonlight", 16}})
    for (const int64_t batch : {1, 4, 16, 64})
      for (const int64_t length : {1024, 4096, 32768})
        if (batch * length <= 4 * 32768) all.push_back({name, heads, batch, length});
  return all;
}

// The cache of `batch` sequences, its pages in shuffled order.
struct Cache {
  Buffer<bf16> rows;
  std::vector<int32_t> page_table;  // [batch, max_pages]
  int64_t max_pages;

  Cache(const Shape& s, Random& random)
      : rows(s.batch * s.length * kWidth),
        page_table(s.batch * s.length / kPageSize),
        max_pages(s.length / kPageSize) {
    fill(rows, [&] { return to_bf16(random.sign()); });
    std::iota(page_table.begin(), page_table.end(), 0);
    for (size_t i = page_table.size() - 1; i > 0; --i)
      std::swap(page_table[i], page_table[random.bits() % (i + 1)]);
  }
  bf16* token(int64_t sequence, int64_t t) {
    return &rows[(page_table[sequence * max_pages + t / kPageSize] * kPageSize + t % kPageSize) *
                 kWidth];
  }
};

// One head by a full softmax in double.
void check_head(Buffer<float>& q, Cache& cache, Buffer<float>& out, const Shape& s, int64_t b,
                int64_t h) {
  std::vector<double> weights(s.length);
  double largest = -1e300, sum = 0.0;
  for (int64_t t = 0; t < s.length; ++t) {
    for (int64_t i = 0; i < kWidth; ++i)
      weights[t] += kScale * q[(b * s.heads + h) * kWidth + i] * to_float(cache.token(b, t)[i]);
    largest = std::max(largest, weights[t]);
  }
  for (double& w : weights) sum += w = std::exp(w - largest);
  for (int64_t c = 0; c < kLatent; c += 37) {
    double expected = 0.0;
    for (int64_t t = 0; t < s.length; ++t)
      expected += weights[t] / sum * to_float(cache.token(b, t)[c]);
    expect_close("mla_decode", out[(b * s.heads + h) * kLatent + c], expected, 1e-3);
  }
}

void bench_shape(const Shape& s, Report& report) {
  Random random;
  const int64_t cache_bytes = 2 * s.batch * s.length * kWidth;
  std::vector<Cache> caches;
  for (int64_t i = num_copies(cache_bytes); i > 0; --i) caches.emplace_back(s, random);
  Buffer<float> q(s.batch * s.heads * kWidth), out(s.batch * s.heads * kLatent);
  fill(q, [&] { return random.sign(); });
  const std::vector<int32_t> seq_lens(s.batch, int32_t(s.length));
  MlaDecodeArgs a{q.data(),
                  caches[0].rows.data(),
                  caches[0].page_table.data(),
                  seq_lens.data(),
                  out.data(),
                  DType::kFp32,
                  DType::kBf16,
                  s.batch,
                  s.heads,
                  kLatent,
                  kRope,
                  int64_t(caches[0].page_table.size()),
                  kPageSize,
                  caches[0].max_pages,
                  kScale,
                  nullptr,
                  0};
  Buffer<uint8_t> workspace(cpu::mla_decode_workspace_bytes(a));
  a.workspace = workspace.data();
  a.workspace_bytes = workspace.size();
  const auto run = [&](int64_t call) {
    Cache& cache = caches[call % caches.size()];
    a.cache = cache.rows.data();
    a.page_table = cache.page_table.data();
    cpu::mla_decode(a);
  };
  run(0);
  check_head(q, caches[0], out, s, 0, 0);
  check_head(q, caches[0], out, s, s.batch - 1, s.heads - 1);
  const Work work{.bytes = double(cache_bytes + 4 * s.batch * s.heads * (kWidth + kLatent)),
                  .flops = 2.0 * double(s.batch * s.heads * s.length * (kWidth + kLatent))};
  report.line(
      "mla_decode",
      concat("batch=", s.batch, " heads=", s.heads, " length=", s.length, " (", s.name, ")"),
      measure(run), work);
}

void program(const Options& options) {
  Report report(options);
  for (const int threads : thread_counts()) {
    set_num_threads(threads);
    for (const Shape& s : shapes(options)) bench_shape(s, report);
  }
}

}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, program); }
