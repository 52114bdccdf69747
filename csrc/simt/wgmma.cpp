// wgmma: a warp computes its sixteen rows of the warpgroup's product, when it is issued or when it
// is waited for. Until then the accumulators are NaN.
#include <cmath>
#include <cstring>
#include <limits>

#include "simt/ptx.h"
#include "simt/ptx_sm90.h"

namespace kn::ptx {
namespace {

using simt::fail;
using simt::kWholeWarp;
using simt::meet;
using simt::self;
using simt::SharedMemory;
using simt::Warp;

constexpr int kRows = 16, kDepth = 16;  // of one warp; along k

struct Product {
  int columns, warp;  // warp of the warpgroup
  bool accumulate, a_in_registers;
  uint64_t a_shared, b;
  Major b_major;
  uint32_t a[32][4];
  float* d[32];
  std::vector<float> start;  // accumulators of the lanes, if they were not in flight before
};

Warp& this_warp() { return self->block->warps[size_t(self->warp)]; }

// A matrix as its descriptor gives it, bytes.
struct Matrix {
  size_t start, leading, stride;
  size_t width;  // of a row: the swizzle, or 16 without one
  bool swizzled;

  explicit Matrix(uint64_t descriptor)
      : start(size_t(descriptor & 0x3fff) << 4),
        leading(size_t(descriptor >> 16 & 0x3fff) << 4),
        stride(size_t(descriptor >> 32 & 0x3fff) << 4) {
    const unsigned mode = unsigned(descriptor >> 62);
    width = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32;
    swizzled = mode != 0;
  }

  size_t swizzle(size_t at) const {
    return swizzled ? at ^ ((at >> 7 & (width / 16 - 1)) << 4) : at;
  }

  // Offset in shared memory of element (row of a or b, k).
  size_t offset(Major major, int row, int k) const {
    // Lines of `width` bytes, eight of them one after the other.
    const size_t line = size_t(major == Major::kK ? row : k);
    const size_t along = size_t(major == Major::kK ? k : row) * 2;
    const bool as_named = swizzled || major == Major::kK;
    const size_t lines = as_named ? stride : leading, columns = as_named ? leading : stride;
    // A k-major matrix with a swizzle is no wider than a line.
    const size_t parts = swizzled && major == Major::kK ? 0 : along / width;
    return swizzle(start + line / 8 * lines + line % 8 * width + parts * columns +
                   (along - parts * width));
  }
};

float element(uint64_t descriptor, Major major, int row, int k) {
  SharedMemory& shared = self->block->shared;
  const char* p = shared.data() + Matrix(descriptor).offset(major, row, k);
  shared.offset(p, 2, 2, "wgmma");
  shared.read(p, 2, simt::By::kAsyncProxy, "wgmma");
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return from_bf16_bits(bits);
}

void load_a(const Product& p, float (&a)[kRows][kDepth]) {
  if (!p.a_in_registers) {
    for (int m = 0; m < kRows; ++m)
      for (int k = 0; k < kDepth; ++k)
        a[m][k] = element(p.a_shared, Major::kK, p.warp * kRows + m, k);
    return;
  }
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i)
        a[l / 4 + (r % 2) * 8][(l % 4) * 2 + i + (r / 2) * 8] =
            from_bf16_bits(p.a[l][r] >> (16 * i) & 0xffff);
}

void run(const Product& p) {
  if (!p.start.empty())
    for (int l = 0; l < 32; ++l)
      std::memcpy(p.d[l], &p.start[size_t(l * p.columns / 2)], size_t(p.columns) * 2);
  float a[kRows][kDepth];
  load_a(p, a);
  for (int n = 0; n < p.columns; ++n) {
    float b[kDepth];
    for (int k = 0; k < kDepth; ++k) b[k] = element(p.b, p.b_major, n, k);
    for (int m = 0; m < kRows; ++m) {
      // Row m, column n is register 4 (n / 8) + 2 (m / 8) + n % 2 of lane 4 (m % 8) + n % 8 / 2.
      float& d = p.d[4 * (m % 8) + n % 8 / 2][4 * (n / 8) + 2 * (m / 8) + n % 2];
      float sum = p.accumulate ? d : 0.0f;
      for (int k = 0; k < kDepth; ++k) sum += a[m][k] * b[k];
      d = sum;
    }
  }
}

void check(int columns, uint64_t descriptor) {
  if (!this_warp().matrix_fenced) fail("wgmma: no wgmma_fence since the last wgmma_wait");
  const Matrix m(descriptor);
  if (m.swizzled && m.start % (8 * m.width) >= m.width)
    fail("wgmma: a matrix of " + std::to_string(columns) +
         " columns must start at a group of eight rows of its swizzle");
}

// Keeps the accumulators' values and makes them NaN, unless an earlier wgmma in flight has.
void hide_accumulators(Product& p) {
  for (const simt::WarpGroupOp& op : this_warp().matrix_ops)
    if (op.accumulators == p.d[0]) return;
  p.start.resize(size_t(32 * p.columns / 2));
  for (int l = 0; l < 32; ++l) {
    std::memcpy(&p.start[size_t(l * p.columns / 2)], p.d[l], size_t(p.columns) * 2);
    std::fill_n(p.d[l], p.columns / 2, std::numeric_limits<float>::quiet_NaN());
  }
}

// A step of the whole warp that the last lane makes.
template <typename F>
void together(const char* what, F f) {
  struct Nothing {};
  Nothing in, out;
  meet(kWholeWarp, what, in, out, [&](auto**, auto**) { f(); });
}

}  // namespace

uint64_t matrix_descriptor(const void* p, Swizzle swizzle, int leading_bytes, int stride_bytes) {
  const size_t offset = self->block->shared.offset(p, 16, 16, "matrix_descriptor");
  const uint64_t mode = swizzle == Swizzle::k128  ? 1
                        : swizzle == Swizzle::k64 ? 2
                        : swizzle == Swizzle::k32 ? 3
                                                  : 0;
  return uint64_t(offset >> 4) | uint64_t((leading_bytes & 0x3ffff) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3ffff) >> 4) << 32 | mode << 62;
}

void wgmma(float* d, int columns, const uint32_t* a, uint64_t a_shared, uint64_t b, Major b_major,
           bool accumulate) {
  check(columns, b);
  if (!a) check(columns, a_shared);
  struct In {
    float* d;
    const uint32_t* a;
  };
  const In in{d, a};
  struct Nothing {
  } out;
  meet(kWholeWarp, "wgmma", in, out, [&](const In** ins, Nothing**) {
    Product p{columns, self->warp % 4, accumulate, a != nullptr, a_shared, b, b_major, {}, {}, {}};
    for (int l = 0; l < 32; ++l) {
      p.d[l] = ins[l]->d;
      if (a) std::memcpy(p.a[l], ins[l]->a, sizeof(p.a[l]));
    }
    Warp& warp = this_warp();
    const simt::Async when = simt::worker->settings().async;
    const bool early = when == simt::Async::kEarly && warp.matrix_ops.empty();
    if (early) return run(p);
    hide_accumulators(p);
    float* accumulators = p.d[0];
    warp.matrix_ops.push_back({warp.matrix_group, accumulators, [p = std::move(p)] { run(p); }});
  });
}

void wgmma_fence() {
  together("wgmma_fence", [] { this_warp().matrix_fenced = true; });
}

void wgmma_commit() {
  together("wgmma_commit", [] { ++this_warp().matrix_group; });
}

void wgmma_wait_for(int groups_in_flight) {
  together("wgmma_wait", [=] {
    Warp& warp = this_warp();
    while (!warp.matrix_ops.empty() &&
           warp.matrix_ops.front().group < warp.matrix_group - groups_in_flight) {
      warp.matrix_ops.front().run();
      warp.matrix_ops.pop_front();
    }
    warp.matrix_fenced = false;
  });
}

}  // namespace kn::ptx
