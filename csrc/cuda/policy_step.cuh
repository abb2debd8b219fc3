// policy_step from logits for token-level objectives: statistics, objective and gradient in one
// kernel.
//
// A first pass over a row computes its statistics (rows.cuh). One evaluation of the objective gives
// the two coefficients, d_logp and d_entropy. A second pass writes the gradient. If both
// coefficients are zero (masked, zero advantage, active clip), the row is filled with zeros
// instead. A masked row is not read at all. Exponentials per element: 2. With a softcap, the tanh
// takes one more and a reciprocal in each pass; the cluster kernel computes it once.
//
// There are two kernels. Both read 2 bytes and write 2 bytes of memory per element at bf16:
//   policy_step_cluster_kernel (sm_90 and later): a cluster of blocks keeps a row in its shared
//     memory. Bulk copies load it there; when the gradient of a row has been written, they load the
//     row after the next one. With a softcap, the first pass stores the tangents in float32 for the
//     second one, and the next row is loaded between the two. The rows must begin at multiples of
//     16 bytes and fit in the shared memory of a cluster (policy_step.cu). Code for sm_80 has no
//     such kernel, only a trap.
//   policy_step_kernel (portable): the second pass reads the row from the L2 cache. The loads of
//     the first pass are marked evict-last; the loads of the second pass and all stores are marked
//     evict-first. The grid has no more rows than L2 can hold.
//
// policy_metrics computes the metric sums in another launch, from the results per token. Legend: R
// rows, V vocabulary.
#pragma once

#include <type_traits>

#include "cuda/gradient.cuh"
#include "cuda/rows.cuh"
#include "cuda/token_objective.cuh"

namespace tokfuse {
namespace cuda {

constexpr int kPolicyThreads = 512;

// Results of a row that one thread computes for all others.
struct RowVerdict {
  Slopes slopes;
  bool nothing;  // the gradient is zero
};

// One thread computes the statistics and the objective of a row from its record. It stores both if
// `writes` is true.
__device__ __forceinline__ RowVerdict finish_row(const LogitsArgs& a, const TokenStatsOut& out,
                                                 const TokenObjectiveArgs& o, int64_t token,
                                                 const Record& r, float u_y, const Scale& scale,
                                                 bool writes) {
  const int64_t y = a.target[token];
  const bool has_target = y >= 0 && y < a.vocab;
  const RowStats stats = finish(with_target<false>(r, u_y, scale.c, 0.0f), has_target, scale.nats);
  const TokenResult result = token_objective(o, token, stats.logp, stats.entropy);
  if (writes) {
    write_stats(out, token, stats);
    write_result(o, token, result);
  }
  const float ga = result.d_logp, gh = result.d_entropy;
  RowVerdict verdict;
  verdict.nothing = (ga == 0.0f && gh == 0.0f) || stats.inv_sum == 0.0f;
  verdict.slopes =
      slopes_of(scale, stats.row_max, stats.inv_sum, stats.logp, stats.entropy, ga, gh, y, a.vocab);
  return verdict;
}

// One thread writes the outputs of a masked row.
__device__ __forceinline__ void write_masked(const TokenStatsOut& out, const TokenObjectiveArgs& o,
                                             int64_t token) {
  write_stats(out, token, RowStats());
  write_result(o, token, TokenResult());
}

// Returns the transformed logit of the target, or -inf without a target.
template <class T, bool kTransform>
__device__ __forceinline__ float target_logit(const LogitsArgs& a, const Transform& f,
                                              const T* logits, int64_t token) {
  const int64_t y = a.target[token];
  return y >= 0 && y < a.vocab ? element_of<T, kTransform>(f, logits, nullptr, y).x : -inf_float();
}

template <class T, class G, bool kTransform>
__global__ void __launch_bounds__(kPolicyThreads, kTransform ? 1 : 2)
    policy_step_kernel(const __grid_constant__ LogitsArgs a,
                       const __grid_constant__ TokenStatsOut out,
                       const __grid_constant__ TokenObjectiveArgs o, GradRows grads, bool aligned,
                       bool together) {
  using Records = Array<Record, kMaxWarps>;
  TOKFUSE_SHARED(records, Array<Records, 2>);
  TOKFUSE_SHARED(verdict, RowVerdict);
  const uint64_t stay = l2_policy<Keep::kLast>(), leave = l2_policy<Keep::kFirst>();
  const Transform f = transform_of(a);
  const int vocab = static_cast<int>(a.vocab);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t token = token_of(a, row);
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    G* grad = static_cast<G*>(grads.grad_logits) + row * grads.grad_stride;
    const Part all = part_of_row(logits, a.vocab, 0, 1, together);
    if (!counts(a, token)) {
      if (threadIdx.x == 0) write_masked(out, o, token);
      write_zeros<T>(grad, vocab, all, together, leave);
      continue;
    }
    const Scale scale = scale_at(a, temperature_of(a, token), kTransform);
    // Read now, because the gradient may overwrite the logits.
    const float u_y = threadIdx.x == 0 ? target_logit<T, kTransform>(a, f, logits, token) : 0.0f;
    Lane<false> lane;
    NoSum none;
    if (aligned) {
      const GlobalRow<T, true> source = {logits, nullptr, vocab, stay};
      fold_row<T, true, kTransform>(f, source, a.target[token], lane, none, scale.c, 0.0f);
    } else {
      const GlobalRow<T, false> source = {logits, nullptr, vocab, stay};
      fold_row<T, false, kTransform>(f, source, a.target[token], lane, none, scale.c, 0.0f);
    }
    const Record r = merge_block(lane, records[turn], scale.c, 0.0f);
    turn ^= 1;
    if (threadIdx.x == 0) verdict = finish_row(a, out, o, token, r, u_y, scale, true);
    __syncthreads();
    const RowVerdict v = verdict;
    if (v.nothing) {
      write_zeros<T>(grad, vocab, all, together, leave);
    } else {
      write_gradient<T, G, kTransform, 1>(f, logits, static_cast<const T*>(nullptr), vocab, grad,
                                          all, v.slopes, together, leave);
    }
  }
}

// ------------------------------------------------------------------------------- rows in a cluster

// Largest number of tiles in a block's slice of a row. Each tile has its own mbarrier.
constexpr int kMaxTiles = 8;
constexpr int kMaxStages = 2;
constexpr int kMaxCluster = 8;

// Layout of rows in the shared memory of a cluster. Block `rank` holds the whole vectors from rank
// * slice to (rank + 1) * slice of each row.
struct ClusterLayout {
  int slice;   // vectors of a row in one block
  int stages;  // rows that are in shared memory at once; with a softcap 1, and its tangents
};

// A slice in shared memory. Vector numbers are relative to the slice.
template <class T>
struct SharedSlice {
  const unsigned char* base;

  __device__ __forceinline__ Vec16 whole(int v) const { return shared_load16(base + v * 16); }
  __device__ __forceinline__ Vec16 whole_bias(int) const { return Vec16(); }
};

// The float32 tangents of a slice in shared memory, after the rows. Each thread reads only those
// that it wrote. Quarter q of a vector is in plane q, so that neighbouring threads use different
// banks.
template <class T>
struct SharedTangents {
  static constexpr int kPlanes = kItems<T> / 4;
  unsigned char* base;
  int slice;

  __device__ __forceinline__ unsigned char* at(int v, int plane) const {
    return base + (static_cast<int64_t>(plane) * slice + v) * 16;
  }
  __device__ __forceinline__ void store(int v, const Pair* t) const {
#pragma unroll
    for (int i = 0; i < kPlanes; i++) {
      shared_store16(at(v, i), {{bits_of(t[2 * i].x), bits_of(t[2 * i].y), bits_of(t[2 * i + 1].x),
                                 bits_of(t[2 * i + 1].y)}});
    }
  }
  __device__ __forceinline__ void load(int v, Pair* t) const {
#pragma unroll
    for (int i = 0; i < kPlanes; i++) {
      const Vec16 w = shared_load16(at(v, i));
      t[2 * i] = {float_of(w.word[0]), float_of(w.word[1])};
      t[2 * i + 1] = {float_of(w.word[2]), float_of(w.word[3])};
    }
  }
};

#if TOKFUSE_ARCH >= 90

// Starts the bulk copies of a block's slices. Rows are fetched in the order in which the cluster
// processes them; masked rows are skipped. Only thread 0 calls `next`.
template <class T>
struct Fetcher {
  using Barriers = Array<Mbarrier, kMaxStages * kMaxTiles>;
  const LogitsArgs& a;
  unsigned char* buffer;
  Barriers& full;
  ClusterLayout layout;
  int first, count;  // this block's whole vectors of a row
  int64_t row, step;
  int fetched = 0;
  uint64_t policy;

  __device__ __forceinline__ int tile_vectors() const {
    return kTileOf<false> * static_cast<int>(blockDim.x);
  }

  __device__ __forceinline__ SharedTangents<T> tangents() const {
    return {buffer + static_cast<int64_t>(layout.stages) * layout.slice * 16, layout.slice};
  }

  __device__ __forceinline__ void next() {
    while (row < a.rows && !counts(a, token_of(a, row))) row += step;
    if (row >= a.rows) return;
    const int stage = fetched % layout.stages;
    unsigned char* to = buffer + static_cast<int64_t>(stage) * layout.slice * 16;
    const unsigned char* from =
        reinterpret_cast<const unsigned char*>(static_cast<const T*>(a.logits) + row * a.stride) +
        static_cast<int64_t>(first) * 16;
    for (int v = 0, tile = 0; v < count; v += tile_vectors(), tile++) {
      const unsigned bytes = static_cast<unsigned>(min(tile_vectors(), count - v)) * 16;
      Mbarrier* barrier = &full[stage * kMaxTiles + tile];
      mbarrier_expect(barrier, bytes);
      bulk_load(to + static_cast<int64_t>(v) * 16, from + static_cast<int64_t>(v) * 16, bytes,
                barrier, policy);
    }
    fetched++;
    row += step;
  }
};

// Adds kCount vectors v, v + threads, ... of softcapped logits to the statistics of the lane, and
// stores their tangents.
template <class T, int kCount>
__device__ __forceinline__ void fold_tangents(const Transform& f, Lane<false>& lane, const Vec16* z,
                                              const SharedTangents<T>& tangents, int v, float c) {
  constexpr int kPairs = kItems<T> / 2;
  const int threads = static_cast<int>(blockDim.x);
  Pair u[kCount * kPairs];
  float m = kLowestMax;
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    Pair t[kPairs];
    Pair* const to = u + j * kPairs;
    to_pairs(static_cast<const T*>(nullptr), z[j], to);
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      t[i] = tanh_pair(to[i], tanh_factor(f));
      to[i] = capped_pair(f, to[i], t[i]);
      m = fmaxf(m, fmaxf(to[i].x, to[i].y));
    }
    tangents.store(v + j * threads, t);
  }
  fold<kCount * kPairs>(lane, u, m, c, 0.0f);
}

// Adds the slice of the `use`-th fetched row to the statistics, tile by tile as they arrive. The
// last block also adds the elements after the whole vectors. The target `y` is excluded.
template <class T, bool kTransform>
__device__ __forceinline__ void fold_slice(const Transform& f, const Fetcher<T>& rows, int use,
                                           const GlobalRow<T, false>& row, bool has_last, int64_t y,
                                           Lane<false>& lane, float c) {
  constexpr int kTile = kTileOf<false>;
  const int stage = use % rows.layout.stages;
  const unsigned parity = static_cast<unsigned>(use / rows.layout.stages) & 1u;
  const SharedSlice<T> slice = {rows.buffer + static_cast<int64_t>(stage) * rows.layout.slice * 16};
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const TargetPlace target = target_place<T, kTile>(y, row.vocab, rows.first, rows.count);
  const Vec16 bias[kTile] = {};
  Vec16 z[kTile];
  const SharedTangents<T> tangents = rows.tangents();
  // Adds the first kCount vectors of z, which are v, v + threads, ...
  const auto add = [&](auto count, int v) {
    constexpr int kCount = decltype(count)::value;
    if constexpr (kTransform) {
      fold_tangents<T, kCount>(f, lane, z, tangents, v, c);
    } else {
      fold_vectors<T, kCount, false>(f, lane, z, bias, false, c, 0.0f);
    }
  };
  const auto load_tile = [&](int begin) {
    mbarrier_wait(&rows.full[stage * kMaxTiles + begin / (kTile * threads)], parity);
#pragma unroll
    for (int j = 0; j < kTile; j++) z[j] = slice.whole(begin + thread + j * threads);
  };
  int begin = 0;
  for (; begin + kTile * threads <= rows.count; begin += kTile * threads) {
    if (begin == target.tile) continue;
    load_tile(begin);
    add(std::integral_constant<int, kTile>(), begin + thread);
  }
  if (target.tile >= 0 && target.tile + kTile * threads <= rows.count) {
    load_tile(target.tile);
    exclude<T, kTile>(target, target.tile + thread, z);
    add(std::integral_constant<int, kTile>(), target.tile + thread);
  }
  if (begin < rows.count) {
    mbarrier_wait(&rows.full[stage * kMaxTiles + begin / (kTile * threads)], parity);
    for (int v = begin + thread; v < rows.count; v += threads) {
      z[0] = slice.whole(v);
      exclude<T, 1>(target, v, z);
      add(std::integral_constant<int, 1>(), v);
    }
  }
  if (has_last && thread == threads - 1) {
    const int64_t behind = row.vocab / kItems<T> * kItems<T>;
    z[0] = row.last();
    if (y >= behind && y < row.vocab) exclude<T, 1>({0, 0, static_cast<int>(y - behind)}, 0, z);
    fold_vectors<T, 1, kTransform>(f, lane, z, bias, false, c, 0.0f);
  }
}

// Returns the merged record of the cluster, in the first warp of each block. `mine` is the record
// of this block. Callers alternate between two buffers `shared`, as for merge_block.
__device__ __forceinline__ Record merge_cluster(const Record& mine, Record& shared, float c) {
  const unsigned blocks = cluster_blocks();
  if (blocks == 1) return mine;
  if (threadIdx.x == 0) shared = mine;
  cluster_sync();
  if (threadIdx.x >= kWarp) return mine;
  Record r = no_record();
  if (threadIdx.x < blocks) {
    r.m = cluster_load(&shared.m, threadIdx.x);
    r.s = cluster_load(&shared.s, threadIdx.x);
    r.sd = cluster_load(&shared.sd, threadIdx.x);
    r.ss = cluster_load(&shared.ss, threadIdx.x);
  }
  return merge_warp<false>(r, c, 0.0f);
}

// The threads of the block write the gradient of whole vectors [0, count) from their tangents. An
// excluded logit needs no test: its tangent is -1, so its slope is 0.
template <class T, class G>
__device__ __forceinline__ void write_from_tangents(const Transform& f,
                                                    const SharedTangents<T>& tangents, G* grad,
                                                    int count, const Slopes& s, uint64_t policy) {
  constexpr int kPairs = kItems<T> / 2;
  for (int v = static_cast<int>(threadIdx.x); v < count; v += static_cast<int>(blockDim.x)) {
    Pair t[kPairs];
    tangents.load(v, t);
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const Pair d = fma2(t[i], {f.cap, f.cap}, {-s.m, -s.m});
      const Pair e = exp2_pair<kPolynomialShare>(times(d, s.c), i);
      t[i] = mul2(mul2(e, fma2({s.a1, s.a1}, d, {s.a0, s.a0})), tanh_slope(f, t[i]));
    }
    store_vector<kPairs>(grad + static_cast<int64_t>(v) * kItems<T>, t, policy);
  }
}

template <class T, class G, bool kTransform>
__device__ __forceinline__ void write_slice(const Transform& f, const Fetcher<T>& rows, int use,
                                            const GlobalRow<T, false>& row, G* grad,
                                            const Part& part, const Slopes& s, uint64_t policy) {
  const TargetTerm<T, G, kTransform> target(f, row.logits, nullptr, row.vocab, part, s);
  G* own = grad + static_cast<int64_t>(part.begin) * kItems<T>;
  if constexpr (kTransform) {
    write_from_tangents<T>(f, rows.tangents(), own, rows.count, s, policy);
  } else {
    const int stage = use % rows.layout.stages;
    const SharedSlice<T> slice = {rows.buffer +
                                  static_cast<int64_t>(stage) * rows.layout.slice * 16};
    write_whole<T, G, false, true, kPolynomialShare, 1>(f, slice, false, own, 0, rows.count, s,
                                                        policy);
  }
  write_ends<T, G, kTransform>(f, row.logits, row.bias, row.vocab, grad, part, s);
  target.write(grad, s);
}

#endif  // TOKFUSE_ARCH >= 90

template <class T, class G, bool kTransform>
__global__ void __launch_bounds__(kPolicyThreads, 1)
    policy_step_cluster_kernel(const __grid_constant__ LogitsArgs a,
                               const __grid_constant__ TokenStatsOut out,
                               const __grid_constant__ TokenObjectiveArgs o, GradRows grads,
                               ClusterLayout layout) {
#if TOKFUSE_ARCH >= 90
  using Records = Array<Record, kMaxWarps>;
  using Barriers = Array<Mbarrier, kMaxStages * kMaxTiles>;
  using BlockRecords = Array<Record, 2>;
  TOKFUSE_SHARED(records, Array<Records, 2>);
  TOKFUSE_SHARED(block_records, BlockRecords);
  TOKFUSE_SHARED(full, Barriers);
  TOKFUSE_SHARED(verdict, RowVerdict);
  TOKFUSE_DYNAMIC_SHARED(buffer);
  const uint64_t leave = l2_policy<Keep::kFirst>();
  const int blocks = static_cast<int>(cluster_blocks()), rank = static_cast<int>(cluster_rank());
  const Transform f = transform_of(a);
  const int vocab = static_cast<int>(a.vocab), whole = vocab / kItems<T>;
  const int first = min(rank * layout.slice, whole), last = min(first + layout.slice, whole);
  const Part part = {first, last, 0, false, rank == blocks - 1 && vocab % kItems<T> != 0};
  const int64_t step = gridDim.x / static_cast<unsigned>(blocks);
  const int64_t begin = blockIdx.x / static_cast<unsigned>(blocks);
  Fetcher<T> rows = {a, buffer, full, layout, first, last - first, begin, step, 0, leave};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxStages * kMaxTiles; i++) mbarrier_init(&full[i], 1);
    mbarrier_init_fence();
    for (int i = 0; i < layout.stages; i++) rows.next();
  }
  __syncthreads();
  int use = 0;  // number of fetched rows that are finished
  for (int64_t row = begin; row < a.rows; row += step) {
    const int64_t token = token_of(a, row);
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    G* grad = static_cast<G*>(grads.grad_logits) + row * grads.grad_stride;
    if (!counts(a, token)) {
      if (threadIdx.x == 0 && rank == 0) write_masked(out, o, token);
      write_zeros<T>(grad, vocab, part, true, leave);
      continue;
    }
    const GlobalRow<T, false> source = {logits, nullptr, vocab, leave};
    const Scale scale = scale_at(a, temperature_of(a, token), kTransform);
    // Read now, because another block of the cluster may overwrite it with the gradient.
    const float u_y = threadIdx.x == 0 ? target_logit<T, kTransform>(a, f, logits, token) : 0.0f;
    Lane<false> lane;
    fold_slice<T, kTransform>(f, rows, use, source, part.has_last, a.target[token], lane, scale.c);
    Record r = merge_block(lane, records[use & 1], scale.c, 0.0f);
    r = merge_cluster(r, block_records[use & 1], scale.c);
    if (threadIdx.x == 0) {
      verdict = finish_row(a, out, o, token, r, u_y, scale, rank == 0);
      // All threads have read the slice: merge_block has a barrier.
      if (kTransform) rows.next();
    }
    __syncthreads();
    const RowVerdict v = verdict;
    if (v.nothing) {
      write_zeros<T>(grad, vocab, part, true, leave);
    } else {
      write_slice<T, G, kTransform>(f, rows, use, source, grad, part, v.slopes, leave);
    }
    __syncthreads();  // all threads have read the slice and the verdict
    if (!kTransform && threadIdx.x == 0) rows.next();
    use++;
  }
  cluster_sync();  // a block must not exit while another one may read its record
#else
  trap();
#endif
}

}  // namespace cuda
}  // namespace tokfuse
