// mla_decode on Hopper: launches mla_decode_sm90.cuh, a block a multiprocessor.
#include <algorithm>

#include "cuda/mla_decode_sm90.cuh"

namespace kn::cuda {
namespace {

TensorMap rows_map(const char* op, const void* rows, int64_t count) {
  return make_tensor_map(
      op, {rows, 2, kWidth, count, kWidth * 2, kBoxColumns, kBoxRows, Swizzle::k128});
}

}  // namespace

int mla_decode_sm90(const char* op, const MlaProblem& p, bool fp8, int64_t splits, void* stream) {
  const int head_blocks = int((p.heads + kSm90Heads - 1) / kSm90Heads);
  const int64_t each = (multiprocessors(op) + head_blocks - 1) / head_blocks;
  const int64_t workers = std::max<int64_t>(std::min(each, splits), 1);
  MlaSm90Problem problem{p, rows_map(op, p.q, p.batch * p.heads), {}, head_blocks, int(workers)};
  if (!fp8) problem.cache = rows_map(op, p.cache, p.pages * p.page_size);
  auto run = [&](auto kernel, int shared_bytes) {
    launch({op, grid_of(op, workers * head_blocks), dim3(kMlaSm90Threads), size_t(shared_bytes),
            stream},
           kernel, problem);
  };
  if (fp8)
    run(mla_decode_sm90_kernel<true>, MlaSm90Layout<true>::kBytes);
  else
    run(mla_decode_sm90_kernel<false>, MlaSm90Layout<false>::kBytes);
  return int(workers);
}

}  // namespace kn::cuda
