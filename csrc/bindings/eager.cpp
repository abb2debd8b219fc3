// Whole calls of the eager mode: one native function reads and checks the arguments, runs the
// kernel and makes the outputs. At one token the same steps in Python take twenty times the
// kernel's time.
//
// A function returns None if its arguments do not have the plain form that it reads: another
// device, a dtype that must be converted, strides, a subclass, a wrong shape or value. The caller
// then takes the general path, which converts the argument or raises an error that explains it.
// Nothing has been written if None is returned.
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "bindings/bind.h"
#include "bindings/tensors.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

struct NotPlain {};  // thrown and caught in this file: the call needs the general path

void plain(bool ok) {
  if (!ok) throw NotPlain();
}

// The address of a contiguous vector of n elements without gradient, or null for None.
template <class T>
const T* vector(PyObject* object, int64_t n, DlType type) {
  if (object == Py_None) return nullptr;
  DlTensor t;
  plain(read_tensor(object, &t) && t.ndim == 1 && t.shape[0] == n && t.type == type);
  plain(n <= 1 || t.strides[0] == 1);
  plain(!requires_grad(object));
  return static_cast<const T*>(t.data);
}

const float* floats(PyObject* object, int64_t n) { return vector<float>(object, n, kDlFloat32); }

double number(PyObject* object) {
  const double x = PyFloat_AsDouble(object);
  if (x == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

int thread_count(PyObject* object) {
  const long threads = PyLong_AsLong(object);
  if (threads == -1 && PyErr_Occurred()) throw py::error_already_set();
  plain(threads >= 1 && threads <= 4096);
  return static_cast<int>(threads);
}

std::optional<DType> logits_dtype(DlType type) {
  if (type == kDlFloat32) return DType::kFloat32;
  if (type == kDlBfloat16) return DType::kBFloat16;
  if (type == kDlFloat16) return DType::kFloat16;
  return std::nullopt;
}

bool positive(float x) { return x > 0.0f && x < __builtin_inff(); }

enum Option : size_t {
  kTemperature,
  kSoftcap,
  kLogitScale,
  kOptionMask,
  kBiasLogits,
  kBiasScale,
  kOptions
};

// `options` is runtime.core.logit_options.LogitOptions. The logits may require a gradient: the
// caller attaches it.
LogitsArgs read_logits(PyObject* logits, PyObject* target, PyObject* options, int threads) {
  static TupleFields<kOptions> fields("LogitOptions", {"temperature", "softcap", "logit_scale",
                                                       "mask", "bias_logits", "bias_scale"});
  const auto given = fields.of(options);
  PyObject *temperature = given[kTemperature], *softcap = given[kSoftcap];
  DlTensor z;
  plain(read_tensor(logits, &z) && z.ndim == 2 && z.shape[1] >= 1 && z.shape[1] <= INT32_MAX);
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
  if (PyFloat_Check(temperature) || PyLong_Check(temperature)) {
    a.temperature = static_cast<float>(number(temperature));
    plain(positive(a.temperature));
  } else {
    a.temperatures = floats(temperature, a.tokens);
    plain(a.temperatures != nullptr);
  }
  a.softcap = softcap == Py_None ? 0.0f : static_cast<float>(number(softcap));
  a.logit_scale = static_cast<float>(number(given[kLogitScale]));
  plain((softcap == Py_None || positive(a.softcap)) && positive(a.logit_scale));
  a.bias_scale = 1.0f;
  a.threads = threads;
  plain(a.stride >= 0 && a.target != nullptr);
  return a;
}

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

// `inputs` is runtime.policy.inputs.PolicyInputs; `record` is Objective.record.
ObjectiveArgs read_objective(PyObject* inputs, PyObject* record, PyObject* by_seqs,
                             PyObject* inverse, int64_t tokens, int threads, bool has_entropy) {
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
    DlTensor cu;
    plain(read_tensor(borders, &cu) && cu.ndim == 1 && cu.shape[0] >= 1);
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
  plain(o.old_logp != nullptr && o.advantage != nullptr && fits_objective(o, has_entropy));
  const bool looks_at_seqs = o.params.level != Level::kToken || o.params.seq_mean ||
                             o.advantage_per_seq || o.normalize_by_seqs;
  plain(o.cu_seqlens != nullptr || !looks_at_seqs);
  return o;
}

// The outputs of a call, in order. What a kernel writes besides them is in scratch memory.
class Results {
 public:
  Results() { tensors_.reserve(12); }
  void* add(std::initializer_list<int64_t> shape, DlType type) {
    void* data = nullptr;
    tensors_.push_back(empty_tensor(shape, type, &data));
    return data;
  }
  float* floats(int64_t n) { return static_cast<float*>(add({n}, kDlFloat32)); }
  PyObject* release() {
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors_.size()));
    if (tuple == nullptr) return nullptr;
    for (size_t i = 0; i < tensors_.size(); i++) {
      PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), tensors_[i].release().ptr());
    }
    return tuple;
  }

 private:
  std::vector<py::object> tensors_;
};

// Scratch memory, not initialised; a std::vector would clear it.
std::unique_ptr<float[]> scratch(int64_t n) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(n)]);
}

TokenStatsOut stats_outputs(Results& results, int64_t n) {
  TokenStatsOut out = {};
  for (float** field : {&out.logp, &out.entropy, &out.lse, &out.sum_sq, &out.top1}) {
    *field = results.floats(n);
  }
  return out;
}

// Where loss, loss_sum and count are written. All three come from the metric sums.
struct LossCells {
  float *loss, *loss_sum;
  double* count;
};

void write_loss(const ObjectiveArgs& o, const LossCells& cells) {
  const float loss = static_cast<float>(o.sums[kLoss]);
  const double count = o.sums[o.normalize_by_seqs ? kSeqs : kTokens];
  *cells.loss = loss;
  *cells.loss_sum = o.inv_normalizer < 0 ? loss * static_cast<float>(count)
                                         : loss / static_cast<float>(o.inv_normalizer);
  *cells.count = count;
}

LossCells loss_cells(Results& results) {
  LossCells cells;
  cells.loss = static_cast<float*>(results.add({}, kDlFloat32));
  cells.loss_sum = static_cast<float*>(results.add({}, kDlFloat32));
  cells.count = static_cast<double*>(results.add({}, kDlFloat64));
  return cells;
}

// Runs `call`. Returns None after NotPlain and after every other error, because the general path
// then raises it with an explanation. WrongFields is the exception: it is a fault of the build, and
// with None every call would silently take the slow path.
template <class Call>
PyObject* answer(Call call) {
  try {
    return call();
  } catch (const NotPlain&) {
  } catch (const WrongFields& wrong) {
    PyErr_SetString(PyExc_TypeError, wrong.what());
    return nullptr;
  } catch (const py::error_already_set&) {  // holds the Python error and drops it
  } catch (const std::exception&) {
  }
  Py_RETURN_NONE;
}

// (logits, target, options, threads, for_gradient) -> the five statistics, with for_gradient also
// row_max and inv_sum.
PyObject* eager_token_stats(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer([&]() -> PyObject* {
    plain(count == 5);
    const int threads = thread_count(args[3]);
    const LogitsArgs a = read_logits(args[0], args[1], args[2], threads);
    Results results;
    TokenStatsOut out = stats_outputs(results, a.tokens);
    std::unique_ptr<float[]> unseen;
    if (args[4] == Py_True) {
      out.row_max = results.floats(a.tokens);
      out.inv_sum = results.floats(a.tokens);
    } else {
      unseen = scratch(2 * a.tokens);
      out.row_max = unseen.get();
      out.inv_sum = unseen.get() + a.tokens;
    }
    {
      py::gil_scoped_release release;
      if (TOKFUSE_CALL(first_bad_row, a) >= 0) throw NotPlain();
      TOKFUSE_CALL(token_stats_fwd, a, out);
    }
    return results.release();
  });
}

// (logp, entropy, inputs, record, by_seqs, inverse, threads)
//   -> loss, loss_sum, count, token_loss, sums, d_logp, d_entropy
PyObject* eager_policy_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer([&]() -> PyObject* {
    plain(count == 7);
    DlTensor logp, entropy = {};
    plain(read_tensor(args[0], &logp) && logp.ndim == 1 && logp.type == kDlFloat32);
    const int64_t n = logp.shape[0];
    plain(n <= 1 || logp.strides[0] == 1);
    const bool has_entropy = args[1] != Py_None;
    if (has_entropy) {
      plain(read_tensor(args[1], &entropy) && entropy.ndim == 1 && entropy.type == kDlFloat32);
      plain(entropy.shape[0] == n && (n <= 1 || entropy.strides[0] == 1));
    }
    const int threads = thread_count(args[6]);
    ObjectiveArgs o = read_objective(args[2], args[3], args[4], args[5], n, threads, has_entropy);
    o.logp = static_cast<const float*>(logp.data);
    o.entropy = static_cast<const float*>(entropy.data);
    Results results;
    const LossCells cells = loss_cells(results);
    o.token_loss = results.floats(n);
    o.sums = static_cast<double*>(results.add({kMetricCount}, kDlFloat64));
    o.d_logp = results.floats(n);
    o.d_entropy = results.floats(n);
    const std::unique_ptr<float[]> work = scratch(4 * n);
    o.scratch = work.get();
    check_objective(o);
    {
      py::gil_scoped_release release;
      TOKFUSE_CALL(policy_loss, o);
    }
    write_loss(o, cells);
    return results.release();
  });
}

// (logits, target, options, inputs, record, by_seqs, inverse, threads, in_place)
//   -> loss, loss_sum, count, token_loss, sums, the five statistics, grad_logits unless in place
PyObject* eager_policy_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer([&]() -> PyObject* {
    plain(count == 9);
    const int threads = thread_count(args[7]);
    const LogitsArgs a = read_logits(args[0], args[1], args[2], threads);
    const int64_t n = a.tokens;
    ObjectiveArgs o = read_objective(args[3], args[4], args[5], args[6], n, threads, true);
    plain(o.params.level == Level::kToken && o.mask == a.mask);
    Results results;
    const LossCells cells = loss_cells(results);
    o.token_loss = results.floats(n);
    o.sums = static_cast<double*>(results.add({kMetricCount}, kDlFloat64));
    TokenStatsOut out = stats_outputs(results, n);
    o.logp = out.logp;
    o.entropy = out.entropy;
    const std::unique_ptr<float[]> work = scratch(8 * n);
    o.d_logp = work.get() + 4 * n;
    o.d_entropy = work.get() + 5 * n;
    out.row_max = work.get() + 6 * n;
    out.inv_sum = work.get() + 7 * n;
    o.scratch = work.get();
    check_objective(o);
    {
      py::gil_scoped_release release;
      if (TOKFUSE_CALL(first_bad_row, a) >= 0) throw NotPlain();
    }
    GradRows grad = {const_cast<void*>(a.logits), a.stride, a.dtype, nullptr};
    if (args[8] != Py_True) {
      grad.grad_logits = results.add({n, a.vocab}, dl_type(a.dtype));
      grad.grad_stride = a.vocab;
    }
    {
      py::gil_scoped_release release;
      TOKFUSE_CALL(policy_prepare, o);
      TOKFUSE_CALL(policy_rows, a, out, o, grad);
      TOKFUSE_CALL(policy_metrics, o);
    }
    write_loss(o, cells);
    return results.release();
  });
}

// True if the environment of the process sets `name`. os.environ writes to that environment, but a
// look-up in os.environ takes 2 us.
PyObject* environment_sets(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8(name);
  if (text == nullptr) return nullptr;
  return PyBool_FromLong(std::getenv(text) != nullptr);
}

template <class F>
PyCFunction function(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

// METH_FASTCALL, because the dispatch of pybind11 takes as long as the rest of a call at one token.
PyMethodDef methods[] = {
    {"eager_token_stats", function(eager_token_stats), METH_FASTCALL, nullptr},
    {"eager_policy_loss", function(eager_policy_loss), METH_FASTCALL, nullptr},
    {"eager_policy_step", function(eager_policy_step), METH_FASTCALL, nullptr},
    {"environment_sets", function(environment_sets), METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_eager(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace tokfuse
