// moe_route, moe_dispatch and moe_combine: what surrounds the experts of a layer. Activations stay
// in cache in a running model, hence no share of the memory limit.
#include "harness.h"
#include "kimi_native/ops.h"

using namespace kn;
using namespace kn::bench;

namespace {

struct Shape {
  const char* name;
  int64_t experts, topk, hidden, n_group, topk_group;
};
const Shape kShapes[] = {{"k2", 384, 8, 7168, 1, 1},
                         {"deepseek v3", 256, 8, 7168, 8, 4},
                         {"moonlight", 64, 6, 2048, 1, 1}};

// Weights that do not sum to one, or an order that is not by score, would show here.
void check_route(const std::vector<float>& weights, int64_t tokens, int64_t topk) {
  for (int64_t t = 0; t < tokens; ++t) {
    double sum = 0.0;
    for (int64_t j = 0; j < topk; ++j) {
      sum += weights[t * topk + j];
      if (j)
        expect_close("moe_route", std::min(0.0f, weights[t * topk + j - 1] - weights[t * topk + j]),
                     0.0, 0.0);
    }
    expect_close("moe_route", sum, 1.0, 1e-6);
  }
}

void bench_shape(const Shape& s, int64_t tokens, Report& report) {
  Random random;
  const int64_t rows = tokens * s.topk;
  const int64_t sets = std::max<int64_t>(2, 2048 / tokens);
  std::vector<float> logits(sets * tokens * s.experts), weights(rows);
  std::vector<int32_t> ids(rows), token_index(rows), row_index(rows), offsets(s.experts + 1);
  for (float& x : logits) x = 3.0f * random.sign();
  Buffer<bf16> expert_rows(rows * s.hidden), shared(tokens * s.hidden), out(tokens * s.hidden);
  fill(expert_rows, [&] { return to_bf16(random.sign()); });
  fill(shared, [&] { return to_bf16(random.sign()); });

  MoeRouteArgs route{logits.data(),
                     nullptr,
                     ids.data(),
                     weights.data(),
                     tokens,
                     s.experts,
                     s.topk,
                     s.n_group,
                     s.topk_group,
                     Scoring::kSigmoid,
                     GroupScore::kTop2Sum,
                     true,
                     1.0f};
  const MoeDispatchArgs dispatch{
      ids.data(), token_index.data(), row_index.data(), offsets.data(), tokens, s.topk, s.experts};
  const MoeCombineArgs combine{
      expert_rows.data(), row_index.data(), weights.data(), shared.data(), out.data(),
      DType::kBf16,       DType::kBf16,     tokens,         s.topk,        s.hidden};
  cpu::moe_route(route);
  cpu::moe_dispatch(dispatch);
  cpu::moe_combine(combine);
  check_route(weights, tokens, s.topk);
  for (int64_t i = 0; i < rows; ++i) {
    expect_close("moe_dispatch", token_index[row_index[i]], double(i / s.topk), 0.0);
    const bool inside = row_index[i] >= offsets[ids[i]] && row_index[i] < offsets[ids[i] + 1];
    expect_close("moe_dispatch", inside, 1.0, 0.0);
  }
  for (int64_t i = 0; i < 64; ++i) {
    const int64_t t = i * 7 % tokens, c = i * 131 % s.hidden;
    double sum = to_float(shared[t * s.hidden + c]);
    for (int64_t j = 0; j < s.topk; ++j)
      sum += double(weights[t * s.topk + j]) *
             to_float(expert_rows[row_index[t * s.topk + j] * s.hidden + c]);
    expect_close("moe_combine", to_float(out[t * s.hidden + c]), sum,
                 0x1p-8 * std::fabs(sum) + 1e-5);
  }

  const std::string shape =
      concat("tokens=", tokens, " experts=", s.experts, " topk=", s.topk, " (", s.name, ")");
  // Fresh logits in every call: a branch predictor learns by heart what it sees twice.
  const auto run_route = [&](int64_t call) {
    route.logits = &logits[call % sets * tokens * s.experts];
    cpu::moe_route(route);
  };
  report.line("moe_route", shape, measure(run_route),
              {.bytes = double(4 * tokens * s.experts + 8 * rows), .cached = true});
  report.line("moe_dispatch", shape, measure([&](int64_t) { cpu::moe_dispatch(dispatch); }),
              {.bytes = double(12 * rows + 4 * s.experts), .cached = true});
  report.line("moe_combine",
              concat("tokens=", tokens, " topk=", s.topk, " hidden=", s.hidden, " (", s.name, ")"),
              measure([&](int64_t) { cpu::moe_combine(combine); }),
              {.bytes = double(2 * (rows + 2 * tokens) * s.hidden),
               .flops = double(2 * rows * s.hidden),
               .cached = true});
}

void program(const Options& options) {
  Report report(options);
  for (const int threads : thread_counts()) {
    set_num_threads(threads);
    for (const Shape& s : kShapes)
      for (const int64_t tokens : token_counts(options)) bench_shape(s, tokens, report);
  }
}

}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, program); }
