// Argument structs of the kernels over packed vectors, for the CPU and CUDA kernels: advantages,
// scans, moments and off-policy weights.
//
// Shapes in comments: T tokens, S sequences, N rows, K segments. "or null" marks optional pointers.
// docs/names.md defines every field. Only the kernels of that backend read a field marked "CPU" or
// "CUDA". The CUDA kernels expect sorted ids; `order` holds the row of each sorted id.
//
// The bindings have checked sizes and codes. The kernels do not check them again.
#pragma once

#include <cstdint>

namespace tokfuse {

// runtime/core/codes.py (BASELINES, SCALES) lists the same codes in the same order.
enum class Baseline : int32_t {
  kMean = 0,
  kLeaveOneOut,
  kLengthWeighted,
  kMedian,
  kSecondBest,
  kGreedy,
  kNone
};
enum class Scale : int32_t { kNone = 0, kStd, kBatchStd, kMean };

struct GroupAdvantageArgs {
  int64_t seqs;
  const float* reward;         // (S)
  const int64_t* group_ids;    // (S); null for kGreedy and kNone
  const int64_t* order;        // CUDA. (S) with group_ids
  const int64_t* lengths;      // (S), for kLengthWeighted
  const float* greedy_reward;  // (S), for kGreedy
  float* advantage;            // (S)
  Baseline baseline;
  Scale scale;
  int ddof;
  double eps;
  int singleton_reward;    // advantage of a group of one row: its reward (1) or 0 (0)
  int64_t* scratch_int;    // CPU, set by the binding. grouping_scratch(S), with group_ids
  double* scratch_double;  // CPU, set by the binding. (S), with group_ids
  int threads;             // CPU
};

// Fields of both scans, gae and vtrace.
struct ScanArgs {
  int64_t tokens, seqs;
  const float* reward;        // (T)
  const float* value;         // (T)
  const int32_t* cu_seqlens;  // (S + 1)
  const uint8_t* mask;        // (T) or null
  const uint8_t* finished;    // (S); null: all sequences are finished
  double gamma, lam;
  float* advantage;  // (T)
  int threads;       // CPU
};

struct GaeArgs : ScanArgs {
  const float* lam_per_seq;      // (S) or null
  double length_adaptive_alpha;  // not 0: lam = 1 - 1 / max(length_adaptive_alpha n, 1)
  float* returns;                // (T)
};

struct VtraceArgs : ScanArgs {
  const float* log_ratio;  // (T)
  float rho_bar, c_bar;    // +inf: no bound
  float* value_target;     // (T)
  float* rho;              // (T)
};

struct WhitenArgs {
  int64_t tokens;
  const float* x;       // (T)
  const uint8_t* mask;  // (T) or null
  const double* mean;   // (); null: mean and var are computed
  const double* var;
  float* out;  // (T)
  int shift_mean;
  double eps;
  double* scratch;  // 3 per block of kWhitenBlock rows; Python passes it on CUDA only
  int threads;      // CPU
};
constexpr int64_t kWhitenBlock = 4096;

struct OpeArgs {
  int64_t rows;
  const float* weight;  // (N)
  const float* reward;  // (N)
  const float* q_pi;    // (N); null: dm, dr and sndr are undefined
  const float* q_a;     // (N); null: dr and sndr are undefined
  const uint8_t* mask;  // (N) or null
  double* out;          // (5, 2) estimate and standard error of ips, snips, dm, dr, sndr
  double* scratch;  // 5 (CPU) or 10 (CUDA) per block of kOpeBlock; Python passes it on CUDA only
  int threads;      // CPU
};
constexpr int64_t kOpeBlock = 4096;

struct MomentsArgs {
  int64_t rows, segments;
  const void* values;  // (N) float, or double if is_double is 1
  int is_double;
  const int64_t* segment_ids;  // (N); null with cu_seqlens
  const int64_t* order;        // CUDA. (N) with segment_ids
  const int32_t* cu_seqlens;   // (K + 1); null with segment_ids
  const uint8_t* mask;         // (N) or null
  int64_t* count;              // (K)
  void* sum;                   // (K) in the type of `values`; the same for the next three
  void* sum_sq;
  void* min;
  void* max;
  double* scratch;    // CPU, set by the binding. chunks * K * 5, with segment_ids
  int64_t chunks;     // CPU, set by the binding. Depends on N and K only
  int threads;        // CPU
  int parts;          // CUDA. moments_parts(N, K)
  double* table;      // CUDA. (K, parts, 5) if parts > 1
  unsigned* tickets;  // CUDA. (K) if parts > 1
};

// runtime/core/codes.py lists the same codes in the same order.
enum class WeightLevel : int32_t { kToken = 0, kSequence, kGeometric, kExternal };
enum class WeightMode : int32_t {
  kIps = 0,
  kTruncate,
  kMask,
  kSwitch,
  kShrink,
  kSubgaussian,
  kTempered,
  kKeep
};
enum class Statistic : int32_t { kRatio = 0, kK1, kK2, kK3 };
enum class Over : int32_t { kToken = 0, kSum, kMean, kMax };
enum class Normalize : int32_t { kNone = 0, kBatch, kGroup };

struct KeepRule {
  Statistic statistic;
  Over over;
  double low, high;  // -inf, +inf: no bound
  int negative_only;
};
constexpr int kMaxRules = 8;

struct OffPolicyArgs {
  int64_t tokens, seqs;
  const float* logp;           // (T); null: 0
  const float* behavior_logp;  // (T), or the logarithm of a propensity
  const int32_t* cu_seqlens;   // (S + 1); null: S blocks of block_tokens rows
  int64_t block_tokens;        // set by the binding; 1 makes every row its own sequence
  const uint8_t* mask;         // (T) or null
  const int64_t* group_ids;    // (S), for kGroup
  const int64_t* order;        // CUDA. (S) with group_ids
  const float* advantage;      // (T), only if a rule is negative_only
  WeightLevel level;
  WeightMode mode;
  double low, high;  // -inf, +inf: no bound
  double param;      // lam or power of the mode
  Normalize normalize;
  KeepRule rules[kMaxRules];
  int num_rules;
  float* weight;         // (T)
  uint8_t* kept;         // (T)
  float* ess;            // CUDA. () effective sample size
  double* partial;       // CPU (3 S): units, sum and sum of squares of their weights. CUDA (5 S)
  int64_t* scratch_int;  // CPU, set by the binding. grouping_scratch(S), for kGroup
  int threads;           // CPU
};

// CUDA. out[s] = sum of left_t right_t^T over the tokens t of sequence s.
struct SketchArgs {
  int64_t tokens, seqs, rank;
  const float* left;          // (T, rank)
  const float* right;         // (T, rank)
  const int32_t* cu_seqlens;  // (S + 1)
  float* out;                 // (S, rank, rank)
};

}  // namespace tokfuse
