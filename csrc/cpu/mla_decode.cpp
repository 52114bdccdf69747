// Splits attention over (sequence x chunk of kMlaChunkTokens tokens x block of heads), then adds up
// each row's chunks in ascending order. Chunks are cut at fixed token positions, so a row's bits
// depend neither on the threads nor on its neighbours.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/op_checks.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "kimi_native/ops.h"
#include "kimi_native/runtime.h"

namespace kn::cpu {
namespace {

constexpr const char* kOp = "mla_decode";
constexpr int64_t kMaxTaskHeads = 64;      // their queries and sums take 280 KB of L2
constexpr int64_t kRoundBytes = 64 << 20;  // partial results kept at once, over several sequences
constexpr int64_t kHeadStep = 8;           // tiles of every tier are full
constexpr int64_t kTaskHeads = 4;  // what a task does once, for any number of heads, costs as much
constexpr int64_t kCombineRows = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t mul(int64_t a, int64_t b) { return checked_mul(kOp, a, b); }

int64_t num_chunks(const MlaDecodeArgs& a, int64_t b) {
  return ceil_div(a.seq_lens[b], kMlaChunkTokens);
}

const MlaDecodeKernels& decode_kernels(const MlaDecodeArgs& a) {
  return a.cache_dtype == DType::kBf16 ? kernels().mla_decode_bf16 : kernels().mla_decode;
}

struct Plan {
  int64_t latent16;  // rounded up to 16
  int64_t heads_per_task, head_blocks;
  int64_t thread_bytes, chunk_floats;  // scratch of a thread; one chunk of all heads
  int64_t round_chunks;                // the most chunks in a round
  int64_t offsets_bytes, bytes;
};

void check_lengths(const MlaDecodeArgs& a) {
  KN_REQUIRE(a.batch == 0 || a.seq_lens, "mla_decode: seq_lens must not be null (got null)");
  for (int64_t b = 0; b < a.batch; ++b)
    KN_REQUIRE(a.seq_lens[b] >= 0 && a.seq_lens[b] <= a.max_pages * a.page_size,
               "mla_decode: seq_lens must be 0 to max_pages * page_size = ",
               a.max_pages * a.page_size, " (got seq_lens[", b, "]=", a.seq_lens[b], ")");
}

// Sequences from `begin` on whose partial results fit kRoundBytes together, at least one; returns
// the first one left out.
int64_t round_end(const MlaDecodeArgs& a, const Plan& p, int64_t begin, int64_t& chunks) {
  chunks = num_chunks(a, begin);
  int64_t b = begin + 1;
  for (; b < a.batch; ++b) {
    const int64_t more = chunks + num_chunks(a, b);
    if (mul(more, p.chunk_floats * 4) > kRoundBytes) break;
    chunks = more;
  }
  return b;
}

// Heads of a task: the split that is done first if all threads are equally fast.
int64_t choose_heads_per_task(int64_t heads, int64_t chunks) {
  int64_t best = 0, best_cost = 0;
  const int64_t fewest = ceil_div(heads, kMaxTaskHeads);
  const int64_t most = std::min(ceil_div(heads, kHeadStep), fewest + num_threads());
  for (int64_t blocks = fewest; blocks <= most; ++blocks) {
    const int64_t each = round_up(ceil_div(heads, blocks), kHeadStep);
    const int64_t tasks = chunks * ceil_div(heads, each);
    const int64_t cost = ceil_div(tasks, num_threads()) * (each + kTaskHeads);
    if (best == 0 || cost < best_cost) best = each, best_cost = cost;
  }
  return std::min(best, heads);
}

Plan plan(const MlaDecodeArgs& a) {
  check_op(a);
  check_lengths(a);
  Plan p;
  p.latent16 = round_up(a.kv_lora_rank, 16);
  p.chunk_floats = mul(a.heads, p.latent16) + 2 * round_up(a.heads, 16);
  p.round_chunks = 0;
  int64_t all_chunks = 0;
  for (int64_t b = 0, chunks; b < a.batch; all_chunks += chunks) {
    b = round_end(a, p, b, chunks);
    p.round_chunks = std::max(p.round_chunks, chunks);
  }
  p.heads_per_task = choose_heads_per_task(a.heads, std::max<int64_t>(all_chunks, 1));
  p.head_blocks = ceil_div(a.heads, p.heads_per_task);
  p.thread_bytes = decode_kernels(a).scratch_bytes(p.heads_per_task, a.kv_lora_rank,
                                                   a.kv_lora_rank + a.qk_rope_head_dim);
  p.thread_bytes = round_up(p.thread_bytes, 64);
  p.offsets_bytes = round_up((a.batch + 1) * 8, 64);
  p.bytes = mul(num_threads(), p.thread_bytes);
  KN_REQUIRE(
      !__builtin_add_overflow(p.bytes, p.offsets_bytes, &p.bytes) &&
          !__builtin_add_overflow(p.bytes, mul(p.round_chunks, p.chunk_floats * 4), &p.bytes),
      "mla_decode: the workspace must fit in 64 bits (got batch=", a.batch, ")");
  return p;
}

void check_buffers(const MlaDecodeArgs& a, const Plan& p) {
  KN_REQUIRE(a.q && a.out, "mla_decode: q and out must not be null (got q=", a.q, ", out=", a.out,
             ")");
  KN_REQUIRE(p.round_chunks == 0 || (a.cache && a.page_table),
             "mla_decode: cache and page_table must not be null (got cache=", a.cache,
             ", page_table=", a.page_table, ")");
  KN_REQUIRE(a.workspace && uintptr_t(a.workspace) % 64 == 0 && a.workspace_bytes >= p.bytes,
             "mla_decode: workspace must be 64-byte aligned and hold ", p.bytes, " bytes (got ",
             a.workspace_bytes, " at ", a.workspace, ")");
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t i = 0; i < ceil_div(a.seq_lens[b], a.page_size); ++i) {
      const int32_t page = a.page_table[b * a.max_pages + i];
      KN_REQUIRE(page >= 0 && page < a.pages,
                 "mla_decode: used page ids must be 0 to pages - 1 = ", a.pages - 1,
                 " (got page_table[", b, "][", i, "]=", page, ")");
    }
}

// Some sequences in flight: sequence begin + i owns the chunks offsets[i] .. offsets[i + 1].
struct Round {
  const MlaDecodeArgs& a;
  const Plan& p;
  const MlaDecodeKernels& decode;
  int64_t begin, end;
  int64_t* offsets;
  char* scratch;    // thread_bytes for each thread
  float* partials;  // chunk_floats for each chunk: sums of values, maxima, sums of weights

  int64_t chunks() const { return offsets[end - begin]; }

  void run_chunk(int64_t task, int thread) const {
    const int64_t head = task % p.head_blocks * p.heads_per_task, index = task / p.head_blocks;
    const int64_t i = std::upper_bound(offsets, offsets + (end - begin), index) - offsets - 1;
    const int64_t b = begin + i, chunk = index - offsets[i];
    const int64_t width = a.kv_lora_rank + a.qk_rope_head_dim;
    float* to = partials + index * p.chunk_floats;
    MlaDecodeChunk c;
    c.q = (const char*)a.q + (b * a.heads + head) * width * dtype_bytes(a.q_dtype);
    c.cache = a.cache;
    c.page_table = a.page_table + b * a.max_pages;
    c.q_dtype = a.q_dtype;
    c.cache_dtype = a.cache_dtype;
    c.heads = std::min(p.heads_per_task, a.heads - head);
    c.latent = a.kv_lora_rank;
    c.width = width;
    c.row_bytes = cache_row_bytes(a.cache_dtype, a.kv_lora_rank, a.qk_rope_head_dim);
    c.page_size = a.page_size;
    c.begin = chunk * kMlaChunkTokens;
    c.end = std::min<int64_t>(c.begin + kMlaChunkTokens, a.seq_lens[b]);
    c.softmax_scale = a.softmax_scale;
    c.scratch = scratch + thread * p.thread_bytes;
    c.out = to + head * p.latent16;
    c.max = to + a.heads * p.latent16 + head;
    c.sum = c.max + round_up(a.heads, 16);
    decode.chunk(c);
  }

  void combine_row(int64_t i, int64_t head) const {
    const int64_t row = (begin + i) * a.heads + head;
    const int64_t bytes = a.kv_lora_rank * dtype_bytes(a.q_dtype);
    float* from = partials + offsets[i] * p.chunk_floats;
    MlaDecodeRow r;
    r.out = from + head * p.latent16;
    r.max = from + a.heads * p.latent16 + head;
    r.sum = r.max + round_up(a.heads, 16);
    r.chunk_stride = p.chunk_floats;
    r.chunks = offsets[i + 1] - offsets[i];
    r.latent = a.kv_lora_rank;
    r.to = (char*)a.out + row * bytes;
    r.dtype = a.q_dtype;
    if (r.chunks == 0)
      std::memset(r.to, 0, bytes);  // all bits zero is 0.0 in both dtypes
    else
      kernels().mla_decode_combine(r);
  }

  void run() const {
    offsets[0] = 0;
    for (int64_t b = begin; b < end; ++b)
      offsets[b - begin + 1] = offsets[b - begin] + num_chunks(a, b);
    parallel_for(chunks() * p.head_blocks,
                 [&](int64_t task, int thread) { run_chunk(task, thread); });
    const int64_t rows = (end - begin) * a.heads;
    parallel_for(ceil_div(rows, kCombineRows), [&](int64_t task, int) {
      const int64_t last = std::min(rows, (task + 1) * kCombineRows);
      for (int64_t r = task * kCombineRows; r < last; ++r) combine_row(r / a.heads, r % a.heads);
    });
  }
};

}  // namespace

int64_t mla_decode_workspace_bytes(const MlaDecodeArgs& a) { return plan(a).bytes; }

void mla_decode(const MlaDecodeArgs& a) {
  const Plan p = plan(a);
  if (a.batch == 0) return;
  check_buffers(a, p);
  char* at = (char*)a.workspace;
  int64_t* offsets = (int64_t*)at;
  char* scratch = at + p.offsets_bytes;
  float* partials = (float*)(scratch + num_threads() * p.thread_bytes);
  const MlaDecodeKernels& decode = decode_kernels(a);
  for (int64_t b = 0, chunks; b < a.batch;) {
    const int64_t end = round_end(a, p, b, chunks);
    Round{a, p, decode, b, end, offsets, scratch, partials}.run();
    b = end;
  }
}

}  // namespace kn::cpu
