#include "simt/ptx.h"

#include <cstring>

namespace kn::ptx {
namespace {

using simt::fail;
using simt::kWholeWarp;
using simt::meet;
using simt::self;

// Row and column of accumulator r of lane l.
int d_row(int l, int r) { return l / 4 + (r / 2) * 8; }
int d_column(int l, int r) { return (l % 4) * 2 + r % 2; }

template <typename T>
struct Operands {
  T d[4];
  uint32_t a[4], b[2];
};

// The lanes' fragments as matrices: 16 x kK, kK x 8, 16 x 8. Element(word, i) is the i-th value of
// a register; kK / 8 of them lie side by side along k.
template <int kK, typename A, typename B, typename T, typename ElementA, typename ElementB>
void multiply(const char* what, T (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              ElementA element_a, ElementB element_b) {
  constexpr int kPer = kK / 8;  // values in a register
  Operands<T> in;
  std::memcpy(in.d, d, sizeof(d));
  std::memcpy(in.a, a, sizeof(a));
  std::memcpy(in.b, b, sizeof(b));
  struct Result {
    T d[4];
  } out;
  meet(kWholeWarp, what, in, out, [&](const Operands<T>** ins, Result** outs) {
    alignas(64) A ma[16][kK];
    alignas(64) B mb[kK][8];
    alignas(64) T md[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < kPer; ++i)
          ma[g + (r % 2) * 8][t * kPer + i + (r / 2) * kK / 2] = element_a(ins[l]->a[r], i);
      for (int r = 0; r < 2; ++r)
        for (int i = 0; i < kPer; ++i)
          mb[t * kPer + i + r * kK / 2][g] = element_b(ins[l]->b[r], i);
      for (int r = 0; r < 4; ++r) md[d_row(l, r)][d_column(l, r)] = ins[l]->d[r];
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < kK; ++k)
        for (int n = 0; n < 8; ++n) md[m][n] += T(ma[m][k]) * T(mb[k][n]);
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 4; ++r) outs[l]->d[r] = md[d_row(l, r)][d_column(l, r)];
  });
  std::memcpy(d, out.d, sizeof(d));
}

float bf16_element(uint32_t word, int i) { return from_bf16_bits(word >> (16 * i) & 0xffff); }
int32_t s8_element(uint32_t word, int i) { return int8_t(word >> (8 * i)); }

// lane 8q + r has come with the address of row r of matrix q.
template <int kMatrices>
void load_matrices(const char* what, uint32_t (&registers)[kMatrices], const void* row,
                   bool transposed) {
  struct Result {
    uint32_t r[kMatrices];
  } out;
  if (self->lane < 8 * kMatrices) {
    self->block->shared.offset(row, 16, 16, what);
    self->block->shared.read(row, 16, simt::By::kThread, what);
  }
  meet(kWholeWarp, what, row, out, [&](const void* const** rows, Result** outs) {
    std::vector<simt::SharedAccess> passes(8 * kMatrices);
    for (int l = 0; l < 8 * kMatrices; ++l)
      passes[size_t(l)] = {nullptr, uint32_t(self->block->shared.offset(*rows[l], 16, 16, what)),
                           16, false};
    uint64_t ideal = 0;
    const uint64_t needed = simt::wavefronts(passes, &ideal);
    simt::worker->count_shared(needed, ideal);
    for (int l = 0; l < 32; ++l) {
      for (int q = 0; q < kMatrices; ++q) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = transposed ? 2 * (l % 4) + i : l / 4;
          const int c = transposed ? l / 4 : 2 * (l % 4) + i;
          std::memcpy(&pair[i], static_cast<const char*>(*rows[8 * q + r]) + 2 * c, 2);
        }
        outs[l]->r[q] = uint32_t(pair[1]) << 16 | pair[0];
      }
    }
  });
  std::memcpy(registers, out.r, sizeof(out.r));
}

void make(simt::Copy& c) {
  if (c.made) return;
  std::memcpy(c.to, c.from, size_t(c.valid));
  std::memset(c.to + c.valid, 0, size_t(c.bytes - c.valid));
  c.made = true;
}

// The next float toward zero, made odd, unless x is a float: rounding it again gives what rounding
// the exact value would give.
float to_odd_float(double x) {
  const float f = float(x);
  if (double(f) == x || f != f) return f;
  uint32_t bits = std::bit_cast<uint32_t>(f);
  if (std::fabs(double(f)) > std::fabs(x)) --bits;
  return std::bit_cast<float>(bits | 1);
}

// a * b + c of bf16 values, exact or rounded to odd.
float fma_to_odd(float a, float b, float c) {
  const double p = double(a) * double(b);  // exact: 16 bits
  const double s = p + double(c);
  const double back = s - p;
  const double error = (p - (s - back)) + (double(c) - back);
  if (!std::isfinite(s) || error == 0.0) return to_odd_float(s);
  uint64_t bits = std::bit_cast<uint64_t>(s);
  if ((error < 0.0) != (s < 0.0)) --bits;  // toward zero
  return to_odd_float(std::bit_cast<double>(bits | 1));
}

}  // namespace

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<16, float, float>("mma_m16n8k16_bf16", d, a, b, bf16_element, bf16_element);
}

void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<32, int32_t, int32_t>("mma_m16n8k32_s8", d, a, b, s8_element, s8_element);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row) { load_matrices("ldmatrix_x4", r, row, false); }
void ldmatrix_x2(uint32_t (&r)[2], const void* row) { load_matrices("ldmatrix_x2", r, row, false); }
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  load_matrices("ldmatrix_x4_trans", r, row, true);
}
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  load_matrices("ldmatrix_x2_trans", r, row, true);
}

void cp_async(void* to, const void* from, int bytes, bool ok) {
  self->block->shared.offset(to, size_t(bytes), size_t(bytes), "cp_async");
  if (ok && reinterpret_cast<uintptr_t>(from) % uintptr_t(bytes) != 0)
    fail("cp_async: misaligned, the source is not a multiple of " + std::to_string(bytes));
  self->block->shared.begin_copy(to, size_t(bytes), "cp_async");
  simt::Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, ok ? bytes : 0};
  const simt::Async when = simt::worker->settings().async;
  if (when == simt::Async::kEarly || (when == simt::Async::kSeeded && simt::worker->coin()))
    make(copy);
  self->open.push_back(copy);
}

void cp_async_commit() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void cp_async_wait_for(size_t groups_in_flight) {
  while (self->groups.size() > groups_in_flight) {
    for (simt::Copy& c : self->groups.front()) {
      make(c);
      self->block->shared.end_copy(c.to, size_t(c.bytes), uint16_t(self->id), self->now);
    }
    self->groups.pop_front();
  }
}

uint4 load_streaming(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("load_streaming: misaligned");
  return *static_cast<const uint4*>(p);
}

uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r = 0;
  for (int i = 0; i < 2; ++i) {
    const float sum = fma_to_odd(bf16_element(a, i), bf16_element(b, i), bf16_element(c, i));
    r |= uint32_t(to_bf16(sum)) << (16 * i);
  }
  return r;
}

}  // namespace kn::ptx
