// moe_layer: moe_route, moe_dispatch, int4_grouped_swiglu, int4_grouped_gemm and moe_combine one
// after the other, as a layer runs them; without the router's own product and the shared expert.
#include "choice_check.h"
#include "experts.h"

namespace kn::bench {
namespace {

// The buffers between the ops, and the ops' arguments that do not change from call to call.
class Layer {
 public:
  Layer(const MoeShape& s, int64_t tokens, const Routing& first, Compute compute)
      : shape_(s),
        compute_(compute),
        tokens_(tokens),
        rows_(tokens * s.topk),
        x_(tokens * s.hidden, [this] { return to_bf16(random_.sign()); }),
        inner_(rows_ * s.intermediate),
        outer_(rows_ * s.hidden),
        out_(tokens * s.hidden),
        weights_(rows_),
        ids_(rows_),
        token_index_(rows_),
        row_index_(rows_),
        offsets_(s.experts + 1),
        workspace_(1) {
    cpu::moe_dispatch({first.ids.data(), token_index_.data(), row_index_.data(), offsets_.data(),
                       tokens, s.topk, s.experts});
    const int64_t bytes = std::max(cpu::int4_grouped_swiglu_workspace_bytes(swiglu_args(first)),
                                   cpu::int4_grouped_gemm_workspace_bytes(gemm_args(first)));
    workspace_ = Buffer<uint8_t>(bytes);
  }

  void run(const Routing& r) {
    const MoeShape& s = shape_;
    cpu::moe_route(route_args(r));
    cpu::moe_dispatch({ids_.data(), token_index_.data(), row_index_.data(), offsets_.data(),
                       tokens_, s.topk, s.experts});
    cpu::int4_grouped_swiglu(swiglu_args(r));
    cpu::int4_grouped_gemm(gemm_args(r));
    cpu::moe_combine({outer_.data(), row_index_.data(), weights_.data(), nullptr, out_.data(),
                      DType::kFp32, DType::kBf16, tokens_, s.topk, s.hidden});
  }

  // Every token's experts, and three columns of the last token: every inner row of it in full.
  void check(const Routing& r, const ExpertPool& pool) {
    const int64_t k = shape_.topk;
    for (int64_t t = 0; t < tokens_; ++t)
      check_choice(route_args(r), &r.logits[t * shape_.experts], &ids_[t * k], &weights_[t * k]);
    const int64_t t = tokens_ - 1, in = shape_.intermediate;
    constexpr int64_t kColumns[] = {0, 77, 101};
    double sum[3] = {}, tolerance[3] = {};
    for (int64_t j = 0; j < k; ++j) {
      const int64_t m = r.matrix[ids_[t * k + j]];
      std::vector<bf16> inner(in), off(in);
      for (int64_t i = 0; i < in; ++i) {
        const bf16* x = &x_[t * shape_.hidden];
        const Swiglu y(int4_dot(x, pool.gate(m), i), int4_dot(x, pool.up(m), i), compute_);
        inner[i] = to_bf16(float(y.value));
        // It may round to the neighbouring bf16.
        off[i] = to_bf16(float(y.tolerance + 0x1p-8 * std::fabs(y.value)));
      }
      for (int c = 0; c < 3; ++c) {
        const Product p = int4_dot(inner.data(), pool.down(m), kColumns[c]);
        const double inner_off = int4_dot(off.data(), pool.down(m), kColumns[c]).magnitude;
        sum[c] += weights_[t * k + j] * p.value;
        tolerance[c] +=
            weights_[t * k + j] * (inner_off + 2 * int4_tolerance(compute_) * p.magnitude);
      }
    }
    for (int c = 0; c < 3; ++c)
      expect_close("moe_layer", to_float(out_[t * shape_.hidden + kColumns[c]]), sum[c],
                   0x1p-8 * std::fabs(sum[c]) + 1.01 * tolerance[c]);
  }

 private:
  MoeRouteArgs route_args(const Routing& r) {
    return {r.logits.data(),
            nullptr,
            ids_.data(),
            weights_.data(),
            tokens_,
            shape_.experts,
            shape_.topk,
            1,
            1,
            Scoring::kSigmoid,
            GroupScore::kTop2Sum,
            true,
            1.0f};
  }
  Int4GroupedSwigluArgs swiglu_args(const Routing& r) const {
    return {x_.data(),
            token_index_.data(),
            offsets_.data(),
            r.gate.packed.data(),
            r.gate.scale.data(),
            r.up.packed.data(),
            r.up.scale.data(),
            inner_.data(),
            DType::kBf16,
            DType::kBf16,
            tokens_,
            rows_,
            shape_.experts,
            shape_.intermediate,
            shape_.hidden,
            kGroupSize,
            compute_,
            workspace_.data(),
            workspace_.size()};
  }
  Int4GroupedGemmArgs gemm_args(const Routing& r) const {
    return {inner_.data(),
            nullptr,
            offsets_.data(),
            r.down.packed.data(),
            r.down.scale.data(),
            outer_.data(),
            DType::kBf16,
            DType::kFp32,
            rows_,
            rows_,
            shape_.experts,
            shape_.hidden,
            shape_.intermediate,
            kGroupSize,
            compute_,
            workspace_.data(),
            workspace_.size()};
  }

  Random random_;
  MoeShape shape_;
  Compute compute_;
  int64_t tokens_, rows_;
  Buffer<bf16> x_, inner_;
  Buffer<float> outer_;
  Buffer<bf16> out_;
  std::vector<float> weights_;
  std::vector<int32_t> ids_, token_index_, row_index_, offsets_;
  Buffer<uint8_t> workspace_;
};

void time_tokens(const MoeShape& s, int64_t tokens, const ExpertPool& pool, Report& report) {
  const std::vector<Routing> routings = make_routings(s, tokens, pool);
  Layer layer(s, tokens, routings[0], report.options().compute);
  layer.run(routings[0]);
  layer.check(routings[0], pool);
  const int64_t rows = tokens * s.topk;
  const Work work{.bytes = mean_hit(routings) * double(s.expert_bytes()) +
                           double(4 * tokens * s.experts + 4 * tokens * s.hidden),
                  .flops = 6.0 * double(rows * s.hidden * s.intermediate),
                  .cached = pool.fits_cache(),
                  .limbs = true,
                  .compute = report.options().compute};
  report.time({"moe_layer", s.text(), tokens, work},
              [&](int64_t call) { layer.run(routings[call % routings.size()]); });
}

}  // namespace

void programs::moe_layer(Report& report) {
  for (const MoeShape& s : kMoeShapes) {
    if (!report.wants(s.text())) continue;
    const ExpertPool pool(s, report.options().pages);
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 4, 16, 128}))
        time_tokens(s, tokens, pool, report);
    }
  }
}

}  // namespace kn::bench
