// segment_moments: count, sum, sum of squares, minimum and maximum per segment, in one read of the
// values. Bytes per row: 4 or 8 for the value; with ids also 8 for the row number.
//
// A segment is a range of rows between two borders, or a range of equal ids in the sorted ids,
// found by binary search. `parts` blocks share a segment; part p reads strips p, p + parts, ... of
// its rows. The last block adds the parts in order.
//
// Legend: N rows, K segments.
#pragma once

#include "cuda/packed.cuh"
#include "cuda/packed_kernels.h"

namespace tokfuse {
namespace cuda {

struct Cell {
  double count, sum, sum_sq, min, max;

  // Minimum and maximum are NaN if one of the values is.
  __device__ void add(const Cell& other) {
    count += other.count;
    sum += other.sum;
    sum_sq += other.sum_sq;
    min = other.min < min || other.min != other.min ? other.min : min;
    max = other.max > max || other.max != other.max ? other.max : max;
  }
};

__device__ __forceinline__ Cell empty_cell() { return {0, 0, 0, kInfinity, -kInfinity}; }

// Returns the first position of the sorted ids whose id is not below `id`.
__device__ inline int64_t lower_bound(const int64_t* sorted, int64_t rows, int64_t id) {
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
__device__ void store_cell(const MomentsArgs& a, int64_t k, const Cell& c) {
  a.count[k] = static_cast<int64_t>(c.count);
  static_cast<T*>(a.sum)[k] = static_cast<T>(c.sum);
  static_cast<T*>(a.sum_sq)[k] = static_cast<T>(c.sum_sq);
  static_cast<T*>(a.min)[k] = static_cast<T>(c.min);
  static_cast<T*>(a.max)[k] = static_cast<T>(c.max);
}

template <class T>
__global__ void __launch_bounds__(kBlock, 2)
    segment_moments_kernel(const MomentsArgs a, const MomentsScratch scratch) {
  const int parts = scratch.parts;
  const int64_t k = blockIdx.x / parts, part = blockIdx.x % parts;
  const T* values = static_cast<const T*>(a.values);
  const bool by_id = a.cu_seqlens == nullptr;
  const int64_t begin = by_id ? lower_bound(a.segment_ids, a.rows, k) : a.cu_seqlens[k];
  const int64_t end = by_id ? lower_bound(a.segment_ids, a.rows, k + 1) : a.cu_seqlens[k + 1];
  Cell cell = empty_cell();
  for (int64_t i = begin + part * kBlock + threadIdx.x; i < end; i += parts * kBlock) {
    const int64_t row = by_id ? scratch.order[i] : i;
    if (!counts(a.mask, row)) continue;
    const double x = values[row];
    cell.add({1, x, x * x, x, x});
  }
  cell = block_sum(cell);
  if (parts == 1) {
    if (threadIdx.x == 0) store_cell<T>(a, k, cell);
    return;
  }
  Cell* table = reinterpret_cast<Cell*>(scratch.table) + k * parts;
  if (threadIdx.x == 0) table[part] = cell;
  if (!is_last_block(scratch.tickets + k, parts)) return;
  cell = block_sum_of(table, parts, empty_cell());
  if (threadIdx.x == 0) store_cell<T>(a, k, cell);
}

}  // namespace cuda
}  // namespace tokfuse
