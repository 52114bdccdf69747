// Meetings of a warp's lanes: shuffles, votes and the matrix instructions. The last lane of the
// mask to come does the work of all.
#pragma once
#include <cstdint>

#include "simt/thread.h"

namespace kn::simt {

// The meeting that the running lane joins; fails if the others came for another operation.
Meeting& join_meeting(unsigned mask, const char* what);
void end_meeting(Meeting& meeting);

// f(in, out): arrays of 32 pointers, null where the mask has no lane.
template <typename In, typename Out, typename F>
void meet(unsigned mask, const char* what, const In& in, Out& out, F f) {
  Meeting& meeting = join_meeting(mask, what);
  meeting.in[self->lane] = &in;
  meeting.out[self->lane] = &out;
  if (meeting.arrived != mask) {
    worker->wait({Wait::Kind::kWarp, what, mask});
    return;
  }
  const In* ins[32];
  Out* outs[32];
  for (int l = 0; l < 32; ++l) {
    const bool present = mask >> l & 1;
    ins[l] = present ? static_cast<const In*>(meeting.in[l]) : nullptr;
    outs[l] = present ? static_cast<Out*>(meeting.out[l]) : nullptr;
  }
  f(ins, outs);
  end_meeting(meeting);
}

inline constexpr unsigned kWholeWarp = 0xffffffffu;

// __syncwarp: orders the memory accesses of the lanes, which no other meeting does.
void sync_warp(unsigned mask);

}  // namespace kn::simt
