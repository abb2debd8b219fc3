// Kernels over packed vectors: advantages, scans, moments, off-policy weights. Scratch memory is
// allocated here.
#include <memory>
#include <vector>

#include "bindings/bind.h"
#include "cpu/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

int64_t checked_size(int64_t size, const char* what) {
  require(size >= 0, what);
  return size;
}

template <class E>
E code_of(int code, E last, const char* what) {
  require(code >= 0 && code <= static_cast<int>(last), what);
  return static_cast<E>(code);
}

// True for (seqs + 1) borders that run from 0 to `tokens` and never decrease.
bool cu_seqlens_ok(Address address, int64_t seqs, int64_t tokens) {
  require(seqs >= 0, "seqs must be >= 0");
  require_pointer(address, seqs + 1, "cu_seqlens");
  const int32_t* c = as<int32_t>(address);
  bool ok = c[0] == 0 && c[seqs] == tokens;
  for (int64_t i = 0; i < seqs; i++) ok &= c[i] <= c[i + 1];
  return ok;
}

// Values, not only the address: the kernels index by them.
const int32_t* cu_seqlens_of(Address address, int64_t seqs, int64_t tokens) {
  require(cu_seqlens_ok(address, seqs, tokens),
          "cu_seqlens must run from 0 to the number of tokens and never decrease");
  return as<int32_t>(address);
}

void group_advantage(Address reward, Address ids, Address lengths, Address greedy,
                     Address advantage, int64_t seqs, int baseline, int scale, int ddof, double eps,
                     bool singleton_reward, int threads) {
  GroupAdvantageArgs a = {};
  a.seqs = checked_size(seqs, "seqs must be >= 0");
  for (Address p : {reward, advantage}) require_pointer(p, seqs, "reward or advantage");
  a.baseline = code_of(baseline, Baseline::kNone, "unknown baseline code");
  a.scale = code_of(scale, Scale::kMean, "unknown scale code");
  const bool grouped = a.baseline != Baseline::kGreedy && a.baseline != Baseline::kNone;
  require(grouped == (ids != 0) || seqs == 0, "group ids come with a group baseline");
  require(grouped || a.scale == Scale::kNone || a.scale == Scale::kBatchStd,
          "a baseline without groups takes no group scale");
  if (a.baseline == Baseline::kLengthWeighted) require_pointer(lengths, seqs, "lengths");
  if (a.baseline == Baseline::kGreedy) require_pointer(greedy, seqs, "greedy reward");
  require(ddof == 0 || ddof == 1, "ddof must be 0 or 1");
  require(eps >= 0, "eps must be >= 0");
  require_threads(threads);
  a.reward = as<float>(reward);
  a.ids = as<int64_t>(ids);
  a.lengths = as<int64_t>(lengths);
  a.greedy = as<float>(greedy);
  a.advantage = as<float>(advantage);
  a.ddof = ddof;
  a.eps = eps;
  a.singleton_reward = singleton_reward;
  a.threads = threads;
  py::gil_scoped_release release;
  // Not value-initialised: clearing it would cost more than grouping a few thousand rows.
  std::unique_ptr<int64_t[]> ints(grouped ? new int64_t[grouping_scratch(seqs)] : nullptr);
  std::unique_ptr<double[]> doubles(grouped ? new double[seqs] : nullptr);
  a.scratch_int = ints.get();
  a.scratch_double = doubles.get();
  TOKFUSE_CALL(group_advantage, a);
}

ScanArgs scan_args(Address reward, Address value, Address cu_seqlens, Address mask,
                   Address finished, int64_t tokens, int64_t seqs, double gamma, double lam,
                   int threads) {
  ScanArgs a = {};
  a.tokens = checked_size(tokens, "tokens must be >= 0");
  a.seqs = checked_size(seqs, "seqs must be >= 0");
  for (Address p : {reward, value}) require_pointer(p, tokens, "reward or value");
  a.cu_seqlens = cu_seqlens_of(cu_seqlens, seqs, tokens);
  require(gamma >= 0 && gamma <= 1, "gamma must be in [0, 1]");
  require(lam >= 0 && lam <= 1, "lam must be in [0, 1]");
  require_threads(threads);
  a.reward = as<float>(reward);
  a.value = as<float>(value);
  a.mask = as<uint8_t>(mask);
  a.finished = as<uint8_t>(finished);
  a.gamma = gamma;
  a.lam = lam;
  a.threads = threads;
  return a;
}

void gae(Address reward, Address value, Address cu_seqlens, Address mask, Address finished,
         Address lam_per_seq, Address advantage, Address returns, int64_t tokens, int64_t seqs,
         double gamma, double lam, double alpha, int threads) {
  ScanArgs a =
      scan_args(reward, value, cu_seqlens, mask, finished, tokens, seqs, gamma, lam, threads);
  for (Address p : {advantage, returns}) require_pointer(p, tokens, "an output");
  require(alpha >= 0, "alpha must be >= 0");
  a.lam_per_seq = as<float>(lam_per_seq);
  a.alpha = alpha;
  a.advantage = as<float>(advantage);
  a.returns = as<float>(returns);
  py::gil_scoped_release release;
  TOKFUSE_CALL(gae, a);
}

void vtrace(Address log_ratio, Address reward, Address value, Address cu_seqlens, Address mask,
            Address finished, Address target, Address advantage, Address rho, int64_t tokens,
            int64_t seqs, double gamma, double lam, double rho_bar, double c_bar, int threads) {
  ScanArgs a =
      scan_args(reward, value, cu_seqlens, mask, finished, tokens, seqs, gamma, lam, threads);
  for (Address p : {log_ratio, target, advantage, rho}) require_pointer(p, tokens, "an argument");
  require(rho_bar > 0 && c_bar > 0, "rho_bar and c_bar must be > 0");
  a.log_ratio = as<float>(log_ratio);
  a.rho_bar = static_cast<float>(rho_bar);
  a.c_bar = static_cast<float>(c_bar);
  a.target = as<float>(target);
  a.advantage = as<float>(advantage);
  a.rho = as<float>(rho);
  py::gil_scoped_release release;
  TOKFUSE_CALL(vtrace, a);
}

void whiten(Address x, Address mask, Address mean, Address var, Address out, int64_t tokens,
            bool shift_mean, double eps, int threads) {
  WhitenArgs a = {};
  a.tokens = checked_size(tokens, "tokens must be >= 0");
  for (Address p : {x, out}) require_pointer(p, tokens, "x or out");
  require((mean == 0) == (var == 0), "mean and var come together");
  require(eps >= 0, "eps must be >= 0");
  require_threads(threads);
  a.x = as<float>(x);
  a.mask = as<uint8_t>(mask);
  a.mean = as<double>(mean);
  a.var = as<double>(var);
  a.out = as<float>(out);
  a.shift_mean = shift_mean;
  a.eps = eps;
  a.threads = threads;
  py::gil_scoped_release release;
  std::vector<double> scratch(static_cast<size_t>((tokens / kWhitenBlock + 1) * 3));
  a.scratch = scratch.data();
  TOKFUSE_CALL(whiten, a);
}

void ope(Address weight, Address reward, Address q_pi, Address q_a, Address mask, Address out,
         int64_t rows, int threads) {
  OpeArgs a = {};
  a.rows = checked_size(rows, "rows must be >= 0");
  for (Address p : {weight, reward}) require_pointer(p, rows, "weight or reward");
  require_pointer(out, 10, "out");
  require(q_pi != 0 || q_a == 0, "q_a needs q_pi");
  require_threads(threads);
  a.weight = as<float>(weight);
  a.reward = as<float>(reward);
  a.q_pi = as<float>(q_pi);
  a.q_a = as<float>(q_a);
  a.mask = as<uint8_t>(mask);
  a.out = as<double>(out);
  a.threads = threads;
  py::gil_scoped_release release;
  std::vector<double> scratch(static_cast<size_t>((rows / kOpeBlock + 1) * 5));
  a.scratch = scratch.data();
  TOKFUSE_CALL(ope, a);
}

// First valid row with an id outside [0, segments), or -1.
int64_t segment_moments(Address values, bool is_double, Address ids, Address cu_seqlens,
                        Address mask, Address count, Address sum, Address sum_sq, Address min,
                        Address max, int64_t rows, int64_t segments, int threads) {
  MomentsArgs a = {};
  a.rows = checked_size(rows, "rows must be >= 0");
  a.segments = checked_size(segments, "segments must be >= 0");
  require_pointer(values, rows, "values");
  for (Address p : {count, sum, sum_sq, min, max}) require_pointer(p, segments, "an output");
  if (cu_seqlens != 0) {
    require(ids == 0, "ids or cu_seqlens, not both");
    a.cu_seqlens = cu_seqlens_of(cu_seqlens, segments, rows);
  } else {
    require_pointer(ids, rows, "ids");
  }
  require_threads(threads);
  a.values = as<void>(values);
  a.is_double = is_double;
  a.ids = as<int64_t>(ids);
  a.mask = as<uint8_t>(mask);
  a.count = as<int64_t>(count);
  a.sum = as<void>(sum);
  a.sum_sq = as<void>(sum_sq);
  a.min = as<void>(min);
  a.max = as<void>(max);
  a.threads = threads;
  // Tables small beside the values may be had eight times over; otherwise one.
  a.chunks = segments * 64 <= rows ? 8 : 1;
  py::gil_scoped_release release;
  std::vector<double> scratch(cu_seqlens != 0 ? 0 : static_cast<size_t>(a.chunks * segments * 5));
  a.scratch = scratch.data();
  return TOKFUSE_CALL(segment_moments, a);
}

KeepRule rule_of(const py::tuple& t) {
  require(t.size() == 5, "a keep rule has 5 fields");
  return {code_of(t[0].cast<int>(), Statistic::kK3, "unknown statistic code"),
          code_of(t[1].cast<int>(), Over::kMax, "unknown reduction code"), t[2].cast<double>(),
          t[3].cast<double>(), t[4].cast<bool>()};
}

// Returns the effective sample size.
double offpolicy_weights(Address logp, Address behavior, Address cu_seqlens, Address mask,
                         Address group_ids, Address advantage, Address weight, Address kept,
                         int64_t tokens, int64_t seqs, int level, int mode, double low, double high,
                         double param, int normalize, const py::list& rules, int threads) {
  OffPolicyArgs a = {};
  a.tokens = checked_size(tokens, "tokens must be >= 0");
  for (Address p : {behavior, weight, kept}) require_pointer(p, tokens, "an argument");
  a.level = code_of(level, WeightLevel::kExternal, "unknown level code");
  a.mode = code_of(mode, WeightMode::kKeep, "unknown mode code");
  a.normalize = code_of(normalize, Normalize::kGroup, "unknown normalize code");
  if (cu_seqlens != 0) {
    a.cu_seqlens = cu_seqlens_of(cu_seqlens, checked_size(seqs, "seqs must be >= 0"), tokens);
    a.seqs = seqs;
  } else {
    a.block_tokens = a.normalize == Normalize::kGroup ? 1 : 4096;
    a.seqs = (tokens + a.block_tokens - 1) / a.block_tokens;
  }
  require(rules.size() <= kMaxRules, "at most 8 keep rules");
  for (const py::handle& item : rules) {
    const KeepRule rule = rule_of(item.cast<py::tuple>());
    require(rule.over == Over::kToken || cu_seqlens != 0, "a sequence rule needs cu_seqlens");
    if (rule.negative_only) require_pointer(advantage, tokens, "advantage");
    a.rules[a.num_rules++] = rule;
  }
  require(cu_seqlens != 0 || a.level == WeightLevel::kToken || a.level == WeightLevel::kExternal,
          "a sequence level needs cu_seqlens");
  if (a.normalize == Normalize::kGroup) require_pointer(group_ids, a.seqs, "group_ids");
  require_threads(threads);
  a.logp = as<float>(logp);
  a.behavior = as<float>(behavior);
  a.mask = as<uint8_t>(mask);
  a.group_ids = as<int64_t>(group_ids);
  a.advantage = as<float>(advantage);
  a.low = low;
  a.high = high;
  a.param = param;
  a.weight = as<float>(weight);
  a.kept = as<uint8_t>(kept);
  a.threads = threads;
  py::gil_scoped_release release;
  std::vector<double> partial(static_cast<size_t>(3 * a.seqs));
  std::vector<int64_t> ints(
      a.normalize == Normalize::kGroup ? static_cast<size_t>(grouping_scratch(a.seqs)) : 0);
  a.partial = partial.data();
  a.scratch_int = ints.data();
  return TOKFUSE_CALL(offpolicy_weights, a);
}

}  // namespace

void bind_packed(py::module_& m) {
  m.def("cu_seqlens_ok", &cu_seqlens_ok);
  m.def("group_advantage", &group_advantage);
  m.def("gae", &gae);
  m.def("vtrace", &vtrace);
  m.def("whiten", &whiten);
  m.def("ope", &ope);
  m.def("segment_moments", &segment_moments);
  m.def("offpolicy_weights", &offpolicy_weights);
}

}  // namespace tokfuse
