// int4_grouped_swiglu and int4_grouped_gemm: the experts of one layer, tokens routed at random.
//
// Experts share a pool of matrices larger than twice the last-level cache: what an expert reads is
// cold, and a layer of K2 (9.5 GB) need not fit this machine.
#include "harness.h"
#include "int4_weights.h"
#include "kimi_native/ops.h"

using namespace kn;
using namespace kn::bench;

namespace {

struct Shape {
  const char* name;
  int64_t experts, topk, hidden, intermediate;
};
const Shape kShapes[] = {{"k2", 384, 8, 7168, 2048}, {"moonlight", 64, 6, 2048, 1408}};
constexpr int kRoutings = 8;  // different routings, taken in turn

struct Pool {
  std::vector<Int4Matrix> matrices;
  std::vector<const uint8_t*> packed;  // per expert
  std::vector<const bf16*> scale;

  Pool(int64_t experts, int64_t out, int64_t in, Random& random) {
    const int64_t distinct = std::min(experts, num_copies(Int4Matrix::bytes(out, in)));
    for (int64_t i = 0; i < distinct; ++i) matrices.emplace_back(out, in, random);
    for (int64_t e = 0; e < experts; ++e) {
      packed.push_back(matrix(e).packed.data());
      scale.push_back(matrix(e).scale.data());
    }
  }
  Int4Matrix& matrix(int64_t expert) { return matrices[expert % matrices.size()]; }
};

struct Routing {
  std::vector<int32_t> token_index, row_index, offsets;
  int64_t hit = 0;  // experts with rows

  Routing(const Shape& s, int64_t tokens, Random& random)
      : token_index(tokens * s.topk), row_index(tokens * s.topk), offsets(s.experts + 1) {
    std::vector<int32_t> ids;
    for (int64_t t = 0; t < tokens; ++t) {
      std::set<int32_t> chosen;
      while (int64_t(chosen.size()) < s.topk) chosen.insert(random.bits() % s.experts);
      ids.insert(ids.end(), chosen.begin(), chosen.end());
    }
    cpu::moe_dispatch({ids.data(), token_index.data(), row_index.data(), offsets.data(), tokens,
                       s.topk, s.experts});
    for (int64_t e = 0; e < s.experts; ++e) hit += offsets[e + 1] > offsets[e];
  }
  int64_t expert_of(int64_t row) const {
    return std::upper_bound(offsets.begin(), offsets.end(), int32_t(row)) - offsets.begin() - 1;
  }
};

std::vector<Routing> make_routings(const Shape& s, int64_t tokens, Random& random) {
  std::vector<Routing> routings;
  for (int i = 0; i < kRoutings; ++i) routings.emplace_back(s, tokens, random);
  return routings;
}

Work make_work(const std::vector<Routing>& routings, int64_t matrices, int64_t x_rows, int64_t rows,
               int64_t out, int64_t in) {
  double hit = 0.0;
  for (const Routing& r : routings) hit += double(r.hit) / kRoutings;
  return {.bytes = hit * double(matrices * Int4Matrix::bytes(out, in)) +
                   double(2 * x_rows * in + 2 * rows * out),
          .flops = 2.0 * double(matrices * rows * out * in),
          .int8 = true};
}

template <typename Args>
Buffer<uint8_t> give_workspace(Args& a, int64_t bytes) {
  Buffer<uint8_t> workspace(bytes);
  a.workspace = workspace.data();
  a.workspace_bytes = workspace.size();
  return workspace;
}

void bench_swiglu(const Shape& s, int64_t tokens, Pool& gate, Pool& up, Report& report) {
  Random random;
  const int64_t rows = tokens * s.topk, out = s.intermediate, in = s.hidden;
  const std::vector<Routing> routings = make_routings(s, tokens, random);
  Buffer<bf16> x(tokens * in), y(rows * out);
  fill(x, [&] { return to_bf16(random.sign()); });
  Int4GroupedSwigluArgs a{x.data(),
                          nullptr,
                          nullptr,
                          gate.packed.data(),
                          gate.scale.data(),
                          up.packed.data(),
                          up.scale.data(),
                          y.data(),
                          DType::kBf16,
                          DType::kBf16,
                          tokens,
                          rows,
                          s.experts,
                          out,
                          in,
                          kGroupSize,
                          nullptr,
                          0};
  a.x_index = routings[0].token_index.data();
  a.expert_offsets = routings[0].offsets.data();
  const auto workspace = give_workspace(a, cpu::int4_grouped_swiglu_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.x_index = routings[call % kRoutings].token_index.data();
    a.expert_offsets = routings[call % kRoutings].offsets.data();
    cpu::int4_grouped_swiglu(a);
  };
  run(0);
  for (int64_t i = 0; i < 32; ++i) {
    const int64_t row = i * 13 % rows, o = i * 131 % out, e = routings[0].expert_of(row);
    const bf16* token = &x[routings[0].token_index[row] * in];
    const Product g = int4_dot(token, gate.matrix(e), o, in),
                  u = int4_dot(token, up.matrix(e), o, in);
    const double silu = g.value / (1 + std::exp(-g.value));
    expect_close("int4_grouped_swiglu", to_float(y[row * out + o]), silu * u.value,
                 0x1p-8 * std::fabs(silu * u.value) +
                     1e-3 * (g.magnitude * std::fabs(u.value) + u.magnitude * std::fabs(silu)));
  }
  report.line(
      "int4_grouped_swiglu",
      concat("tokens=", tokens, " experts=", s.experts, " topk=", s.topk, " (", s.name, ")"),
      measure(run), make_work(routings, 2, tokens, rows, out, in));
}

void bench_down(const Shape& s, int64_t tokens, Pool& down, Report& report) {
  Random random;
  const int64_t rows = tokens * s.topk, out = s.hidden, in = s.intermediate;
  const std::vector<Routing> routings = make_routings(s, tokens, random);
  Buffer<bf16> x(rows * in), y(rows * out);
  fill(x, [&] { return to_bf16(random.sign()); });
  Int4GroupedGemmArgs a{x.data(),
                        nullptr,
                        nullptr,
                        down.packed.data(),
                        down.scale.data(),
                        y.data(),
                        DType::kBf16,
                        DType::kBf16,
                        rows,
                        rows,
                        s.experts,
                        out,
                        in,
                        kGroupSize,
                        nullptr,
                        0};
  a.expert_offsets = routings[0].offsets.data();
  const auto workspace = give_workspace(a, cpu::int4_grouped_gemm_workspace_bytes(a));
  const auto run = [&](int64_t call) {
    a.expert_offsets = routings[call % kRoutings].offsets.data();
    cpu::int4_grouped_gemm(a);
  };
  run(0);
  for (int64_t i = 0; i < 32; ++i) {
    const int64_t row = i * 13 % rows, o = i * 131 % out;
    const Product p = int4_dot(&x[row * in], down.matrix(routings[0].expert_of(row)), o, in);
    expect_close("int4_grouped_gemm", to_float(y[row * out + o]), p.value,
                 0x1p-8 * std::fabs(p.value) + 1e-4 * p.magnitude);
  }
  report.line(
      "int4_grouped_gemm",
      concat("tokens=", tokens, " experts=", s.experts, " topk=", s.topk, " (", s.name, ")"),
      measure(run), make_work(routings, 1, rows, rows, out, in));
}

void program(const Options& options) {
  Report report(options);
  for (const Shape& s : kShapes) {
    Random random;
    Pool gate(s.experts, s.intermediate, s.hidden, random),
        up(s.experts, s.intermediate, s.hidden, random);
    Pool down(s.experts, s.hidden, s.intermediate, random);
    for (const int threads : thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : token_counts(options)) {
        bench_swiglu(s, tokens, gate, up, report);
        bench_down(s, tokens, down, report);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, program); }
