// mla_decode: one new token per sequence over the paged latent cache, K2's and Moonlight's heads,
// in bf16 and in fp8 rows. The tokens of a case are its sequences.
#include <cmath>
#include <numeric>

#include "harness.h"
#include "kimi_native/ops.h"
#include "latent_rows.h"

namespace kn::bench {
namespace {

constexpr int64_t kPageSize = 64;
constexpr float kScale = 0.1f;

struct Shape {
  const char* name;
  int64_t heads, length;
  DType cache = DType::kBf16;
};
const Shape kShapes[] = {{"k2", 64, 1024},
                         {"k2", 64, 8192},
                         {"k2", 64, 32768},
                         {"moonlight", 16, 1024},
                         {"moonlight", 16, 8192},
                         {"moonlight", 16, 32768},
                         {"k2-fp8", 64, 8192, DType::kFp8},
                         {"moonlight-fp8", 16, 8192, DType::kFp8},
                         {"tiny", 4, 128}};
constexpr int64_t kMaxCached = 8 * 32768;  // tokens of all sequences of one call

// Several caches of `batch` sequences each, their pages in one shuffled order.
struct Caches {
  DType dtype;
  int64_t length, batch, max_pages;
  Rotation rows;
  std::vector<int32_t> page_table;  // [batch, max_pages]

  Caches(const Shape& s, int64_t batch, Pages pages)
      : dtype(s.cache),
        length(s.length),
        batch(batch),
        max_pages(s.length / kPageSize),
        rows(num_copies(bytes()), bytes(), pages),
        page_table(batch * max_pages) {
    Random random;
    for (int64_t i = 0; i < rows.copies(); ++i)
      for (int64_t r = 0; r < batch * length; ++r)
        fill_row(dtype, cache(i) + r * row_bytes(dtype), random);
    std::iota(page_table.begin(), page_table.end(), 0);
    for (size_t i = page_table.size() - 1; i > 0; --i)
      std::swap(page_table[i], page_table[random.bits() % (i + 1)]);
  }
  int64_t bytes() const { return batch * length * row_bytes(dtype); }
  uint8_t* cache(int64_t i) const { return reinterpret_cast<uint8_t*>(rows.copy(i)); }
  const uint8_t* token(int64_t sequence, int64_t t) const {
    const int64_t page = page_table[sequence * max_pages + t / kPageSize];
    return cache(0) + (page * kPageSize + t % kPageSize) * row_bytes(dtype);
  }
};

// One head of cache 0 by a full softmax in double.
void check_head(const Buffer<float>& q, const Caches& caches, const Buffer<float>& out,
                int64_t heads, int64_t b, int64_t h) {
  std::vector<double> weights(caches.length);
  double largest = -1e300, sum = 0.0;
  for (int64_t t = 0; t < caches.length; ++t) {
    for (int64_t i = 0; i < kWidth; ++i)
      weights[t] +=
          kScale * q[(b * heads + h) * kWidth + i] * value_of(caches.dtype, caches.token(b, t), i);
    largest = std::max(largest, weights[t]);
  }
  for (double& w : weights) sum += w = std::exp(w - largest);
  for (int64_t c = 0; c < kLatent; c += 37) {
    double expected = 0.0;
    for (int64_t t = 0; t < caches.length; ++t)
      expected += weights[t] / sum * value_of(caches.dtype, caches.token(b, t), c);
    expect_close("mla_decode", out[(b * heads + h) * kLatent + c], expected, 1e-3);
  }
}

void time_threads(const Shape& s, const std::string& text, const Caches& caches, Report& report) {
  Random random;
  const int64_t batch = caches.batch;
  const Buffer<float> q(batch * s.heads * kWidth, [&] { return random.sign(); });
  const Buffer<float> out(batch * s.heads * kLatent);
  const std::vector<int32_t> seq_lens(batch, int32_t(s.length));
  MlaDecodeArgs a{};
  a.q = q.data();
  a.page_table = caches.page_table.data();
  a.seq_lens = seq_lens.data();
  a.out = out.data();
  a.q_dtype = DType::kFp32;
  a.cache_dtype = s.cache;
  a.batch = batch;
  a.heads = s.heads;
  a.kv_lora_rank = kLatent;
  a.qk_rope_head_dim = kRope;
  a.pages = int64_t(caches.page_table.size());
  a.page_size = kPageSize;
  a.max_pages = caches.max_pages;
  a.softmax_scale = kScale;
  const auto workspace = give_workspace(a, cpu::mla_decode_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.cache = caches.cache(call);
    cpu::mla_decode(a);
  };
  run(0);
  check_head(q, caches, out, s.heads, 0, 0);
  check_head(q, caches, out, s.heads, batch - 1, s.heads - 1);
  const int64_t cached = batch * s.length;
  const Work work{.bytes = double(caches.bytes() + 4 * batch * s.heads * (kWidth + kLatent)),
                  .flops = 2.0 * double(cached * s.heads * (kWidth + kLatent)),
                  .cached = caches.rows.fits_cache()};
  report.time({"mla_decode", text, batch, work}, run);
}

}  // namespace

void programs::mla_decode(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " heads=", s.heads, " length=", s.length);
    if (!report.wants(text)) continue;
    for (const int64_t batch : report.token_counts({1, 8})) {
      if (batch * s.length > kMaxCached) continue;
      const Caches caches(s, batch, report.options().pages);
      for (const int threads : report.thread_counts()) {
        set_num_threads(threads);
        time_threads(s, text, caches, report);
      }
    }
  }
}

}  // namespace kn::bench
