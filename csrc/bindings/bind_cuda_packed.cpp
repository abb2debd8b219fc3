// CUDA kernels over packed vectors. Scratch memory comes from the caller, who asks how much.
#include "bindings/bind_cuda.h"
#include "cuda/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

void require_size(int64_t size) { require(size >= 0, "a size must be >= 0"); }

void bind_segment_moments(const Place& place, const MomentsArgs& a) {
  require_size(a.rows);
  require_size(a.segments);
  require((a.segment_ids == nullptr) == (a.order == nullptr), "sorted ids come with their order");
  require(a.cu_seqlens == nullptr || a.segment_ids == nullptr,
          "segment_ids or cu_seqlens, not both");
  require(a.parts == moments_parts(a.rows, a.segments), "parts must be moments_parts(...)");
  require(a.parts == 1 || (a.table != nullptr && a.tickets != nullptr),
          "scratch memory is missing");
  run("segment_moments", "segment_moments_kernel", place,
      [&](cudaStream_t stream) { return segment_moments(a, stream); });
}

void check_scan(const ScanArgs& a) {
  require_size(a.tokens);
  require_size(a.seqs);
}

void bind_gae(const Place& place, const GaeArgs& a) {
  check_scan(a);
  run("gae", "gae_kernel", place, [&](cudaStream_t stream) { return gae(a, stream); });
}

void bind_vtrace(const Place& place, const VtraceArgs& a) {
  check_scan(a);
  run("vtrace", "vtrace_kernel", place, [&](cudaStream_t stream) { return vtrace(a, stream); });
}

void bind_whiten(const Place& place, const WhitenArgs& a) {
  require_size(a.tokens);
  require((a.mean == nullptr) == (a.var == nullptr), "mean and var come together");
  require(a.mean != nullptr || a.scratch != nullptr || a.tokens == 0, "scratch memory is missing");
  run("whiten", "whiten_kernel", place, [&](cudaStream_t stream) { return whiten(a, stream); });
}

void bind_ope(const Place& place, const OpeArgs& a) {
  require_size(a.rows);
  require(a.q_pi != nullptr || a.q_a == nullptr || a.rows == 0, "q_a needs q_pi");
  run("ope", "ope_kernel", place, [&](cudaStream_t stream) { return ope(a, stream); });
}

void bind_group_advantage(const Place& place, const GroupAdvantageArgs& a) {
  require_size(a.seqs);
  const bool grouped = a.baseline != Baseline::kGreedy && a.baseline != Baseline::kNone;
  require(a.seqs == 0 || (grouped == (a.group_ids != nullptr) && grouped == (a.order != nullptr)),
          "sorted group ids and their order come with a group baseline");
  require(a.ddof == 0 || a.ddof == 1, "ddof must be 0 or 1");
  run("group_advantage", "group_advantage_kernel", place,
      [&](cudaStream_t stream) { return group_advantage(a, stream); });
}

// Spans of a call without borders: every row where units are grouped, else blocks.
int64_t rows_per_span(Normalize normalize) { return normalize == Normalize::kGroup ? 1 : 4096; }

int64_t spans_of(int64_t tokens, int64_t seqs, bool borders, Normalize normalize) {
  const int64_t span = rows_per_span(normalize);
  return borders ? seqs : (tokens + span - 1) / span;
}

int64_t offpolicy_spans(int64_t tokens, int64_t seqs, bool borders, int normalize) {
  return spans_of(tokens, seqs, borders, static_cast<Normalize>(normalize));
}

void bind_offpolicy_weights(const Place& place, OffPolicyArgs a) {
  require_size(a.tokens);
  const bool borders = a.cu_seqlens != nullptr;
  a.seqs = spans_of(a.tokens, a.seqs, borders, a.normalize);
  a.block_tokens = borders ? 0 : rows_per_span(a.normalize);
  for (int i = 0; i < a.num_rules; i++) {
    require(a.rules[i].over == Over::kToken || borders, "a sequence rule needs cu_seqlens");
    require(!a.rules[i].negative_only || a.advantage != nullptr || a.tokens == 0,
            "advantage is null");
  }
  require(borders || a.level == WeightLevel::kToken || a.level == WeightLevel::kExternal,
          "a sequence level needs cu_seqlens");
  require(a.normalize != Normalize::kGroup || a.seqs == 0 ||
              (a.group_ids != nullptr && a.order != nullptr),
          "groups need sorted ids and their order");
  require(a.ess != nullptr, "ess is null");
  run("offpolicy_weights", "offpolicy_weights_kernel", place,
      [&](cudaStream_t stream) { return offpolicy_weights(a, stream); });
}

void bind_sketch(const Place& place, const SketchArgs& a) {
  require_size(a.tokens);
  require_size(a.seqs);
  require_size(a.rank);
  run("influence.sketch", "sketch_kernel", place,
      [&](cudaStream_t stream) { return sketch(a, stream); });
}

}  // namespace

void bind_packed(py::module_& m) {
  m.def("moments_parts", &moments_parts, py::kw_only(), py::arg("rows"), py::arg("segments"));
  m.def("segment_moments", &bind_segment_moments);
  m.def("gae", &bind_gae);
  m.def("vtrace", &bind_vtrace);
  m.def("whiten", &bind_whiten);
  m.def("ope", &bind_ope);
  m.def("group_advantage", &bind_group_advantage);
  m.def("offpolicy_spans", &offpolicy_spans, py::kw_only(), py::arg("tokens"), py::arg("seqs"),
        py::arg("borders"), py::arg("normalize"));
  m.def("offpolicy_weights", &bind_offpolicy_weights);
  m.def("sketch", &bind_sketch);
  m.attr("WHITEN_BLOCK") = kWhitenBlock;
  m.attr("OPE_BLOCK") = kOpeBlock;
}

}  // namespace cuda
}  // namespace tokfuse
