// The experts of a layer: int4_grouped_swiglu, int4_grouped_gemm, both (moe_experts), moe_combine,
// and with routing and dispatch the whole (moe_layer), without the router's own product and the
// shared expert. Bytes are those of the experts that are hit, as measured; a layer of K2 is 9.5 GB.
#include "int4_matrices.h"
#include "programs.h"
#include "routed.h"

namespace kn::bench::gpu {
namespace {

// One projection of all experts, as the ops take it.
struct Projection {
  Int4Matrices matrices;
  DeviceBuffer<const uint8_t*> tiles;
  DeviceBuffer<const bf16*> scales;

  Projection(int64_t experts, int64_t out, int64_t in, Random& random)
      : matrices(experts, out, in, random),
        tiles(pointers<const uint8_t*>(experts, [&](int64_t e) { return matrices.tiles(e); })),
        scales(pointers<const bf16*>(experts, [&](int64_t e) { return matrices.scales(e); })) {}

  template <typename P, typename F>
  static std::vector<P> pointers(int64_t experts, F&& of) {
    std::vector<P> all;
    for (int64_t e = 0; e < experts; ++e) all.push_back(of(e));
    return all;
  }
};

struct Experts {
  Random random;
  Projection gate, up, down;
  explicit Experts(const RoutedShape& s)
      : gate(s.experts, s.intermediate, s.hidden, random),
        up(s.experts, s.intermediate, s.hidden, random),
        down(s.experts, s.hidden, s.intermediate, random) {}
};

class Layer {
 public:
  Layer(const RoutedShape& s, int64_t tokens, const Experts& experts, const Routing& any)
      : shape_(s),
        experts_(experts),
        tokens_(tokens),
        rows_(tokens * s.topk),
        x_(random_bf16(tokens * s.hidden, random_)),
        inner_(rows_ * s.intermediate),
        outer_(rows_ * s.hidden),
        out_(tokens * s.hidden),
        workspace_(std::max(cuda::int4_grouped_swiglu_workspace_bytes(swiglu_args(any, nullptr)),
                            cuda::int4_grouped_gemm_workspace_bytes(gemm_args(any, nullptr)))) {}

  void swiglu(const Routing& r) const {
    cuda::int4_grouped_swiglu(swiglu_args(r, &workspace_), stream());
  }
  void gemm(const Routing& r) const {
    cuda::int4_grouped_gemm(gemm_args(r, &workspace_), stream());
  }
  void combine(const Routing& r) const {
    cuda::moe_combine({outer_.data(), r.row_index.data(), r.weights.data(), nullptr, out_.data(),
                       DType::kFp32, DType::kBf16, tokens_, shape_.topk, shape_.hidden},
                      stream());
  }

  // A few columns of some rows, each op on what it was given.
  void check(const Routing& r) const {
    const std::vector<int32_t> offsets = r.offsets.read(), token_index = r.token_index.read();
    const int64_t in = shape_.hidden, mid = shape_.intermediate;
    for (int64_t i = 0; i < 12; ++i) {
      const int64_t row = i < 2 ? i * (rows_ - 1) : i * 1013 % rows_;
      const int64_t e =
          std::upper_bound(offsets.begin(), offsets.end(), int32_t(row)) - offsets.begin() - 1;
      const std::vector<bf16> x = host_row(x_, token_index[row] * in, in);
      const std::vector<bf16> inner = inner_.read(row * mid, mid);
      for (int64_t o = i; o < mid; o += mid / 3 + 1) check_inner(x, e, o, to_float(inner[o]));
      for (int64_t o = i; o < in; o += in / 3 + 1) {
        const Product p = experts_.down.matrices.dot(inner, e, o);
        expect_close("int4_grouped_gemm", outer_.read(row * in + o, 1)[0], p.value,
                     1e-4 * p.magnitude);
      }
    }
    check_combine(r, tokens_ - 1);
  }

 private:
  void check_inner(const std::vector<bf16>& x, int64_t e, int64_t o, double got) const {
    const Product g = experts_.gate.matrices.dot(x, e, o), u = experts_.up.matrices.dot(x, e, o);
    const double silu = g.value / (1 + std::exp(-g.value));
    expect_close("int4_grouped_swiglu", got, silu * u.value,
                 0x1p-8 * std::fabs(silu * u.value) +
                     1e-4 * (g.magnitude * std::fabs(u.value) + u.magnitude * std::fabs(silu)));
  }
  void check_combine(const Routing& r, int64_t t) const {
    const std::vector<int32_t> row = r.row_index.read(t * shape_.topk, shape_.topk);
    const std::vector<float> weight = r.weights.read(t * shape_.topk, shape_.topk);
    for (int64_t c = 0; c < shape_.hidden; c += 61) {
      Product p;
      for (int64_t j = 0; j < shape_.topk; ++j)
        p.add(double(weight[j]) * outer_.read(row[j] * shape_.hidden + c, 1)[0]);
      expect_close("moe_combine", to_float(out_.read(t * shape_.hidden + c, 1)[0]), p.value,
                   0x1p-8 * std::fabs(p.value) + 1e-5 * p.magnitude);
    }
  }

  Int4GroupedSwigluArgs swiglu_args(const Routing& r, const DeviceBuffer<uint8_t>* w) const {
    return {x_.data(),
            r.token_index.data(),
            r.offsets.data(),
            experts_.gate.tiles.data(),
            experts_.gate.scales.data(),
            experts_.up.tiles.data(),
            experts_.up.scales.data(),
            inner_.data(),
            DType::kBf16,
            DType::kBf16,
            tokens_,
            rows_,
            shape_.experts,
            shape_.intermediate,
            shape_.hidden,
            kGroupSize,
            Compute::kExact,
            w ? w->data() : nullptr,
            w ? w->size() : 0};
  }
  Int4GroupedGemmArgs gemm_args(const Routing& r, const DeviceBuffer<uint8_t>* w) const {
    return {inner_.data(),
            nullptr,
            r.offsets.data(),
            experts_.down.tiles.data(),
            experts_.down.scales.data(),
            outer_.data(),
            DType::kBf16,
            DType::kFp32,
            rows_,
            rows_,
            shape_.experts,
            shape_.hidden,
            shape_.intermediate,
            kGroupSize,
            Compute::kExact,
            w ? w->data() : nullptr,
            w ? w->size() : 0};
  }

  Random random_;
  RoutedShape shape_;
  const Experts& experts_;
  int64_t tokens_, rows_;
  RandomBuffer<bf16> x_;
  DeviceBuffer<bf16> inner_;
  DeviceBuffer<float> outer_;
  DeviceBuffer<bf16> out_;
  DeviceBuffer<uint8_t> workspace_;
};

void time_tokens(const RoutedShape& s, int64_t tokens, const Experts& experts, Report& report) {
  const std::vector<Routing> routings = make_routings(s, tokens);
  const Layer layer(s, tokens, experts, routings[0]);
  layer.swiglu(routings[0]);
  layer.gemm(routings[0]);
  layer.combine(routings[0]);
  synchronize("moe_layer");
  layer.check(routings[0]);

  double hit = 0.0;
  for (const Routing& r : routings) hit += double(r.hit) / double(routings.size());
  const int64_t rows = tokens * s.topk;
  const double matrix = double(Int4Matrices::bytes(s.intermediate, s.hidden));
  const double x = double(2 * tokens * s.hidden), inner = double(2 * rows * s.intermediate);
  const double outer = double(4 * rows * s.hidden);
  const double flops = 2.0 * double(rows * s.intermediate * s.hidden);
  const auto time = [&](const char* op, Work work, auto&& run) {
    work.hit = hit;
    report.time({op, s.text(), tokens, work}, int64_t(routings.size()),
                [&](int64_t call) { run(routings[call % routings.size()]); });
  };
  time("int4_grouped_swiglu", {.bytes = 2 * hit * matrix + x + inner, .flops = 2 * flops},
       [&](const Routing& r) { layer.swiglu(r); });
  time("int4_grouped_gemm", {.bytes = hit * matrix + inner + outer, .flops = flops},
       [&](const Routing& r) { layer.gemm(r); });
  time("moe_experts", {.bytes = 3 * hit * matrix + x + outer, .flops = 3 * flops},
       [&](const Routing& r) {
         layer.swiglu(r);
         layer.gemm(r);
       });
  time("moe_combine", {.bytes = outer + x, .cached = true},
       [&](const Routing& r) { layer.combine(r); });
  time("moe_layer", {.bytes = 3 * hit * matrix + 2 * x, .flops = 3 * flops}, [&](const Routing& r) {
    r.route();
    r.dispatch();
    layer.swiglu(r);
    layer.gemm(r);
    layer.combine(r);
  });
}

}  // namespace

void programs::moe_layer(Report& report) {
  for (const RoutedShape& s : kRoutedShapes) {
    if (!report.wants(s.text())) continue;
    const int64_t tiles = int4_tiled_bytes(s.intermediate, s.hidden) +
                          int4_tiled_scale_bytes(s.intermediate, s.hidden);
    // And of a prefill: rows in fp32, inner rows, and the tokens once or twice more as scratch.
    if (!report.has_room(s.text(), 3 * s.experts * tiles + (int64_t(3) << 30))) continue;
    const Experts experts(s);
    for (const int64_t tokens : report.token_counts({1, 8, 64, 128, 4096}))
      time_tokens(s, tokens, experts, report);
  }
}

}  // namespace kn::bench::gpu
