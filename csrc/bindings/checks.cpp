#include "bindings/checks.h"

#include <stdexcept>
#include <string>

namespace tokfuse {
namespace {

// Options of logits that two argument structs share.
template <class A>
void check_options(const A& a) {
  require(a.softcap >= 0.0f && a.logit_scale > 0.0f, "softcap must be >= 0, logit_scale > 0");
  require(a.temperatures != nullptr || a.temperature > 0.0f, "temperature must be > 0");
}

void check_scan(const ScanArgs& a) {
  require(a.tokens >= 0, "tokens must be >= 0");
  require(a.seqs >= 0, "seqs must be >= 0");
  require(a.gamma >= 0 && a.gamma <= 1, "gamma must be in [0, 1]");
  require(a.lam >= 0 && a.lam <= 1, "lam must be in [0, 1]");
}

int64_t rows_per_span(Normalize normalize) { return normalize == Normalize::kGroup ? 1 : 4096; }

}  // namespace

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("tokfuse._native: ") + what);
}

void check_args(const LogitsArgs& a) {
  require(a.rows >= 0 && a.tokens >= 0 && a.vocab >= 1, "rows must be >= 0 and vocab >= 1");
  require(a.index != nullptr || a.rows == 0 || a.tokens == a.rows,
          "tokens must equal rows without an index");
  require(a.stride >= 0 && a.bias_stride >= 0, "row strides must be >= 0");
  check_options(a);
  require(a.rows == 0 || a.logits != nullptr, "logits is null");
  require(a.rows == 0 || a.target != nullptr, "target is null");
}

void check_args(const DivergenceArgs& a) {
  require(a.tokens >= 0 && a.vocab >= 1, "tokens must be >= 0 and vocab >= 1");
  require(a.stride_p >= 0 && a.stride_q >= 0, "row strides must be >= 0");
  check_options(a);
  require(a.mix_weight > 0.0f && a.mix_weight < 1.0f, "mix_weight must be in (0, 1)");
  require(a.bound > 0.0f, "bound must be > 0");
  require(
      a.given == nullptr || (a.kind != Divergence::kForwardKl && a.kind != Divergence::kReverseKl),
      "given is not for the KLs");
  require(a.tokens == 0 || (a.logits_p != nullptr && a.logits_q != nullptr), "logits are null");
}

void check_args(const KeptArgs& a) {
  check_args(a.logits);
  require(a.logits.index == nullptr && a.logits.bias_logits == nullptr,
          "kept rows take neither an index nor bias_logits");
  require(a.logits.tile == 0, "kept rows come in one piece");
  require(a.num_ids >= 0 && (a.ids != nullptr || a.num_ids == 0), "ids is null");
  require(a.offsets != nullptr, "offsets is null");
}

void check_args(const ObjectiveArgs& o) {
  require(o.tokens >= 0 && o.seqs >= 0, "tokens and seqs must be >= 0");
  require(o.cu_seqlens != nullptr || o.seqs == 0, "cu_seqlens is null");
  const bool needs_seqs = o.params.level != Level::kToken || o.params.seq_mean != 0 ||
                          o.advantage_per_seq != 0 ||
                          (o.inv_normalizer < 0 && o.normalize_by_seqs != 0);
  require(!needs_seqs || o.cu_seqlens != nullptr || o.tokens == 0, "cu_seqlens is null");
  require(o.params.entropy_coef == 0.0f || o.entropy != nullptr || o.tokens == 0,
          "entropy is null");
  check_inputs(o.params, o.signal, o.ref_logp, o.anchor_logp, o.tokens);
}

void check_inputs(const ObjectiveParams& o, const float* signal, const float* ref_logp,
                  const float* anchor_logp, int64_t tokens) {
  require(!needs_signal(o.shape) || signal != nullptr || tokens == 0, "signal is null");
  require(o.kl == Kl::kNone || ref_logp != nullptr || tokens == 0, "ref_logp is null");
  require(o.anchor == Kl::kNone || anchor_logp != nullptr || tokens == 0, "anchor_logp is null");
}

void check_args(const GroupAdvantageArgs& a) {
  require(a.seqs >= 0, "seqs must be >= 0");
  const bool grouped = a.baseline != Baseline::kGreedy && a.baseline != Baseline::kNone;
  require(grouped == (a.group_ids != nullptr) || a.seqs == 0,
          "group ids come with a group baseline");
  require(grouped || a.scale == Scale::kNone || a.scale == Scale::kBatchStd,
          "a baseline without groups takes no group scale");
  require(a.baseline != Baseline::kLengthWeighted || a.lengths != nullptr || a.seqs == 0,
          "lengths is null");
  require(a.baseline != Baseline::kGreedy || a.greedy_reward != nullptr || a.seqs == 0,
          "greedy_reward is null");
  require(a.ddof == 0 || a.ddof == 1, "ddof must be 0 or 1");
  require(a.eps >= 0, "eps must be >= 0");
}

void check_args(const GaeArgs& a) {
  check_scan(a);
  require(a.length_adaptive_alpha >= 0, "length_adaptive_alpha must be >= 0");
}

void check_args(const VtraceArgs& a) {
  check_scan(a);
  require(a.rho_bar > 0 && a.c_bar > 0, "rho_bar and c_bar must be > 0");
}

void check_args(const WhitenArgs& a) {
  require(a.tokens >= 0, "tokens must be >= 0");
  require((a.mean == nullptr) == (a.var == nullptr), "mean and var come together");
  require(a.eps >= 0, "eps must be >= 0");
}

void check_args(const OpeArgs& a) {
  require(a.rows >= 0, "rows must be >= 0");
  require(a.q_pi != nullptr || a.q_a == nullptr || a.rows == 0, "q_a needs q_pi");
}

void check_args(const MomentsArgs& a) {
  require(a.rows >= 0, "rows must be >= 0");
  require(a.segments >= 0, "segments must be >= 0");
  require(a.cu_seqlens == nullptr || a.segment_ids == nullptr,
          "segment_ids or cu_seqlens, not both");
}

void check_args(const OffPolicyArgs& a) {
  require(a.tokens >= 0, "tokens must be >= 0");
  const bool borders = a.cu_seqlens != nullptr;
  for (int i = 0; i < a.num_rules; i++) {
    require(a.rules[i].over == Over::kToken || borders, "a sequence rule needs cu_seqlens");
    require(!a.rules[i].negative_only || a.advantage != nullptr || a.tokens == 0,
            "advantage is null");
  }
  require(borders || a.level == WeightLevel::kToken || a.level == WeightLevel::kExternal,
          "a sequence level needs cu_seqlens");
  require(a.normalize != Normalize::kGroup || a.group_ids != nullptr ||
              offpolicy_spans(a.tokens, a.seqs, borders, a.normalize) == 0,
          "group_ids is null");
}

int64_t offpolicy_spans(int64_t tokens, int64_t seqs, bool borders, Normalize normalize) {
  const int64_t span = rows_per_span(normalize);
  return borders ? seqs : (tokens + span - 1) / span;
}

void set_spans(OffPolicyArgs* a) {
  const bool borders = a->cu_seqlens != nullptr;
  a->seqs = offpolicy_spans(a->tokens, a->seqs, borders, a->normalize);
  a->block_tokens = borders ? 0 : rows_per_span(a->normalize);
}

}  // namespace tokfuse
