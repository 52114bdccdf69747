// moe_combine: the weighted sum of expert rows and the shared expert.
#include "routed_shapes.h"

namespace kn::bench {

void programs::moe_combine(Report& report) {
  for_routed_shapes(report, [&](const RoutedShape& s, int64_t tokens) {
    Random random;
    const auto entry = [&] { return random.sign(); };
    const auto bf16_entry = [&] { return to_bf16(random.sign()); };
    const Routed routed(s, tokens);
    const int64_t num_rows = tokens * s.topk, hidden = s.hidden;
    std::vector<int32_t> token_index(num_rows), row_index(num_rows), offsets(s.experts + 1);
    cpu::moe_dispatch({routed.ids.data(), token_index.data(), row_index.data(), offsets.data(),
                       tokens, s.topk, s.experts});
    const Buffer<float> rows(num_rows * hidden, entry);  // as int4_grouped_gemm leaves them
    const Buffer<bf16> shared(tokens * hidden, bf16_entry), out(tokens * hidden);
    const MoeCombineArgs a{rows.data(),   row_index.data(), routed.weights.data(),
                           shared.data(), out.data(),       DType::kFp32,
                           DType::kBf16,  tokens,           s.topk,
                           hidden};
    cpu::moe_combine(a);
    for (int64_t i = 0; i < 64; ++i) {
      const int64_t t = i * 7 % tokens, c = i * 131 % hidden;
      double sum = to_float(shared[t * hidden + c]);
      for (int64_t j = 0; j < s.topk; ++j)
        sum +=
            double(routed.weights[t * s.topk + j]) * rows[row_index[t * s.topk + j] * hidden + c];
      expect_close("moe_combine", to_float(out[t * hidden + c]), sum,
                   0x1p-8 * std::fabs(sum) + 1e-5);
    }
    const Work work{.bytes = double((4 * num_rows + 4 * tokens) * hidden),
                    .flops = double(2 * num_rows * hidden),
                    .cached = true};
    report.time({"moe_combine", concat(s.text(), " hidden=", hidden), tokens, work},
                [&](int64_t) { cpu::moe_combine(a); });
  });
}

}  // namespace kn::bench
