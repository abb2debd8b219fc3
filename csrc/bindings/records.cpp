#include "bindings/records.h"

#include <vector>

namespace py = pybind11;

namespace tokfuse {

bool read_value(PyObject* value, int64_t* out) {
  *out = PyLong_AsLongLong(value);
  return *out != -1 || PyErr_Occurred() == nullptr;
}

bool read_value(PyObject* value, double* out) {
  *out = PyFloat_AsDouble(value);
  return *out != -1.0 || PyErr_Occurred() == nullptr;
}

bool read_address(PyObject* value, uintptr_t* out) {
  *out = 0;
  if (value == Py_None) return true;
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* address = PyObject_CallMethodNoArgs(value, data_ptr);
  if (address == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return false;
    PyErr_Format(PyExc_TypeError, "neither a tensor nor None but a %s", Py_TYPE(value)->tp_name);
    return false;
  }
  *out = PyLong_AsSize_t(address);
  Py_DECREF(address);
  return *out != static_cast<uintptr_t>(-1) || PyErr_Occurred() == nullptr;
}

void find_fields(const char* what, PyObject* tuple, const char* const* names, size_t count,
                 Py_ssize_t* position) {
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(tuple)));
  if (!PyTuple_Check(tuple) || !py::hasattr(type, "_fields")) {
    throw WrongFields(std::string(what) + " expected; got " + Py_TYPE(tuple)->tp_name);
  }
  const py::tuple fields = type.attr("_fields");
  std::vector<bool> found(count, false);
  for (size_t at = 0; at < fields.size(); at++) {
    const std::string field = fields[at].cast<std::string>();
    size_t i = 0;
    while (i < count && field != names[i]) i++;
    if (i == count) throw WrongFields(std::string(what) + " has a field that C++ lacks: " + field);
    position[i] = static_cast<Py_ssize_t>(at);
    found[i] = true;
  }
  for (size_t i = 0; i < count; i++) {
    if (!found[i]) throw WrongFields(std::string(what) + " lacks the field " + names[i]);
  }
}

const char* fault_of(const LogitsArgs& a) {
  if (a.rows < 0 || a.tokens < 0 || a.vocab < 1) return "rows must be >= 0 and vocab >= 1";
  if (a.index == nullptr && a.rows != 0 && a.tokens != a.rows) {
    return "tokens must equal rows without an index";
  }
  if (a.stride < 0 || a.bias_stride < 0) return "row strides must be >= 0";
  if (!(a.softcap >= 0.0f && a.logit_scale > 0.0f)) return "softcap must be >= 0, logit_scale > 0";
  if (a.temperatures == nullptr && !(a.temperature > 0.0f)) return "temperature must be > 0";
  if (a.rows > 0 && a.logits == nullptr) return "logits is null";
  if (a.rows > 0 && a.target == nullptr) return "target is null";
  return nullptr;
}

const char* fault_of(const DivergenceArgs& a) {
  if (a.tokens < 0 || a.vocab < 1) return "tokens must be >= 0 and vocab >= 1";
  if (a.stride_p < 0 || a.stride_q < 0) return "row strides must be >= 0";
  if (!(a.softcap >= 0.0f && a.logit_scale > 0.0f)) return "softcap must be >= 0, logit_scale > 0";
  if (a.temperatures == nullptr && !(a.temperature > 0.0f)) return "temperature must be > 0";
  if (!(a.mix_weight > 0.0f && a.mix_weight < 1.0f)) return "mix_weight must be in (0, 1)";
  if (!(a.bound > 0.0f)) return "bound must be > 0";
  if (a.tokens > 0 && (a.logits_p == nullptr || a.logits_q == nullptr)) return "logits are null";
  return nullptr;
}

namespace {

template <auto kMember, class S>
bool read_member(PyObject* value, S* out) {
  return read_value(value, &(out->*kMember));
}

#define REQUIRED(name) {#name, false, &read_member<&S::name, S>}
#define OPTIONAL(name) {#name, true, &read_member<&S::name, S>}
#define CUSTOM(name, read) {#name, false, &read}

// The fields of a struct, in the one place besides the struct itself that lists them.
template <class S>
const std::vector<Field<S>>& fields_of();
#define FIELDS_OF(type, ...)                                   \
  template <>                                                  \
  const std::vector<Field<type>>& fields_of() {                \
    using S = type;                                            \
    static const std::vector<Field<S>> fields = {__VA_ARGS__}; \
    return fields;                                             \
  }

FIELDS_OF(LogitsArgs, REQUIRED(logits), REQUIRED(stride), REQUIRED(dtype), REQUIRED(rows),
          REQUIRED(vocab), REQUIRED(index), REQUIRED(tokens), REQUIRED(target), REQUIRED(mask),
          REQUIRED(temperatures), REQUIRED(temperature), REQUIRED(softcap), REQUIRED(logit_scale),
          REQUIRED(bias_logits), REQUIRED(bias_stride), REQUIRED(bias_scale), REQUIRED(threads),
          OPTIONAL(tile), OPTIONAL(tile_stride))

FIELDS_OF(TokenStatsOut, REQUIRED(logp), REQUIRED(entropy), REQUIRED(lse), OPTIONAL(sum_sq),
          OPTIONAL(top1), OPTIONAL(row_max), OPTIONAL(inv_sum), OPTIONAL(second_logp),
          OPTIONAL(sum_p2_logp), OPTIONAL(sum_p2_logp2), OPTIONAL(second_temperature))

FIELDS_OF(TokenStatsGrad, REQUIRED(row_max), REQUIRED(inv_sum), REQUIRED(logp), REQUIRED(entropy),
          REQUIRED(grad_logp), REQUIRED(grad_entropy), REQUIRED(grad_logits), REQUIRED(grad_stride),
          REQUIRED(grad_dtype))

FIELDS_OF(GradRows, REQUIRED(grad_logits), REQUIRED(grad_stride), REQUIRED(grad_dtype),
          OPTIONAL(grad_tokens))

FIELDS_OF(KeptArgs, REQUIRED(logits), REQUIRED(ids), REQUIRED(offsets), REQUIRED(num_ids))

FIELDS_OF(DivergenceArgs, REQUIRED(logits_p), REQUIRED(logits_q), REQUIRED(stride_p),
          REQUIRED(stride_q), REQUIRED(dtype), REQUIRED(tokens), REQUIRED(vocab), REQUIRED(mask),
          REQUIRED(temperatures), REQUIRED(temperature), REQUIRED(softcap), REQUIRED(logit_scale),
          REQUIRED(kind), REQUIRED(mix_weight), REQUIRED(bound), REQUIRED(threads))

FIELDS_OF(DivergenceOut, REQUIRED(divergence), REQUIRED(state))

FIELDS_OF(DivergenceGrad, REQUIRED(state), REQUIRED(grad_divergence), REQUIRED(grad_logits),
          REQUIRED(grad_stride))

FIELDS_OF(DistillArgs, REQUIRED(student), REQUIRED(teacher), REQUIRED(kind), REQUIRED(mix_weight),
          REQUIRED(bound))

FIELDS_OF(DistillOut, REQUIRED(divergence), REQUIRED(entropy), REQUIRED(logp),
          REQUIRED(teacher_logp), REQUIRED(top1_agreement))

FIELDS_OF(DistillGrad, REQUIRED(grad_divergence), REQUIRED(grad_logp), REQUIRED(grad_entropy),
          REQUIRED(grad_logits), REQUIRED(grad_stride))

FIELDS_OF(ObjectiveArgs, REQUIRED(params), REQUIRED(tokens), REQUIRED(seqs), REQUIRED(logp),
          REQUIRED(old_logp), REQUIRED(advantage), REQUIRED(advantage_per_seq), REQUIRED(mask),
          REQUIRED(cu_seqlens), REQUIRED(token_weight), REQUIRED(signal), REQUIRED(ref_logp),
          REQUIRED(kl_weight), REQUIRED(entropy), REQUIRED(entropy_weight),
          REQUIRED(inv_normalizer), REQUIRED(normalize_by_seqs), REQUIRED(token_loss),
          REQUIRED(d_logp), REQUIRED(d_entropy), REQUIRED(sums), OPTIONAL(threads),
          OPTIONAL(scratch), OPTIONAL(partial))

FIELDS_OF(TokenObjectiveArgs, REQUIRED(params), REQUIRED(old_logp), REQUIRED(advantage),
          REQUIRED(agg_weight), REQUIRED(token_weight), REQUIRED(signal), REQUIRED(ref_logp),
          REQUIRED(kl_weight), REQUIRED(entropy_weight), REQUIRED(batch_inv_normalizer),
          REQUIRED(inv_normalizer), REQUIRED(token_loss), REQUIRED(d_logp), REQUIRED(d_entropy),
          REQUIRED(ratio), REQUIRED(flags))

FIELDS_OF(PrepareArgs, REQUIRED(seqs), REQUIRED(cu_seqlens), REQUIRED(mask),
          REQUIRED(seq_advantage), REQUIRED(counts), REQUIRED(agg_weight), REQUIRED(advantage))

FIELDS_OF(MetricsArgs, REQUIRED(tokens), REQUIRED(seqs), REQUIRED(logp), REQUIRED(entropy),
          REQUIRED(old_logp), REQUIRED(ref_logp), REQUIRED(mask), REQUIRED(token_loss),
          REQUIRED(d_logp), REQUIRED(d_entropy), REQUIRED(ratio), REQUIRED(flags), REQUIRED(counts),
          REQUIRED(partial), REQUIRED(sums))

FIELDS_OF(GroupAdvantageArgs, REQUIRED(seqs), REQUIRED(reward), REQUIRED(group_ids),
          REQUIRED(lengths), REQUIRED(greedy_reward), REQUIRED(advantage), REQUIRED(baseline),
          REQUIRED(scale), REQUIRED(ddof), REQUIRED(eps), REQUIRED(singleton_reward),
          OPTIONAL(threads), OPTIONAL(order))

#define SCAN_FIELDS                                                                            \
  REQUIRED(tokens), REQUIRED(seqs), REQUIRED(reward), REQUIRED(value), REQUIRED(cu_seqlens),   \
      REQUIRED(mask), REQUIRED(finished), REQUIRED(gamma), REQUIRED(lam), REQUIRED(advantage), \
      OPTIONAL(threads)

FIELDS_OF(GaeArgs, SCAN_FIELDS, REQUIRED(lam_per_seq), REQUIRED(length_adaptive_alpha),
          REQUIRED(returns))

FIELDS_OF(VtraceArgs, SCAN_FIELDS, REQUIRED(log_ratio), REQUIRED(rho_bar), REQUIRED(c_bar),
          REQUIRED(value_target), REQUIRED(rho))

FIELDS_OF(WhitenArgs, REQUIRED(tokens), REQUIRED(x), REQUIRED(mask), REQUIRED(mean), REQUIRED(var),
          REQUIRED(out), REQUIRED(shift_mean), REQUIRED(eps), OPTIONAL(scratch), OPTIONAL(threads))

FIELDS_OF(OpeArgs, REQUIRED(rows), REQUIRED(weight), REQUIRED(reward), REQUIRED(q_pi),
          REQUIRED(q_a), REQUIRED(mask), REQUIRED(out), OPTIONAL(scratch), OPTIONAL(threads))

FIELDS_OF(MomentsArgs, REQUIRED(rows), REQUIRED(segments), REQUIRED(values), REQUIRED(is_double),
          REQUIRED(segment_ids), REQUIRED(cu_seqlens), REQUIRED(mask), REQUIRED(count),
          REQUIRED(sum), REQUIRED(sum_sq), REQUIRED(min), REQUIRED(max), OPTIONAL(threads),
          OPTIONAL(order), OPTIONAL(parts), OPTIONAL(table), OPTIONAL(tickets))

FIELDS_OF(KeepRule, REQUIRED(statistic), REQUIRED(over), REQUIRED(low), REQUIRED(high),
          REQUIRED(negative_only))

bool read_rules(PyObject* value, OffPolicyArgs* out) {
  const py::sequence rules = py::reinterpret_borrow<py::object>(value);
  if (rules.size() > kMaxRules) {
    PyErr_Format(PyExc_ValueError, "at most %d keep rules", kMaxRules);
    return false;
  }
  out->num_rules = 0;
  for (const py::handle rule : rules) {
    if (!read_value(rule.ptr(), &out->rules[out->num_rules++])) return false;
  }
  return true;
}

FIELDS_OF(OffPolicyArgs, REQUIRED(tokens), REQUIRED(seqs), REQUIRED(logp), REQUIRED(behavior_logp),
          REQUIRED(cu_seqlens), REQUIRED(mask), REQUIRED(group_ids), REQUIRED(advantage),
          REQUIRED(level), REQUIRED(mode), REQUIRED(low), REQUIRED(high), REQUIRED(param),
          REQUIRED(normalize), CUSTOM(rules, read_rules), REQUIRED(weight), REQUIRED(kept),
          OPTIONAL(threads), OPTIONAL(order), OPTIONAL(ess), OPTIONAL(partial))

FIELDS_OF(SketchArgs, REQUIRED(tokens), REQUIRED(seqs), REQUIRED(rank), REQUIRED(left),
          REQUIRED(right), REQUIRED(cu_seqlens), REQUIRED(out))

#undef SCAN_FIELDS
#undef REQUIRED
#undef OPTIONAL
#undef CUSTOM
#undef FIELDS_OF

// Turns the Python error of a value into one that names its field, of the same type.
[[noreturn]] void wrong_value(const std::string& record, const char* field) {
  py::error_already_set error;
  const std::string text = record + "." + field + ": " + py::str(error.value()).cast<std::string>();
  PyErr_SetString(error.type().ptr(), text.c_str());
  throw py::error_already_set();
}

// Field names as Python strings, so that a lookup hashes nothing.
template <class S>
const std::vector<PyObject*>& names_of() {
  static const std::vector<PyObject*> names = [] {
    std::vector<PyObject*> made;
    for (const Field<S>& f : fields_of<S>()) made.push_back(PyUnicode_InternFromString(f.name));
    return made;
  }();
  return names;
}

template <class S>
S from_keywords(const std::string& record, const py::kwargs& given) {
  S out = {};
  Py_ssize_t used = 0;
  const std::vector<Field<S>>& fields = fields_of<S>();
  const std::vector<PyObject*>& names = names_of<S>();
  for (size_t i = 0; i < fields.size(); i++) {
    PyObject* value = PyDict_GetItemWithError(given.ptr(), names[i]);
    if (value == nullptr) {
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (fields[i].optional) continue;
      throw py::type_error(record + " lacks the field " + fields[i].name);
    }
    used++;
    if (!fields[i].read(value, &out)) wrong_value(record, fields[i].name);
  }
  if (used == PyDict_GET_SIZE(given.ptr())) return out;
  for (const auto& item : given) {
    const std::string name = item.first.cast<std::string>();
    bool known = false;
    for (const Field<S>& f : fields) known = known || name == f.name;
    if (!known) throw py::type_error(record + " has no field " + name);
  }
  return out;
}

template <class S>
void bind_record(py::module_& m, const char* name) {
  const std::string record = name;
  // Local, because another module of this process may bind the same structs: the tests' CUDA
  // kernels on the CPU. The struct keeps its keywords alive, and so the tensors in them.
  py::class_<S> type(m, name, py::module_local());
  type.def(py::init([record](const py::kwargs& given) { return from_keywords<S>(record, given); }),
           py::keep_alive<1, 2>());
  py::list all, optional;
  for (const Field<S>& f : fields_of<S>()) {
    all.append(f.name);
    if (f.optional) optional.append(f.name);
  }
  type.attr("FIELDS") = py::tuple(all);
  type.attr("OPTIONAL") = py::tuple(optional);
}

}  // namespace

// Every struct that Python fills.
#define TOKFUSE_RECORDS(each)                                                                      \
  each(LogitsArgs) each(TokenStatsOut) each(TokenStatsGrad) each(GradRows) each(KeptArgs)          \
      each(DivergenceArgs) each(DivergenceOut) each(DivergenceGrad) each(DistillArgs)              \
          each(DistillOut) each(DistillGrad) each(ObjectiveArgs) each(TokenObjectiveArgs)          \
              each(PrepareArgs) each(MetricsArgs) each(GroupAdvantageArgs) each(GaeArgs)           \
                  each(VtraceArgs) each(WhitenArgs) each(OpeArgs) each(MomentsArgs) each(KeepRule) \
                      each(OffPolicyArgs) each(SketchArgs)

void bind_records(py::module_& m) {
#define BIND(type) bind_record<type>(m, #type);
  TOKFUSE_RECORDS(BIND)
#undef BIND
}

const std::vector<const char*>& record_names() {
#define NAME(type) #type,
  static const std::vector<const char*> names = {TOKFUSE_RECORDS(NAME)};
#undef NAME
  return names;
}

}  // namespace tokfuse
