#include "bindings/objective_params.h"

#include <stdexcept>

namespace py = pybind11;

namespace tokfuse {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("tokfuse._native: ") + what);
}

}  // namespace

ObjectiveParams objective_params(const py::tuple& t) {
  require(t.size() == 9, "objective record must have 9 fields");
  ObjectiveParams o;
  const int shape = t[0].cast<int>(), level = t[1].cast<int>(), kl = t[2].cast<int>();
  require(shape >= 0 && shape < kShapeCount, "unknown objective shape code");
  require(level >= 0 && level < kLevelCount, "unknown ratio level code");
  require(kl >= 0 && kl < kKlCount, "unknown KL code");
  o.shape = static_cast<Shape>(shape);
  o.level = static_cast<Level>(level);
  o.kl = static_cast<Kl>(kl);
  o.seq_mean = t[3].cast<int>();
  const py::tuple p = t[4].cast<py::tuple>();
  require(p.size() == kShapeSlots, "wrong number of objective parameters");
  for (size_t i = 0; i < kShapeSlots; i++) o.p[i] = p[i].cast<float>();
  o.kl_coef = t[5].cast<float>();
  o.kl_clamp = t[6].cast<float>();
  o.entropy_coef = t[7].cast<float>();
  o.log_ratio_clamp = t[8].cast<float>();
  return o;
}

ObjectiveArgs objective_args(const py::tuple& t) {
  require(t.size() >= kObjectiveFields, "a policy record has at least 21 fields");
  auto floats = [&](size_t i) { return reinterpret_cast<float*>(t[i].cast<uintptr_t>()); };
  ObjectiveArgs o = {};
  o.params = objective_params(t[0].cast<py::tuple>());
  o.tokens = t[1].cast<int64_t>();
  o.seqs = t[2].cast<int64_t>();
  o.logp = floats(3);
  o.old_logp = floats(4);
  o.advantage = floats(5);
  o.advantage_per_seq = t[6].cast<int>();
  o.mask = reinterpret_cast<uint8_t*>(t[7].cast<uintptr_t>());
  o.cu_seqlens = reinterpret_cast<int32_t*>(t[8].cast<uintptr_t>());
  o.weight = floats(9);
  o.signal = floats(10);
  o.ref_logp = floats(11);
  o.kl_weight = floats(12);
  o.entropy = floats(13);
  o.entropy_weight = floats(14);
  o.inv_normalizer = t[15].cast<double>();
  o.normalize_by_seqs = t[16].cast<int>();
  o.token_loss = floats(17);
  o.d_logp = floats(18);
  o.d_entropy = floats(19);
  o.metrics = reinterpret_cast<double*>(t[20].cast<uintptr_t>());
  return o;
}

void check_objective_inputs(const ObjectiveArgs& o) {
  require(o.tokens >= 0 && o.seqs >= 0, "tokens and seqs must be >= 0");
  require(o.cu_seqlens != nullptr || o.seqs == 0, "cu_seqlens is null");
  const bool needs_seqs = o.params.level != Level::kToken || o.params.seq_mean != 0 ||
                          o.advantage_per_seq != 0 ||
                          (o.inv_normalizer < 0 && o.normalize_by_seqs != 0);
  require(!needs_seqs || o.cu_seqlens != nullptr || o.tokens == 0, "cu_seqlens is null");
  check_token_inputs(o.params, o.signal, o.ref_logp, o.tokens);
}

void check_token_inputs(const ObjectiveParams& o, const float* signal, const float* ref_logp,
                        int64_t tokens) {
  require(!needs_signal(o.shape) || signal != nullptr || tokens == 0, "signal is null");
  require(o.kl == Kl::kNone || ref_logp != nullptr || tokens == 0, "ref_logp is null");
}

py::dict shape_table() {
  py::dict table;
#define TOKFUSE_ROW(name, code, signal, zero, parameters)                                          \
  table[#name] = py::make_tuple(code, py::tuple(py::str(parameters).attr("split")()), signal != 0, \
                                zero != 0);
  TOKFUSE_EACH_SHAPE(TOKFUSE_ROW)
#undef TOKFUSE_ROW
  return table;
}

}  // namespace tokfuse
