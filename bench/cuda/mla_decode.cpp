// mla_decode: one new token per sequence over the paged latent cache, K2's heads, in bf16 and fp8
// rows. The tokens of a case are its sequences.
#include <cmath>
#include <numeric>

#include "../latent_rows.h"
#include "programs.h"

namespace kn::bench::gpu {
namespace {

constexpr int64_t kPageSize = 64, kBlockRows = 4099;  // a prime: no two pages are the same
// Scores spread so far that a few dozen of 131072 tokens make the sum: a mean of all of them would
// be as small as the bound of its error.
constexpr float kScale = 0.35f;

struct Shape {
  const char* name;
  int64_t heads, length;
  std::vector<int64_t> batches;
};
const Shape kShapes[] = {{"k2", 64, 1024, {1, 128}},        {"k2", 64, 4096, {1, 8, 128}},
                         {"k2", 64, 32768, {1, 8, 64}},     {"k2", 64, 131072, {1, 8}},
                         {"moonlight", 16, 4096, {1, 128}}, {"tiny", 20, 640, {1, 3}}};

// Several caches of `batch` sequences each, their pages in one shuffled order.
struct Caches {
  DType dtype;
  int64_t length, batch, max_pages, copies;
  Random random;
  RandomBuffer<uint8_t> rows;
  std::vector<int32_t> page_table;  // [batch, max_pages]

  Caches(DType dtype, int64_t length, int64_t batch, const Report& report)
      : dtype(dtype),
        length(length),
        batch(batch),
        max_pages(length / kPageSize),
        copies(report.num_copies(bytes())),
        rows(copies * bytes(), kBlockRows * row_bytes(dtype),
             [&](uint8_t* block, int64_t count) {
               for (int64_t at = 0; at < count; at += row_bytes(dtype))
                 fill_row(dtype, block + at, random);
             }),
        page_table(batch * max_pages) {
    std::iota(page_table.begin(), page_table.end(), 0);
    for (size_t i = page_table.size() - 1; i > 0; --i)
      std::swap(page_table[i], page_table[random.bits() % (i + 1)]);
  }
  int64_t bytes() const { return batch * length * row_bytes(dtype); }
  const uint8_t* cache(int64_t i) const { return rows.data() + i % copies * bytes(); }
  const uint8_t* host_row(int64_t sequence, int64_t t) const {  // of cache 0
    const int64_t page = page_table[sequence * max_pages + t / kPageSize];
    return rows.at((page * kPageSize + t % kPageSize) * row_bytes(dtype));
  }
};

// One head of cache 0 by a full softmax in double. Weights and result are rounded to bf16: 2^-8 of
// what the sum holds, each. A score is off by 580 u of its absolute terms, at most half of kWidth
// here, and enters twice, above and below the fraction line.
constexpr double kBound = 0x1p-7 + 2 * 580 * 0x1p-24 * kScale * double(kWidth) / 2;

void check_head(const RandomBuffer<bf16>& q, const Caches& caches, const DeviceBuffer<bf16>& out,
                int64_t heads, int64_t b, int64_t h) {
  std::vector<double> weights(caches.length);
  double largest = -1e300, total = 0.0;
  for (int64_t t = 0; t < caches.length; ++t) {
    const uint8_t* row = caches.host_row(b, t);
    for (int64_t i = 0; i < kWidth; ++i)
      weights[t] +=
          kScale * to_float(q[(b * heads + h) * kWidth + i]) * value_of(caches.dtype, row, i);
    largest = std::max(largest, weights[t]);
  }
  for (double& w : weights) total += w = std::exp(w - largest);
  const std::vector<bf16> got = out.read((b * heads + h) * kLatent, kLatent);
  for (int64_t c = 0; c < kLatent; c += 37) {
    Product p;
    for (int64_t t = 0; t < caches.length; ++t)
      p.add(weights[t] / total * value_of(caches.dtype, caches.host_row(b, t), c));
    expect_close("mla_decode", to_float(got[c]), p.value, kBound * p.magnitude + 1e-4);
  }
}

void time_case(const Shape& s, const std::string& text, const Caches& caches, Report& report) {
  Random random;
  const int64_t batch = caches.batch;
  const RandomBuffer<bf16> q = random_bf16(batch * s.heads * kWidth, random);
  const DeviceBuffer<bf16> out(batch * s.heads * kLatent);
  const DeviceBuffer<int32_t> page_table(caches.page_table);
  const DeviceBuffer<int32_t> seq_lens(std::vector<int32_t>(batch, int32_t(s.length)));
  MlaDecodeArgs a{};
  a.q = q.data();
  a.page_table = page_table.data();
  a.seq_lens = seq_lens.data();
  a.out = out.data();
  a.q_dtype = DType::kBf16;
  a.cache_dtype = caches.dtype;
  a.batch = batch;
  a.heads = s.heads;
  a.kv_lora_rank = kLatent;
  a.qk_rope_head_dim = kRope;
  a.pages = page_table.size();
  a.page_size = kPageSize;
  a.max_pages = caches.max_pages;
  a.softmax_scale = kScale;
  // Once for all layers of a step: not in the time of one.
  cuda::MlaScheduleArgs lengths{a.seq_lens, batch, a.max_pages * a.page_size, 0, nullptr, 0};
  const auto splits = give_workspace(lengths, cuda::mla_schedule_workspace_bytes(lengths));
  cuda::mla_schedule(lengths, stream());
  a.splits = splits.data();
  const auto workspace = give_workspace(a, cuda::mla_decode_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.cache = caches.cache(call);
    cuda::mla_decode(a, stream());
  };
  run(0);
  synchronize("mla_decode");
  check_head(q, caches, out, s.heads, 0, 0);
  check_head(q, caches, out, s.heads, batch - 1, s.heads - 1);
  const Work work{.bytes = double(caches.bytes() + 2 * batch * s.heads * (kWidth + kLatent)),
                  .flops = 2.0 * double(batch * s.length * s.heads * (kWidth + kLatent))};
  report.time({"mla_decode", text, batch, work}, caches.copies, run);
}

}  // namespace

void programs::mla_decode(Report& report) {
  for (const Shape& s : kShapes)
    for (const DType dtype : {DType::kBf16, DType::kFp8}) {
      const char* suffix = dtype == DType::kFp8 ? "-fp8" : "";
      const std::string text = concat(s.name, suffix, " heads=", s.heads, " length=", s.length);
      if (!report.wants(text)) continue;
      for (const int64_t batch : report.token_counts(s.batches)) {
        const Caches caches(dtype, s.length, batch, report);
        time_case(s, text, caches, report);
      }
    }
}

}  // namespace kn::bench::gpu
