// Random INT4 matrices as tiles on the device, and one product of one in plain double.
//
// The matrices are distinct memory, but only five of them are different numbers: matrix i is made
// from source i % 5, so that gigabytes of them are made in a moment.
#pragma once
#include "device_buffer.h"
#include "kimi_native/layout.h"
#include "kimi_native/ops.h"

namespace kn::bench::gpu {

class Int4Matrices {
 public:
  Int4Matrices(int64_t count, int64_t out, int64_t in, Random& random)
      : out_(out),
        in_(in),
        packed_(kSources * out * int4_row_bytes(in), [&] { return uint8_t(random.bits()); }),
        scale_(kSources * out * num_groups(in),
               [&] { return to_bf16(0.01f + 0.01f * random.unit()); }),
        tiles_(count * int4_tiled_bytes(out, in)),
        tile_scales_(count * int4_tiled_scale_bytes(out, in)) {
    for (int64_t i = 0; i < count; ++i) {
      cuda::Int4PackArgs a{packed_.data() + i % kSources * out * int4_row_bytes(in),
                           scale_.data() + i % kSources * out * num_groups(in),
                           mutable_tiles(i),
                           mutable_scales(i),
                           out,
                           in,
                           kGroupSize};
      cuda::int4_pack(a, stream());
    }
    synchronize("int4_pack");
  }

  const uint8_t* tiles(int64_t i) const { return mutable_tiles(i); }
  // As the ops take them: kn::bf16, though they lie in the order of the tiles.
  const bf16* scales(int64_t i) const { return reinterpret_cast<const bf16*>(mutable_scales(i)); }
  int64_t out() const { return out_; }
  int64_t in() const { return in_; }
  // What one matrix is in the checkpoint: the bytes that the problem needs.
  static int64_t bytes(int64_t out, int64_t in) {
    return out * (int4_row_bytes(in) + num_groups(in) * int64_t(sizeof(bf16)));
  }

  // x times row `row` of matrix i.
  Product dot(const std::vector<bf16>& x, int64_t i, int64_t row) const {
    Product p;
    const int64_t first = i % kSources * out_ + row;
    for (int64_t c = 0; c < in_; ++c) {
      const uint8_t byte = packed_[first * int4_row_bytes(in_) + c / 2];
      const int q = (c % 2 ? byte >> 4 : byte & 15) - kInt4ZeroPoint;
      p.add(double(to_float(x[c])) * q *
            to_float(scale_[first * num_groups(in_) + c / kGroupSize]));
    }
    return p;
  }

 private:
  static constexpr int64_t kSources = 5;
  uint8_t* mutable_tiles(int64_t i) const {
    return tiles_.data() + i * int4_tiled_bytes(out_, in_);
  }
  uint8_t* mutable_scales(int64_t i) const {
    return tile_scales_.data() + i * int4_tiled_scale_bytes(out_, in_);
  }

  int64_t out_, in_;
  RandomBuffer<uint8_t> packed_;
  RandomBuffer<bf16> scale_;
  DeviceBuffer<uint8_t> tiles_, tile_scales_;
};

// Entries first ... first + count of a random buffer.
template <typename T>
std::vector<T> host_row(const RandomBuffer<T>& x, int64_t first, int64_t count) {
  std::vector<T> row(count);
  for (int64_t i = 0; i < count; ++i) row[i] = x[first + i];
  return row;
}

}  // namespace kn::bench::gpu
