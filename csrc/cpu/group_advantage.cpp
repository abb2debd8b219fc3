// group_advantage: (reward - baseline) / scale per group of rows with the same id.
//
// One pass with a hash table collects the rows of each group. Each group is then read from this
// copy. Statistics are float64. A group of equal rewards gives exactly 0. It is detected by
// comparison, because the rounding error of the mean divided by eps = 1e-6 can reach 0.1.
#include "common/group_rules.h"
#include "cpu/grouping.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialRows = 8192;  // below this, starting threads costs more than the work

double sum_of(const double* x, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += x[i];
  return s;
}

double std_of(const double* x, int64_t n, double mean, int ddof) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
  return ::sqrt(s / static_cast<double>(n - ddof));
}

void sift_down(double* x, int64_t root, int64_t n) {
  const double v = x[root];
  for (int64_t child; (child = 2 * root + 1) < n; root = child) {
    if (child + 1 < n && x[child + 1] > x[child]) child++;
    if (!(x[child] > v)) break;
    x[root] = x[child];
  }
  x[root] = v;
}

// Sorts in ascending order; the values must not be NaN. Insertion sort for up to 32 values, as most
// groups have, else heap sort.
void sort_ascending(double* x, int64_t n) {
  if (n <= 32) {
    for (int64_t i = 1; i < n; i++) {
      const double v = x[i];
      int64_t j = i;
      for (; j > 0 && x[j - 1] > v; j--) x[j] = x[j - 1];
      x[j] = v;
    }
    return;
  }
  for (int64_t i = n / 2 - 1; i >= 0; i--) sift_down(x, i, n);
  for (int64_t last = n - 1; last > 0; last--) {
    const double v = x[0];
    x[0] = x[last];
    x[last] = v;
    sift_down(x, 0, last);
  }
}

double length_weighted_mean(const GroupAdvantageArgs& a, const int64_t* row, const double* x,
                            int64_t n, double mean) {
  double weight = 0, sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const double length = static_cast<double>(a.lengths[row[i]]);
    weight += length;
    sum += length * x[i];
  }
  return weight == 0 ? mean : sum / weight;
}

// Writes the advantages of one group of n >= 2 rows. `x` holds its rewards and may be reordered.
void group_rows_out(const GroupAdvantageArgs& a, const int64_t* row, double* x, int64_t n,
                    double batch_std) {
  int equal = 1, nan = 0;
  for (int64_t i = 0; i < n; i++) {
    equal &= x[i] == x[0];
    nan |= x[i] != x[i];
  }
  if (equal) {
    for (int64_t i = 0; i < n; i++) a.advantage[row[i]] = 0.0f;
    return;
  }
  const bool ranked = a.baseline == Baseline::kMedian || a.baseline == Baseline::kSecondBest;
  if (ranked && nan) {
    for (int64_t i = 0; i < n; i++) a.advantage[row[i]] = __builtin_nanf("");
    return;
  }
  const double size = static_cast<double>(n), mean = sum_of(x, n) / size;
  double centre = mean, best = 0;
  const double group_std = a.scale == Scale::kStd ? std_of(x, n, mean, a.ddof) : 0;
  double factor = 1 / group_divisor(a, group_std, batch_std, mean);
  if (a.baseline == Baseline::kLeaveOneOut) factor *= size / (size - 1);
  if (a.baseline == Baseline::kLengthWeighted) centre = length_weighted_mean(a, row, x, n, mean);
  if (ranked) {
    sort_ascending(x, n);
    const double low = x[(n - 1) / 2], high = x[n / 2];
    centre = a.baseline == Baseline::kMedian ? low + 0.5 * (high - low) : x[n - 2];
    best = x[n - 1];
  }
  for (int64_t i = 0; i < n; i++) {
    const double r = a.reward[row[i]];
    const bool zero = a.baseline == Baseline::kSecondBest && r != best;
    a.advantage[row[i]] = zero ? 0.0f : static_cast<float>((r - centre) * factor);
  }
}

// Standard deviation of all rewards of the batch: 1 for a single row, exactly 0 if all are equal.
double std_of_batch(const GroupAdvantageArgs& a) {
  const int64_t n = a.seqs;
  if (n == 1) return 1;
  double sum = 0, square = 0;
  int equal = 1;
  for (int64_t i = 0; i < n; i++) {
    sum += a.reward[i];
    equal &= a.reward[i] == a.reward[0];
  }
  if (equal) return 0;
  const double mean = sum / static_cast<double>(n);
  for (int64_t i = 0; i < n; i++) square += (a.reward[i] - mean) * (a.reward[i] - mean);
  return ::sqrt(square / static_cast<double>(n - a.ddof));
}

}  // namespace

void group_advantage(const GroupAdvantageArgs& a) {
  if (a.seqs == 0) return;
  const double batch_std = a.scale == Scale::kBatchStd ? std_of_batch(a) : 0;
  if (a.group_ids == nullptr) {
    const double scale = a.scale == Scale::kBatchStd ? 1 / (batch_std + a.eps) : 1;
    for (int64_t i = 0; i < a.seqs; i++) {
      const double base = a.greedy_reward == nullptr ? 0.0 : a.greedy_reward[i];
      a.advantage[i] = static_cast<float>((a.reward[i] - base) * scale);
    }
    return;
  }
  const Grouping g = group_rows(a.group_ids, a.seqs, a.scratch_int);
  const int threads = a.seqs < kSerialRows ? 1 : a.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < g.groups; k++) {
    const int64_t begin = g.start[k], n = g.start[k + 1] - begin;
    double* x = a.scratch_double + begin;
    for (int64_t i = 0; i < n; i++) x[i] = a.reward[g.row[begin + i]];
    if (n == 1) {
      a.advantage[g.row[begin]] = static_cast<float>(singleton_advantage(a, x[0], batch_std));
    } else {
      group_rows_out(a, g.row + begin, x, n, batch_std);
    }
  }
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
