// segment_moments: count, sum, sum of squares, minimum and maximum per segment, in one read of the
// values.
//
// With ids, the rows are split into chunks, whose number depends on the sizes only. Each chunk
// fills its own table, and the tables are merged in order. So the result does not depend on the
// thread count.
#include "cpu/packed_kernels.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialRows = 16384;

struct Cell {
  double count, sum, sum_sq, min, max;
};

constexpr Cell kEmpty = {0, 0, 0, __builtin_inf(), -__builtin_inf()};

// Minimum and maximum that are NaN if either argument is.
double smaller(double a, double b) { return b < a || b != b ? b : a; }
double larger(double a, double b) { return b > a || b != b ? b : a; }

void add(Cell& c, double x) {
  c.count += 1;
  c.sum += x;
  c.sum_sq += x * x;
  c.min = smaller(c.min, x);
  c.max = larger(c.max, x);
}

void merge(Cell& c, const Cell& other) {
  c.count += other.count;
  c.sum += other.sum;
  c.sum_sq += other.sum_sq;
  c.min = smaller(c.min, other.min);
  c.max = larger(c.max, other.max);
}

template <class T>
void store_cell(const MomentsArgs& a, int64_t k, const Cell& c) {
  a.count[k] = static_cast<int64_t>(c.count);
  static_cast<T*>(a.sum)[k] = static_cast<T>(c.sum);
  static_cast<T*>(a.sum_sq)[k] = static_cast<T>(c.sum_sq);
  static_cast<T*>(a.min)[k] = static_cast<T>(c.min);
  static_cast<T*>(a.max)[k] = static_cast<T>(c.max);
}

template <class T>
Cell dense_segment(const T* x, int64_t n) {
  double sum = 0, sum_sq = 0, low = __builtin_inf(), high = -__builtin_inf();
#pragma omp simd reduction(+ : sum, sum_sq) reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < n; i++) {
    const double v = x[i];
    sum += v;
    sum_sq += v * v;
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  if (sum_sq != sum_sq) low = high = sum_sq;  // the comparisons drop a NaN, the squares keep it
  return {static_cast<double>(n), sum, sum_sq, low, high};
}

// Fills the table of one chunk. Returns the first row with an invalid id, or -1. Equal ids mostly
// follow each other; a long run of them is reduced by one vector loop.
template <class T>
int64_t fill_chunk(const MomentsArgs& a, int64_t begin, int64_t end, Cell* table) {
  constexpr int64_t kLongRun = 16;
  const T* values = static_cast<const T*>(a.values);
  for (int64_t k = 0; k < a.segments; k++) table[k] = kEmpty;
  for (int64_t i = begin; i < end;) {
    if (a.mask != nullptr && a.mask[i] == 0) {
      i++;
      continue;
    }
    const int64_t id = a.segment_ids[i];
    if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(a.segments)) return i;
    int64_t stop = i + 1;
    while (stop < end && a.segment_ids[stop] == id && (a.mask == nullptr || a.mask[stop] != 0))
      stop++;
    if (stop - i >= kLongRun) {
      merge(table[id], dense_segment(values + i, stop - i));
      i = stop;
    } else {
      for (; i < stop; i++) add(table[id], values[i]);
    }
  }
  return -1;
}

template <class T>
int64_t moments_by_id(const MomentsArgs& a) {
  Cell* tables = reinterpret_cast<Cell*>(a.scratch);
  const int64_t span = (a.rows + a.chunks - 1) / a.chunks;
  const int threads = a.rows < kSerialRows ? 1 : a.threads;
  int64_t bad = a.rows;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(min : bad)
  for (int64_t c = 0; c < a.chunks; c++) {
    const int64_t begin = c * span, end = begin + span < a.rows ? begin + span : a.rows;
    const int64_t row = fill_chunk<T>(a, begin, end, tables + c * a.segments);
    if (row >= 0 && row < bad) bad = row;
  }
  if (bad < a.rows) return bad;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < a.segments; k++) {
    Cell cell = tables[k];
    for (int64_t c = 1; c < a.chunks; c++) merge(cell, tables[c * a.segments + k]);
    store_cell<T>(a, k, cell);
  }
  return -1;
}

template <class T>
void moments_by_border(const MomentsArgs& a) {
  const T* values = static_cast<const T*>(a.values);
#pragma omp parallel for schedule(dynamic, 64) num_threads(a.rows < kSerialRows ? 1 : a.threads)
  for (int64_t k = 0; k < a.segments; k++) {
    const int64_t begin = a.cu_seqlens[k], end = a.cu_seqlens[k + 1];
    Cell cell = kEmpty;
    if (a.mask == nullptr) {
      cell = dense_segment(values + begin, end - begin);
    } else {
      for (int64_t i = begin; i < end; i++) {
        if (a.mask[i] != 0) add(cell, values[i]);
      }
    }
    store_cell<T>(a, k, cell);
  }
}

}  // namespace

int64_t segment_moments(const MomentsArgs& a) {
  if (a.cu_seqlens == nullptr) {
    return a.is_double ? moments_by_id<double>(a) : moments_by_id<float>(a);
  }
  if (a.is_double) {
    moments_by_border<double>(a);
  } else {
    moments_by_border<float>(a);
  }
  return -1;
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
