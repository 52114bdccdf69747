// rope_append: rotation and cache append at the heads of K2 and Moonlight. Activations stay in
// cache in a running model, hence no share of the memory limit.
#include "harness.h"
#include "kimi_native/ops.h"

namespace kn::bench {
namespace {

struct Shape {
  const char* name;
  int64_t heads, rank, rope;
};
const Shape kShapes[] = {{"k2", 64, 512, 64}, {"moonlight", 16, 512, 64}, {"tiny", 4, 64, 16}};

void time_tokens(const Shape& s, const std::string& text, int64_t tokens, Report& report) {
  Random random;
  const int64_t width = s.rank + s.rope, q_width = s.heads * s.rope, pairs = s.rope / 2;
  const auto entry = [&] { return to_bf16(random.sign()); };
  const auto angle = [&] { return random.sign(); };
  const Buffer<bf16> q(tokens * q_width, entry), kv(tokens * width, entry), cache(tokens * width);
  const Buffer<float> cos(tokens * pairs, angle), sin(tokens * pairs, angle);
  const Buffer<float> out(tokens * q_width);
  std::vector<int64_t> slots(tokens);
  for (int64_t t = 0; t < tokens; ++t) slots[t] = tokens - 1 - t;
  RopeAppendArgs a{};
  a.q = q.data();
  a.latent = kv.data();
  a.k_rope = kv.data() + s.rank;
  a.cos = cos.data();
  a.sin = sin.data();
  a.slots = slots.data();
  a.q_out = out.data();
  a.cache = cache.data();
  a.dtype = a.cache_dtype = DType::kBf16;
  a.q_out_dtype = DType::kFp32;
  a.tokens = a.cache_rows = tokens;
  a.heads = s.heads;
  a.kv_lora_rank = s.rank;
  a.qk_rope_head_dim = s.rope;
  a.q_token_stride = a.q_out_token_stride = q_width;
  a.q_head_stride = a.q_out_head_stride = s.rope;
  a.latent_token_stride = a.k_rope_token_stride = width;
  cpu::rope_append(a);
  for (int64_t j = 0; j < pairs; ++j) {  // the first token, which goes to the last cache row
    const double x = to_float(q[2 * j]), y = to_float(q[2 * j + 1]);
    const double k = to_float(kv[s.rank + 2 * j]), l = to_float(kv[s.rank + 2 * j + 1]);
    const float key = to_float(cache[(tokens - 1) * width + s.rank + 2 * j]);
    expect_close("rope_append", out[2 * j], x * cos[j] - y * sin[j], 0x1p-7);
    expect_close("rope_append", out[2 * j + 1], x * sin[j] + y * cos[j], 0x1p-7);
    expect_close("rope_append: key", key, k * cos[j] - l * sin[j], 0x1p-7);
  }
  for (int64_t i = 0; i < s.rank; ++i)
    expect_close("rope_append: latent", to_float(cache[(tokens - 1) * width + i]), to_float(kv[i]),
                 0.0);
  const Work work{.bytes = double(tokens * (6 * q_width + 4 * width)), .cached = true};
  report.time({"rope_append", text, tokens, work}, [&](int64_t) { cpu::rope_append(a); });
}

}  // namespace

void programs::rope_append(Report& report) {
  for (const Shape& s : kShapes) {
    const std::string text = concat(s.name, " heads=", s.heads);
    if (!report.wants(text)) continue;
    for (const int threads : report.thread_counts()) {
      set_num_threads(threads);
      for (const int64_t tokens : report.token_counts({1, 16, 256}))
        time_tokens(s, text, tokens, report);
    }
  }
}

}  // namespace kn::bench
