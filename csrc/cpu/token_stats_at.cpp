// token_stats_at: token_stats, and log-probs at a few ids of each row under the same log-sum-exp.
//
// Forward: the ids are gathered when the row has just been read, from the cache. A confident id
// that is not the target needs the sum of all others to its own digits, which the sums of
// token_stats do not hold (rows.h); such a row is summed once more, without that id. It is rare:
// an id with p > 3 / 4 is the target of most tokens.
//
// Backward, with G the gradient of logp_at and g_j the sum of what arrives at column j, grad_logp
// at the target included:
//     du_j = 1/T ( g_j (1 - p_j) - p_j (sum_i g_i - g_j) - gh p_j (log p_j + entropy) ).
// row_backward writes what a column without g gets, from the coefficient sum_i g_i. The columns of
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

bool is_column(int64_t id, int64_t vocab) { return id >= 0 && id < vocab; }

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

TOKFUSE_BLOCK_LOOP void normalise(const float* __restrict u, int64_t n, float top, float c,
                                  double log2_sum, float* __restrict logp) {
#pragma omp simd
  for (int64_t k = 0; k < n; k++) {
    logp[k] = static_cast<float>(kLn2 * (static_cast<double>(u[k] - top) * c - log2_sum));
  }
}

template <class T, bool kTransform>
void log_probs(const Row<T>& row, const Transform& f, float c, const RowStats& r,
               const IdsArgs& ids, RowIds range) {
  const bool dead = r.inv_sum == 0.0f, far = !dead && is_far(r.shift);
  const float top = far ? transformed_max<T, kTransform>(row, f) : 0.0f;
  const double log2_sum = far ? r.log2_sum : r.shift + r.log2_sum;
  float u[kGather];
  for (int64_t begin = range.begin; begin < range.end; begin += kGather) {
    const int64_t left = range.end - begin, n = left < kGather ? left : kGather;
    const int64_t* at = ids.ids + begin;
    float* logp = ids.logp_at + begin;
    gather<T, kTransform>(row, f, at, n, u);
    normalise(u, n, top, c, log2_sum, logp);
    for (int64_t k = 0; k < n; k++) {
      if (at[k] < 0) {
        logp[k] = 0.0f;
      } else if (at[k] == row.target || dead) {  // without a distribution logp is -inf, too
        logp[k] = static_cast<float>(r.logp);
      } else if (logp[k] > kConfident) {
        Row<T> others = row;
        others.target = at[k];
        logp[k] = static_cast<float>(row_forward<T, kTransform, false>(others, f, c).logp);
      }
    }
  }
}

template <class T, bool kTransform>
void forward(const LogitsArgs& a, const TokenStatsOut& o, const IdsArgs& ids) {
  const Transform f = transform_of(a);
  const RowStats zero = {};
#pragma omp parallel for schedule(guided, 2) num_threads(threads_for(a))
  for (int64_t i = 0; i < a.rows; i++) {
    const int64_t t = token_of(a, i);
    const RowIds range = ids_of(ids, t);
    if (masked(a, t)) {
      write_row(o, t, zero);
      for (int64_t k = range.begin; k < range.end; k++) ids.logp_at[k] = 0.0f;
      continue;
    }
    const Row<T> row = row_of<T>(a, i);
    const float c = base2_scale(a, temperature_of(a, t));
    const RowStats r = row_forward<T, kTransform, false>(row, f, c);
    write_row(o, t, r);
    log_probs<T, kTransform>(row, f, c, r, ids, range);
  }
}

// ---------------------------------------------------------------------------------------- backward

// The columns of one row that something arrives at, each once: a hash table, because duplicates add
// up and K may be hundreds.
struct Columns {
  IdEntry* entries;
  int64_t count;
  int32_t* table;  // place in `entries`, or -1
  int64_t size;    // a power of two
};

Columns columns_of_thread(const IdsScratch& s) {
  const int64_t thread = omp_get_thread_num();
  return {s.entries + thread * s.num_entries, 0, s.table + thread * s.table_size, s.table_size};
}

void clear(Columns& columns) {
  columns.count = 0;
  memset(columns.table, 0xff, static_cast<size_t>(columns.size) * sizeof(int32_t));
}

void add(Columns& columns, int64_t column, float incoming, float logp) {
  const uint64_t mixed = static_cast<uint64_t>(column) * 0x9e3779b97f4a7c15u;
  int64_t at = static_cast<int64_t>(mixed >> 32) & (columns.size - 1);
  for (; columns.table[at] >= 0; at = (at + 1) & (columns.size - 1)) {
    IdEntry& known = columns.entries[columns.table[at]];
    if (known.column == column) {
      known.incoming += incoming;
      return;
    }
  }
  columns.table[at] = static_cast<int32_t>(columns.count);
  columns.entries[columns.count++] = {column, incoming, logp, 0.0f};
}

// The gradient of one column before the slope of a softcap. 1 - p keeps its digits where p is near
// 1; elsewhere float32 does.
float gradient_of_column(const IdEntry& e, double total, float entropy, float gh, float scale) {
  if (!(e.logp <= -0.7f)) {
    const double lp = e.logp, p = ::exp(lp), others = total - e.incoming;
    const double log_term = p == 0 ? 0.0 : p * (lp + entropy);
    return static_cast<float>(scale * (-e.incoming * ::expm1(lp) - p * others - gh * log_term));
  }
  const float p = exp2_simd(clamp_exponent(e.logp * kLog2E, kExponentFloor));
  const float incoming = static_cast<float>(e.incoming);
  const float others = static_cast<float>(total - e.incoming);
  const float log_term = p == 0.0f ? 0.0f : p * (e.logp + entropy);
  return scale * (incoming * (1.0f - p) - p * others - gh * log_term);
}

template <class T, bool kTransform>
void backward(const LogitsArgs& a, const TokenStatsGrad& g, const IdsArgs& ids,
              const IdsScratch& scratch) {
  const Transform f = transform_of(a);
#pragma omp parallel for schedule(guided, 2) num_threads(threads_for(a))
  for (int64_t i = 0; i < a.rows; i++) {
    const int64_t t = token_of(a, i);
    const bool skip = masked(a, t) || g.inv_sum[t] == 0.0f;
    const float ga = skip || g.grad_logp == nullptr ? 0.0f : g.grad_logp[t];
    const float gh = skip || g.grad_entropy == nullptr ? 0.0f : g.grad_entropy[t];
    const float temperature = temperature_of(a, t), scale = a.logit_scale / temperature;
    const Row<T> row = row_of<T>(a, i);
    T* out = static_cast<T*>(g.grad_logits) + i * g.grad_stride;

    Columns columns = columns_of_thread(scratch);
    double total = ga;
    bool active = ga != 0.0f || gh != 0.0f;
    const RowIds range = skip ? RowIds{0, 0} : ids_of(ids, t);
    for (int64_t k = range.begin; k < range.end; k++) {
      if (ids.ids[k] < 0) continue;
      total += ids.grad_logp_at[k];
      active = active || ids.grad_logp_at[k] != 0.0f;
    }
    columns.count = 0;
    if (active) {
      clear(columns);
      add(columns, row.target, ga, g.logp[t]);
      for (int64_t k = range.begin; k < range.end; k++) {
        if (ids.ids[k] < 0) continue;
        add(columns, ids.ids[k], ids.grad_logp_at[k], ids.logp_at[k]);
      }
    }
    // Before row_backward, which may write over the logits.
    for (int64_t n = 0; n < columns.count; n++) {
      IdEntry& e = columns.entries[n];
      e.grad = gradient_of_column(e, total, g.entropy[t], gh, scale);
      if (kTransform && f.cap != 0.0f) {
        const float tanh_u = tanh_simd(load(tile_of(row, e.column), e.column) * f.pre);
        e.grad *= 1.0f - tanh_u * tanh_u;
      }
    }
    row_backward<T, kTransform>(row, f, base2_scale(a, temperature), scale, g.row_max[t],
                                g.inv_sum[t], g.logp[t], g.entropy[t], static_cast<float>(total),
                                gh, out);
    for (int64_t n = 0; n < columns.count; n++) {
      const int64_t column = columns.entries[n].column;
      store(out + (tile_of(row, column) - row.z), column, columns.entries[n].grad);
    }
  }
}

}  // namespace

int64_t ids_bad_row(const LogitsArgs& a, const IdsArgs& ids) {
  for (int64_t i = 0; i < a.rows; i++) {
    const int64_t t = token_of(a, i);
    if (masked(a, t)) continue;
    int64_t low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t k = ids.offsets[t]; k < ids.offsets[t + 1]; k++) {
      low = ids.ids[k] < low ? ids.ids[k] : low;
      high = ids.ids[k] > high ? ids.ids[k] : high;
    }
    const bool ids_ok = low >= -1 && high < a.vocab;
    if (!ids_ok || !is_column(a.target[t], a.vocab) || !(temperature_of(a, t) > 0.0f)) return t;
  }
  return -1;
}

void token_stats_at_fwd(const LogitsArgs& a, const TokenStatsOut& o, const IdsArgs& ids) {
  by_dtype(a, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    has_transform(a) ? forward<T, true>(a, o, ids) : forward<T, false>(a, o, ids);
  });
}

void token_stats_at_bwd(const LogitsArgs& a, const TokenStatsGrad& g, const IdsArgs& ids,
                        const IdsScratch& scratch) {
  by_dtype(a, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    has_transform(a) ? backward<T, true>(a, g, ids, scratch)
                     : backward<T, false>(a, g, ids, scratch);
  });
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
