#include "bindings/objective_params.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("tokfuse._native: ") + what);
}

enum RecordField : size_t {
  kShape,
  kLevel,
  kKl,
  kSeqMean,
  kParameters,
  kKlCoef,
  kKlClamp,
  kEntropyCoef,
  kLogRatioClamp,
  kRecordFields
};

template <class T>
void read(PyObject* value, T* out) {
  if (!read_value(value, out)) throw py::error_already_set();
}

}  // namespace

ObjectiveParams objective_params(PyObject* record) {
  static TupleFields<kRecordFields> fields(
      "ObjectiveRecord", {"shape", "level", "kl", "seq_mean", "p", "kl_coef", "kl_clamp",
                          "entropy_coef", "log_ratio_clamp"});
  const auto given = fields.of(record);
  ObjectiveParams o;
  int shape = 0, level = 0, kl = 0;
  read(given[kShape], &shape);
  read(given[kLevel], &level);
  read(given[kKl], &kl);
  require(shape >= 0 && shape < kShapeCount, "unknown objective shape code");
  require(level >= 0 && level < kLevelCount, "unknown ratio level code");
  require(kl >= 0 && kl < kKlCount, "unknown KL code");
  o.shape = static_cast<Shape>(shape);
  o.level = static_cast<Level>(level);
  o.kl = static_cast<Kl>(kl);
  read(given[kSeqMean], &o.seq_mean);
  PyObject* p = given[kParameters];
  require(PyTuple_Check(p) && PyTuple_GET_SIZE(p) == kShapeSlots,
          "wrong number of objective parameters");
  for (Py_ssize_t i = 0; i < kShapeSlots; i++) read(PyTuple_GET_ITEM(p, i), &o.p[i]);
  read(given[kKlCoef], &o.kl_coef);
  read(given[kKlClamp], &o.kl_clamp);
  read(given[kEntropyCoef], &o.entropy_coef);
  read(given[kLogRatioClamp], &o.log_ratio_clamp);
  return o;
}

const char* fault_of(const ObjectiveArgs& o) {
  if (o.tokens < 0 || o.seqs < 0) return "tokens and seqs must be >= 0";
  if (o.cu_seqlens == nullptr && o.seqs != 0) return "cu_seqlens is null";
  const bool needs_seqs = o.params.level != Level::kToken || o.params.seq_mean != 0 ||
                          o.advantage_per_seq != 0 ||
                          (o.inv_normalizer < 0 && o.normalize_by_seqs != 0);
  if (needs_seqs && o.cu_seqlens == nullptr && o.tokens != 0) return "cu_seqlens is null";
  return fault_of(o.params, o.signal, o.ref_logp, o.tokens);
}

const char* fault_of(const ObjectiveParams& o, const float* signal, const float* ref_logp,
                     int64_t tokens) {
  if (needs_signal(o.shape) && signal == nullptr && tokens != 0) return "signal is null";
  if (o.kl != Kl::kNone && ref_logp == nullptr && tokens != 0) return "ref_logp is null";
  return nullptr;
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
