#include "bindings/eager_args.h"

#include <optional>

namespace py = pybind11;

namespace tokfuse {
namespace {

double number(PyObject* object) {
  const double x = PyFloat_AsDouble(object);
  if (x == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

std::optional<DType> logits_dtype(DlType type) {
  if (type == kDlFloat32) return DType::kFloat32;
  if (type == kDlBfloat16) return DType::kBFloat16;
  if (type == kDlFloat16) return DType::kFloat16;
  return std::nullopt;
}

// As check_divisor: x and 1 / x are normal numbers.
bool is_divisor(float x) { return x >= 0x1p-126f && x <= 0x1p126f; }

// A bool is not a number, and a tensor may have a gradient.
bool is_number(PyObject* object) { return PyFloat_Check(object) || PyLong_CheckExact(object); }

enum Option : size_t {
  kTemperature,
  kSoftcap,
  kLogitScale,
  kOptionMask,
  kBiasLogits,
  kBiasScale,
  kOptions
};

// True if exactly the optional inputs that the objective uses are given. The general path raises
// the error for an input that is missing or would be ignored.
bool fits_objective(const ObjectiveArgs& o, bool has_entropy) {
  const ObjectiveParams& p = o.params;
  return (o.signal != nullptr) == needs_signal(p.shape) &&
         (o.ref_logp != nullptr || p.kl == Kl::kNone) &&
         (o.kl_weight == nullptr || p.kl != Kl::kNone) &&
         (o.anchor_logp != nullptr) == (p.anchor != Kl::kNone) &&
         (o.anchor_weight == nullptr || p.anchor != Kl::kNone) &&
         (has_entropy || p.entropy_coef == 0.0f) &&
         (o.entropy_weight == nullptr || p.entropy_coef != 0.0f);
}

enum Input : size_t {
  kOldLogp,
  kAdvantage,
  kAdvantageLevel,
  kInputMask,
  kCuSeqlens,
  kTokenWeight,
  kSignal,
  kRefLogp,
  kKlWeight,
  kEntropyWeight,
  kAnchorLogp,
  kAnchorWeight,
  kInputs
};

}  // namespace

int thread_count(PyObject* object) {
  const long threads = PyLong_AsLong(object);
  if (threads == -1 && PyErr_Occurred()) throw py::error_already_set();
  plain(threads >= 1 && threads <= 4096);
  return static_cast<int>(threads);
}

DlTensor EagerArgs::tensor(PyObject* object) const {
  DlTensor t;
  plain(read_tensor(object, &t) && t.device.type == device_.type && t.device.id == device_.id);
  return t;
}

LogitsArgs EagerArgs::logits(PyObject* logits, PyObject* target, PyObject* options,
                             int threads) const {
  static TupleFields<kOptions> fields("LogitOptions", {"temperature", "softcap", "logit_scale",
                                                       "mask", "bias_logits", "bias_scale"});
  const auto given = fields.of(options);
  PyObject *temperature = given[kTemperature], *softcap = given[kSoftcap];
  const DlTensor z = tensor(logits);
  plain(z.ndim == 2 && z.shape[1] >= 1 && z.shape[1] <= INT32_MAX);
  plain(z.shape[1] == 1 || z.strides[1] == 1);
  const std::optional<DType> dtype = logits_dtype(z.type);
  plain(dtype.has_value() && given[kBiasLogits] == Py_None);
  LogitsArgs a = {};
  a.logits = z.data;
  a.stride = z.strides[0];
  a.dtype = *dtype;
  a.rows = a.tokens = z.shape[0];
  a.vocab = z.shape[1];
  a.target = vector<int64_t>(target, a.tokens, kDlInt64);
  a.mask = vector<uint8_t>(given[kOptionMask], a.tokens, kDlBool);
  a.temperature = 1.0f;
  if (is_number(temperature)) {
    a.temperature = static_cast<float>(number(temperature));
    plain(is_divisor(a.temperature));
  } else {
    a.temperatures = floats(temperature, a.tokens);
    plain(a.temperatures != nullptr);
  }
  plain((softcap == Py_None || is_number(softcap)) && is_number(given[kLogitScale]));
  a.softcap = softcap == Py_None ? 0.0f : static_cast<float>(number(softcap));
  a.logit_scale = static_cast<float>(number(given[kLogitScale]));
  plain((softcap == Py_None || is_divisor(a.softcap)) && is_divisor(a.logit_scale));
  a.bias_scale = 1.0f;
  a.threads = threads;
  plain(a.stride >= 0 && a.target != nullptr);
  return a;
}

ObjectiveArgs EagerArgs::objective(PyObject* inputs, PyObject* record, PyObject* by_seqs,
                                   PyObject* inverse, int64_t tokens, int threads,
                                   bool has_entropy) const {
  static TupleFields<kInputs> fields(
      "PolicyInputs",
      {"old_logp", "advantage", "advantage_level", "mask", "cu_seqlens", "token_weight", "signal",
       "ref_logp", "kl_weight", "entropy_weight", "anchor_logp", "anchor_weight"});
  const auto given = fields.of(inputs);
  PyObject *level = given[kAdvantageLevel], *borders = given[kCuSeqlens];
  ObjectiveArgs o = {};
  o.params = objective_params(record);
  o.tokens = tokens;
  plain(PyUnicode_Check(level));
  o.advantage_per_seq = PyUnicode_CompareWithASCIIString(level, "sequence") == 0;
  plain(o.advantage_per_seq || PyUnicode_CompareWithASCIIString(level, "token") == 0);
  if (borders != Py_None) {
    const DlTensor cu = tensor(borders);
    plain(cu.ndim == 1 && cu.shape[0] >= 1);
    o.seqs = cu.shape[0] - 1;
    o.cu_seqlens = vector<int32_t>(borders, o.seqs + 1, kDlInt32);
  }
  o.old_logp = floats(given[kOldLogp], tokens);
  o.advantage = floats(given[kAdvantage], o.advantage_per_seq ? o.seqs : tokens);
  o.mask = vector<uint8_t>(given[kInputMask], tokens, kDlBool);
  o.token_weight = floats(given[kTokenWeight], tokens);
  o.signal = floats(given[kSignal], tokens);
  o.ref_logp = floats(given[kRefLogp], tokens);
  o.kl_weight = floats(given[kKlWeight], tokens);
  o.entropy_weight = floats(given[kEntropyWeight], tokens);
  o.anchor_logp = floats(given[kAnchorLogp], tokens);
  o.anchor_weight = floats(given[kAnchorWeight], tokens);
  o.inv_normalizer = number(inverse);
  o.normalize_by_seqs = by_seqs == Py_True;
  o.threads = threads;
  plain(o.advantage != nullptr && fits_objective(o, has_entropy));
  const bool looks_at_seqs = o.params.level != Level::kToken || o.params.seq_mean ||
                             o.advantage_per_seq || o.normalize_by_seqs;
  plain(o.cu_seqlens != nullptr || !looks_at_seqs);
  return o;
}

ObjectiveArgs EagerArgs::policy_loss(PyObject* const* args) const {
  const DlTensor logp = tensor(args[0]);
  plain(logp.ndim == 1);
  const int64_t n = logp.shape[0];
  ObjectiveArgs o =
      objective(args[2], args[3], args[4], args[5], n, thread_count(args[6]), args[1] != Py_None);
  o.logp = differentiable(args[0], n);
  o.entropy = differentiable(args[1], n);
  return o;
}

}  // namespace tokfuse
