// token_stats_at: token_stats, and log-probs at a few ids of each row under the same log-sum-exp.
//
// Forward: the ids are gathered when the row has just been read, from the cache. A confident id
// that is not the target needs the sum of all others to its own digits, which the sums of
// token_stats do not hold (rows.h); such a row is summed once more, without that id. It is rare:
// an id with p > 3 / 4 is the target of most tokens.
//
// Backward, with g_j the sum of what arrives at column j, grad_logp at the target included, and
// total = sum_i g_i - grad_lse:
//     du_j = 1/T ( g_j (1 - p_j) - p_j (total - g_j) - gh p_j (log p_j + entropy) ).
// row_backward writes what a column without g gets, from the coefficient `total`. The columns of
// the ids and the target are computed here and overwrite it, so that each is rounded once.
//
// Bytes per row of k ids: those of token_stats, and k * (12 + sizeof(T)) gathered, twice that in
// the backward.
#include <omp.h>

#include "cpu/ids_kernels.h"
#include "cpu/row_gradient.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

struct RowIds {
  int64_t begin, end;
};

RowIds ids_of(const IdsArgs& ids, int64_t t) { return {ids.offsets[t], ids.offsets[t + 1]}; }

// Called for each row while its ids are in the cache. One pass over all ids beforehand would take
// 1.5% of a call.
TOKFUSE_BLOCK_LOOP bool in_range(const int64_t* ids, int64_t n, int64_t vocab) {
  int64_t low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t k = 0; k < n; k++) {
    low = ids[k] < low ? ids[k] : low;
    high = ids[k] > high ? ids[k] : high;
  }
  return low >= -1 && high < vocab;
}

// Starts to load what is read after the row.
template <class E>
void prefetch_of_row(const E* values, RowIds range) {
  constexpr int64_t kPerLine = 64 / sizeof(E);
  for (int64_t k = range.begin; k < range.end; k += kPerLine) prefetch(values + k);
}

// ----------------------------------------------------------------------------------------- forward

// A pointer p with p[column] = z_column, also of a row in tiles.
template <class T>
const T* tile_of(const Row<T>& row, int64_t column) {
  return row.tile < row.vocab ? row.block(column) : row.z;
}

// Above this p, the float32 sums with the id among them lack digits of 1 - p.
constexpr float kConfident = -0.28768207f;  // ln 3/4

constexpr int64_t kGather = 256;

// Loops of their own, without a branch: the loads of one do not wait for the arithmetic of the
// other. A padding id reads column 0.
template <class T, bool kTransform>
TOKFUSE_BLOCK_LOOP void gather(const Row<T>& row, const Transform& f, const int64_t* ids, int64_t n,
                               float* __restrict u) {
  for (int64_t k = 0; k < n; k++) {
    const int64_t id = ids[k] < 0 ? 0 : ids[k];
    u[k] = transformed<T, kTransform>(tile_of(row, id), row.bias, f, id);
  }
}

// Constants of one row: log p_j = ln2 ((u_j - top) c - log2_sum).
struct Normaliser {
  float top, c;
  double log2_sum, target_logp;
  int64_t target;
};

// Returns true if an id other than the target is confident. All lanes are 64 bits wide like the
// ids. A loop with branches takes as long as the gather: 1.6 ns per id.
TOKFUSE_BLOCK_LOOP bool normalise(const float* __restrict u, const int64_t* __restrict ids,
                                  int64_t n, Normaliser r, float* __restrict logp) {
  int64_t confident = 0;
#pragma omp simd reduction(+ : confident)
  for (int64_t k = 0; k < n; k++) {
    double lp = kLn2 * (static_cast<double>(u[k] - r.top) * r.c - r.log2_sum);
    const bool known = (ids[k] < 0) | (ids[k] == r.target);
    confident += !known & (lp > kConfident);
    lp = ids[k] == r.target ? r.target_logp : lp;
    logp[k] = static_cast<float>(ids[k] < 0 ? 0.0 : lp);
  }
  return confident > 0;
}

template <class T, bool kTransform>
void log_probs(const Row<T>& row, const Transform& f, float c, const RowStats& r,
               const IdsArgs& ids, RowIds range) {
  if (r.inv_sum == 0.0f) {  // without a distribution logp is -inf at all ids, too
    for (int64_t k = range.begin; k < range.end; k++) {
      ids.logp_at[k] = ids.ids[k] < 0 ? 0.0f : static_cast<float>(r.logp);
    }
    return;
  }
  const bool far = is_far(r.shift);
  const float top = far ? transformed_max<T, kTransform>(row, f) : 0.0f;
  const double log2_sum = far ? r.log2_sum : r.shift + r.log2_sum;
  const Normaliser terms = {top, c, log2_sum, r.logp, row.target};
  float u[kGather];
  for (int64_t begin = range.begin; begin < range.end; begin += kGather) {
    const int64_t left = range.end - begin, n = left < kGather ? left : kGather;
    const int64_t* at = ids.ids + begin;
    float* logp = ids.logp_at + begin;
    gather<T, kTransform>(row, f, at, n, u);
    if (!normalise(u, at, n, terms, logp)) continue;
    for (int64_t k = 0; k < n; k++) {
      if (at[k] < 0 || at[k] == row.target || !(logp[k] > kConfident)) continue;
      Row<T> others = row;
      others.target = at[k];
      logp[k] = static_cast<float>(row_forward<T, kTransform, false>(others, f, c).logp);
    }
  }
}

// Returns the first row with an id out of range, or -1.
template <class T, bool kTransform>
int64_t forward(const LogitsArgs& a, const TokenStatsOut& o, const IdsArgs& ids) {
  const Transform f = transform_of(a);
  const RowStats zero = {};
  int64_t bad = a.tokens;
#pragma omp parallel for schedule(guided, 2) num_threads(threads_for(a)) reduction(min : bad)
  for (int64_t i = 0; i < a.rows; i++) {
    const int64_t t = token_of(a, i);
    const RowIds range = ids_of(ids, t);
    if (masked(a, t)) {
      write_row(o, t, zero);
      for (int64_t k = range.begin; k < range.end; k++) ids.logp_at[k] = 0.0f;
      continue;
    }
    prefetch_of_row(ids.ids, range);
    const Row<T> row = row_of<T>(a, i);
    const float c = base2_scale(a, temperature_of(a, t));
    const RowStats r = row_forward<T, kTransform, false>(row, f, c);
    write_row(o, t, r);
    if (in_range(ids.ids + range.begin, range.end - range.begin, a.vocab)) {
      log_probs<T, kTransform>(row, f, c, r, ids, range);
    } else {
      bad = t < bad ? t : bad;
    }
  }
  return bad < a.tokens ? bad : -1;
}

// ---------------------------------------------------------------------------------------- backward

// The columns of one row that something arrives at, each once. A hash table finds duplicates, which
// add up.
struct Columns : IdsScratch {
  int64_t count = 0;

  // Clears a table for `most` columns, because other rows may have far more.
  Columns(const IdsScratch& of_all, int64_t most) : IdsScratch(of_all) {
    const int64_t thread = omp_get_thread_num();
    column += thread * num_columns;
    incoming += thread * num_columns;
    logp += thread * num_columns;
    grad += thread * num_columns;
    table += thread * table_size;
    table_size = table_places(most);
    memset(table, 0xff, static_cast<size_t>(table_size) * sizeof(int32_t));
  }

  void add(int64_t id, float arriving, float log_prob) {
    const uint64_t mixed = static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u;
    int64_t at = static_cast<int64_t>(mixed >> 32) & (table_size - 1);
    for (; table[at] >= 0; at = (at + 1) & (table_size - 1)) {
      if (column[table[at]] == id) {
        incoming[table[at]] += arriving;
        return;
      }
    }
    table[at] = static_cast<int32_t>(count);
    column[count] = id;
    incoming[count] = arriving;
    logp[count++] = log_prob;
  }
};

// The sum of what arrives at the ids of a row, and whether any of it is not 0.
TOKFUSE_BLOCK_LOOP double sum_incoming(const int64_t* __restrict ids, const float* __restrict grad,
                                       int64_t n, bool* any) {
  double sum = 0.0;
  int64_t counted = 0;
#pragma omp simd reduction(+ : sum, counted)
  for (int64_t k = 0; k < n; k++) {
    const float g = ids[k] < 0 ? 0.0f : grad[k];
    sum += static_cast<double>(g);
    counted += g != 0.0f;  // NaN counts
  }
  *any = counted > 0;
  return sum;
}

// Terms of the gradient that all columns of a row share.
struct RowTerms {
  double total;  // sum of what arrives at the columns, minus what arrives at lse
  float entropy, gh, scale;
};

// The gradients of the columns before the slope of a softcap.
TOKFUSE_BLOCK_LOOP void gradients_of(const double* __restrict incoming,
                                     const float* __restrict logp, int64_t n, RowTerms r,
                                     float* __restrict grad) {
#pragma omp simd
  for (int64_t k = 0; k < n; k++) {
    const float p = exp2_simd(clamp_exponent(logp[k] * kLog2E, kExponentFloor));
    const float others = static_cast<float>(r.total - incoming[k]);
    const float log_term = p == 0.0f ? 0.0f : p * (logp[k] + r.entropy);
    const float own = static_cast<float>(incoming[k]) * (1.0f - p);
    grad[k] = r.scale * (own - p * others - r.gh * log_term);
  }
}

// The same for a column whose p is near 1, with all digits of 1 - p.
float confident_gradient(double incoming, float logp, const RowTerms& r) {
  const double lp = logp, p = ::exp(lp), others = r.total - incoming;
  const double log_term = p == 0 ? 0.0 : p * (lp + r.entropy);
  return static_cast<float>(r.scale * (-incoming * ::expm1(lp) - p * others - r.gh * log_term));
}

// Returns the first row with an id out of range, or -1. Such a row is not written.
template <class T, bool kTransform>
int64_t backward(const LogitsArgs& a, const TokenStatsGrad& g, const IdsArgs& ids,
                 const IdsScratch& scratch) {
  const Transform f = transform_of(a);
  int64_t bad = a.tokens;
#pragma omp parallel for schedule(guided, 2) num_threads(threads_for(a)) reduction(min : bad)
  for (int64_t i = 0; i < a.rows; i++) {
    const int64_t t = token_of(a, i);
    const bool skip = masked(a, t) || g.inv_sum[t] == 0.0f;
    const float ga = skip || g.grad_logp == nullptr ? 0.0f : g.grad_logp[t];
    const float gh = skip || g.grad_entropy == nullptr ? 0.0f : g.grad_entropy[t];
    const float gl = skip || g.grad_lse == nullptr ? 0.0f : g.grad_lse[t];
    const float temperature = temperature_of(a, t), scale = a.logit_scale / temperature;
    const Row<T> row = row_of<T>(a, i);
    T* out = static_cast<T*>(g.grad_logits) + i * g.grad_stride;
    const RowIds range = skip ? RowIds{0, 0} : ids_of(ids, t);
    if (!in_range(ids.ids + range.begin, range.end - range.begin, a.vocab)) {
      bad = t < bad ? t : bad;
      continue;
    }

    bool arrives = false;
    const double at_ids = sum_incoming(ids.ids + range.begin, ids.grad_logp_at + range.begin,
                                       range.end - range.begin, &arrives);
    const RowTerms terms = {at_ids + ga - gl, g.entropy[t], gh, scale};
    const bool active = arrives || ga != 0.0f || gh != 0.0f || gl != 0.0f;
    Columns columns(scratch, active ? range.end - range.begin + 1 : 0);
    if (active) {
      columns.add(row.target, ga, g.logp[t]);
      for (int64_t k = range.begin; k < range.end; k++) {
        if (ids.ids[k] >= 0) columns.add(ids.ids[k], ids.grad_logp_at[k], ids.logp_at[k]);
      }
    }
    // Before row_backward, which may write over the logits.
    gradients_of(columns.incoming, columns.logp, columns.count, terms, columns.grad);
    for (int64_t n = 0; n < columns.count; n++) {
      if (!(columns.logp[n] <= -0.7f)) {
        columns.grad[n] = confident_gradient(columns.incoming[n], columns.logp[n], terms);
      }
      if (kTransform && f.cap != 0.0f) {
        const int64_t column = columns.column[n];
        const float tanh_u = tanh_simd(load(tile_of(row, column), column) * f.pre);
        columns.grad[n] *= 1.0f - tanh_u * tanh_u;
      }
    }
    if (i + 1 < a.rows) {
      const RowIds next = ids_of(ids, token_of(a, i + 1));
      prefetch_of_row(ids.ids, next);
      prefetch_of_row(ids.grad_logp_at, next);
      prefetch_of_row(ids.logp_at, next);
    }
    row_backward<T, kTransform>(row, f, base2_scale(a, temperature), scale, g.row_max[t],
                                g.inv_sum[t], g.logp[t], g.entropy[t],
                                static_cast<float>(terms.total), gh, out);
    for (int64_t n = 0; n < columns.count; n++) {
      const int64_t column = columns.column[n];
      store(out + (tile_of(row, column) - row.z), column, columns.grad[n]);
    }
  }
  return bad < a.tokens ? bad : -1;
}

}  // namespace

int64_t token_stats_at_fwd(const LogitsArgs& a, const TokenStatsOut& o, const IdsArgs& ids) {
  int64_t bad = -1;
  by_dtype(a, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    bad = has_transform(a) ? forward<T, true>(a, o, ids) : forward<T, false>(a, o, ids);
  });
  return bad;
}

int64_t token_stats_at_bwd(const LogitsArgs& a, const TokenStatsGrad& g, const IdsArgs& ids,
                           const IdsScratch& scratch) {
  int64_t bad = -1;
  by_dtype(a, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    bad = has_transform(a) ? backward<T, true>(a, g, ids, scratch)
                           : backward<T, false>(a, g, ids, scratch);
  });
  return bad;
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
