// Bindings of the CUDA kernels over packed vectors. The caller allocates scratch memory and asks
// here how much of it a kernel needs.
#include "bindings/bind_cuda.h"
#include "cuda/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

void bind_segment_moments(const Place& place, const MomentsArgs& a) {
  check_args(a);
  require((a.segment_ids == nullptr) == (a.order == nullptr), "sorted ids come with their order");
  require(a.parts == moments_parts(a.rows, a.segments), "parts must be moments_parts(...)");
  require(a.parts == 1 || (a.table != nullptr && a.tickets != nullptr),
          "scratch memory is missing");
  run("segment_moments", "segment_moments_kernel", place,
      [&](cudaStream_t stream) { return segment_moments(a, stream); });
}

void bind_gae(const Place& place, const GaeArgs& a) {
  check_args(a);
  run("gae", "gae_kernel", place, [&](cudaStream_t stream) { return gae(a, stream); });
}

void bind_vtrace(const Place& place, const VtraceArgs& a) {
  check_args(a);
  run("vtrace", "vtrace_kernel", place, [&](cudaStream_t stream) { return vtrace(a, stream); });
}

void bind_whiten(const Place& place, const WhitenArgs& a) {
  check_args(a);
  require(a.mean != nullptr || a.scratch != nullptr || a.tokens == 0, "scratch memory is missing");
  run("whiten", "whiten_kernel", place, [&](cudaStream_t stream) { return whiten(a, stream); });
}

void bind_ope(const Place& place, const OpeArgs& a) {
  check_args(a);
  run("ope", "ope_kernel", place, [&](cudaStream_t stream) { return ope(a, stream); });
}

void bind_group_advantage(const Place& place, const GroupAdvantageArgs& a) {
  check_args(a);
  require((a.group_ids == nullptr) == (a.order == nullptr), "sorted ids come with their order");
  run("group_advantage", "group_advantage_kernel", place,
      [&](cudaStream_t stream) { return group_advantage(a, stream); });
}

int64_t bind_offpolicy_spans(int64_t tokens, int64_t seqs, bool borders, int normalize) {
  return offpolicy_spans(tokens, seqs, borders, static_cast<Normalize>(normalize));
}

void bind_offpolicy_weights(const Place& place, OffPolicyArgs a) {
  check_args(a);
  require((a.group_ids == nullptr) == (a.order == nullptr), "sorted ids come with their order");
  set_spans(&a);
  require(a.ess != nullptr, "ess is null");
  run("offpolicy_weights", "offpolicy_weights_kernel", place,
      [&](cudaStream_t stream) { return offpolicy_weights(a, stream); });
}

void bind_sketch(const Place& place, const SketchArgs& a) {
  require(a.tokens >= 0 && a.seqs >= 0 && a.rank >= 0, "a size must be >= 0");
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
  m.def("offpolicy_spans", &bind_offpolicy_spans, py::kw_only(), py::arg("tokens"), py::arg("seqs"),
        py::arg("borders"), py::arg("normalize"));
  m.def("offpolicy_weights", &bind_offpolicy_weights);
  m.def("sketch", &bind_sketch);
  m.attr("WHITEN_BLOCK") = kWhitenBlock;
  m.attr("OPE_BLOCK") = kOpeBlock;
}

}  // namespace cuda
}  // namespace tokfuse
