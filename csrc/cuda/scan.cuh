// Reverse linear recurrence along a sequence. It is computed one tile of tokens at a time, one
// token per thread:
//
//   y[t] = inject[t] + coef[t] y[next valid token]
//
// The composition of such steps is associative, so a tile is one scan. A masked token is the
// identity. All arithmetic is float64; with 8 to 12 bytes read per token it does not limit the
// speed.
#pragma once

#include "cuda/packed.cuh"
#include "cuda/packed_kernels.h"

namespace tokfuse {
namespace cuda {

constexpr int kScanBlock = 128;  // threads of a block, tokens of a tile
constexpr int kScanWarps = kScanBlock / kWarp;

// One step: y of a token as a function of y of the next one.
struct Link {
  double coef, inject;

  __device__ double of(double y) const { return inject + coef * y; }
};

// Returns the step that applies `behind` first, then `front`.
__device__ __forceinline__ Link compose(const Link& front, const Link& behind) {
  return {front.coef * behind.coef, front.inject + front.coef * behind.inject};
}

// State between two tiles: the first valid token after the current tile.
struct Carry {
  bool any;      // true if there is one
  double value;  // its value estimate
  double y;      // its y
};

// Returns to each thread whether a valid token follows its own, and the value of the next one. It
// has the first block-wide barrier of a tile.
__device__ inline Carry next_valid(bool valid, double value, Carry* carry) {
  using Firsts = Array<Carry, kScanWarps>;
  TOKFUSE_SHARED(firsts, Firsts);
  const unsigned ballot = __ballot_sync(kAllLanes, valid);
  const int lane = lane_id();
  const unsigned behind = lane == kWarp - 1 ? 0u : ballot & (kAllLanes << (lane + 1));
  const int source = behind != 0 ? __ffs(static_cast<int>(behind)) - 1 : lane;
  const double next = __shfl_sync(kAllLanes, value, source);
  if (ballot != 0 && lane == __ffs(static_cast<int>(ballot)) - 1) {
    firsts[warp_id()] = {true, value, 0};
  } else if (ballot == 0 && lane == 0) {
    firsts[warp_id()] = {false, 0, 0};
  }
  __syncthreads();
  Carry found = {behind != 0, next, 0}, first = *carry;
  for (int w = kScanWarps - 1; w > warp_id(); w--) {
    if (firsts[w].any) first = firsts[w];
  }
  if (!found.any) found = first;
  for (int w = warp_id(); w >= 0; w--) {
    if (firsts[w].any) first = firsts[w];
  }
  carry->any = first.any;
  carry->value = first.value;
  return found;
}

// Returns to each thread y of the next valid token. Sets carry->y to y of the tile's first valid
// token. It has the second block-wide barrier of a tile.
__device__ inline double y_behind(const Link& link, Carry* carry) {
  using Totals = Array<Link, kScanWarps>;
  TOKFUSE_SHARED(totals, Totals);
  const int lane = lane_id(), warp = warp_id();
  Link whole = link;  // from this lane to the end of its warp
  for (int by = 1; by < kWarp; by *= 2) {
    const Link behind = shuffle_down(whole, by);
    if (lane + by < kWarp) whole = compose(whole, behind);
  }
  if (lane == 0) totals[warp] = whole;
  const Link rest = shuffle_down(whole, 1);
  __syncthreads();
  double y = carry->y;
  for (int w = kScanWarps - 1; w > warp; w--) y = totals[w].of(y);
  const double behind = lane == kWarp - 1 ? y : rest.of(y);
  for (int w = warp; w >= 0; w--) y = totals[w].of(y);
  carry->y = y;
  return behind;
}

}  // namespace cuda
}  // namespace tokfuse
