#include "bindings/records.h"

#include <vector>

#include "bindings/checks.h"

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

namespace {

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
  kAnchor,
  kAnchorCoef,
  kAnchorClamp,
  kRecordFields
};

template <class T>
void read(PyObject* value, T* out) {
  if (!read_value(value, out)) throw py::error_already_set();
}

}  // namespace

ObjectiveParams objective_params(PyObject* record) {
  static TupleFields<kRecordFields> fields(
      "ObjectiveRecord",
      {"shape", "level", "kl", "seq_mean", "p", "kl_coef", "kl_clamp", "entropy_coef",
       "log_ratio_clamp", "anchor", "anchor_coef", "anchor_clamp"});
  const auto given = fields.of(record);
  ObjectiveParams o;
  int shape = 0, level = 0, kl = 0, anchor = 0;
  read(given[kShape], &shape);
  read(given[kLevel], &level);
  read(given[kKl], &kl);
  read(given[kAnchor], &anchor);
  require(shape >= 0 && shape < kShapeCount, "unknown objective shape code");
  require(level >= 0 && level < kLevelCount, "unknown ratio level code");
  require(kl >= 0 && kl < kKlCount, "unknown KL code");
  require(anchor >= 0 && anchor < kKlCount, "unknown KL code of the anchor");
  o.shape = static_cast<Shape>(shape);
  o.level = static_cast<Level>(level);
  o.kl = static_cast<Kl>(kl);
  o.anchor = static_cast<Kl>(anchor);
  read(given[kSeqMean], &o.seq_mean);
  PyObject* p = given[kParameters];
  require(PyTuple_Check(p) && PyTuple_GET_SIZE(p) == kShapeSlots,
          "wrong number of objective parameters");
  for (Py_ssize_t i = 0; i < kShapeSlots; i++) read(PyTuple_GET_ITEM(p, i), &o.p[i]);
  read(given[kKlCoef], &o.kl_coef);
  read(given[kKlClamp], &o.kl_clamp);
  read(given[kEntropyCoef], &o.entropy_coef);
  read(given[kLogRatioClamp], &o.log_ratio_clamp);
  read(given[kAnchorCoef], &o.anchor_coef);
  read(given[kAnchorClamp], &o.anchor_clamp);
  return o;
}

namespace {

template <auto kMember, class S>
bool read_member(PyObject* value, S* out) {
  return read_value(value, &(out->*kMember));
}

#define REQUIRED(name) {#name, false, &read_member<&S::name, S>}
#define OPTIONAL(name) {#name, true, &read_member<&S::name, S>}
#define CUSTOM(name, read) {#name, false, &read}

// The fields of a struct. They are listed here and in the struct itself, and nowhere else.
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
          OPTIONAL(sum_p2_logp), OPTIONAL(sum_p2_logp2), OPTIONAL(second_temperature),
          OPTIONAL(class_weight), OPTIONAL(logit_sum))

FIELDS_OF(TokenStatsGrad, REQUIRED(row_max), REQUIRED(inv_sum), REQUIRED(logp), REQUIRED(entropy),
          REQUIRED(grad_logp), REQUIRED(grad_entropy), REQUIRED(grad_logits), REQUIRED(grad_stride),
          REQUIRED(grad_dtype), OPTIONAL(grad_lse), OPTIONAL(grad_logit_sum),
          OPTIONAL(class_weight))

FIELDS_OF(GradRows, REQUIRED(grad_logits), REQUIRED(grad_stride), REQUIRED(grad_dtype),
          OPTIONAL(grad_tokens))

FIELDS_OF(KeptArgs, REQUIRED(logits), REQUIRED(ids), REQUIRED(offsets), REQUIRED(num_ids))

FIELDS_OF(IdsArgs, REQUIRED(ids), REQUIRED(offsets), REQUIRED(num_ids), REQUIRED(logp_at),
          OPTIONAL(grad_logp_at), OPTIONAL(grad_at), OPTIONAL(grad_at_target), OPTIONAL(grad_total))

FIELDS_OF(DivergenceArgs, REQUIRED(logits_p), REQUIRED(logits_q), REQUIRED(stride_p),
          REQUIRED(stride_q), REQUIRED(dtype), REQUIRED(tokens), REQUIRED(vocab), REQUIRED(mask),
          REQUIRED(temperatures), REQUIRED(temperature), REQUIRED(softcap), REQUIRED(logit_scale),
          REQUIRED(kind), REQUIRED(mix_weight), REQUIRED(bound), OPTIONAL(given), REQUIRED(threads))

FIELDS_OF(DivergenceOut, REQUIRED(divergence), REQUIRED(state))

FIELDS_OF(DivergenceGrad, REQUIRED(state), REQUIRED(grad_divergence), REQUIRED(grad_logits),
          REQUIRED(grad_stride))

FIELDS_OF(DistillArgs, REQUIRED(student), REQUIRED(teacher), REQUIRED(kind), REQUIRED(mix_weight),
          REQUIRED(bound), OPTIONAL(class_weight))

FIELDS_OF(DistillOut, REQUIRED(divergence), REQUIRED(entropy), REQUIRED(logp),
          REQUIRED(teacher_logp), REQUIRED(top1_agreement), OPTIONAL(lse), OPTIONAL(logit_sum))

FIELDS_OF(DistillGrad, REQUIRED(grad_divergence), REQUIRED(grad_logp), REQUIRED(grad_entropy),
          OPTIONAL(grad_lse), OPTIONAL(grad_lse_square), OPTIONAL(grad_logit_sum),
          REQUIRED(grad_logits), REQUIRED(grad_stride))

FIELDS_OF(ObjectiveArgs, REQUIRED(params), REQUIRED(tokens), REQUIRED(seqs), REQUIRED(logp),
          REQUIRED(old_logp), REQUIRED(advantage), REQUIRED(advantage_per_seq), REQUIRED(mask),
          REQUIRED(cu_seqlens), REQUIRED(token_weight), REQUIRED(signal), REQUIRED(ref_logp),
          REQUIRED(kl_weight), REQUIRED(entropy), REQUIRED(entropy_weight), REQUIRED(anchor_logp),
          REQUIRED(anchor_weight), REQUIRED(inv_normalizer), REQUIRED(normalize_by_seqs),
          REQUIRED(token_loss), REQUIRED(d_logp), REQUIRED(d_entropy), REQUIRED(sums),
          OPTIONAL(threads), OPTIONAL(scratch), OPTIONAL(partial))

FIELDS_OF(TokenObjectiveArgs, REQUIRED(params), REQUIRED(old_logp), REQUIRED(advantage),
          REQUIRED(agg_weight), REQUIRED(token_weight), REQUIRED(signal), REQUIRED(ref_logp),
          REQUIRED(kl_weight), REQUIRED(entropy_weight), REQUIRED(anchor_logp),
          REQUIRED(anchor_weight), REQUIRED(batch_inv_normalizer), REQUIRED(inv_normalizer),
          REQUIRED(token_loss), REQUIRED(d_logp), REQUIRED(d_entropy), REQUIRED(ratio),
          REQUIRED(flags))

FIELDS_OF(PrepareArgs, REQUIRED(seqs), REQUIRED(cu_seqlens), REQUIRED(mask),
          REQUIRED(seq_advantage), REQUIRED(counts), REQUIRED(agg_weight), REQUIRED(advantage))

FIELDS_OF(MetricsArgs, REQUIRED(tokens), REQUIRED(seqs), REQUIRED(logp), REQUIRED(entropy),
          REQUIRED(old_logp), REQUIRED(ref_logp), REQUIRED(mask), REQUIRED(token_loss),
          REQUIRED(d_logp), REQUIRED(d_entropy), REQUIRED(ratio), REQUIRED(flags), REQUIRED(counts),
          REQUIRED(partial), REQUIRED(sums))

FIELDS_OF(LossArgs, REQUIRED(inv_normalizer), REQUIRED(normalize_by_seqs), REQUIRED(loss),
          REQUIRED(loss_sum))

FIELDS_OF(CountArgs, REQUIRED(tokens), REQUIRED(seqs), REQUIRED(mask), REQUIRED(counts),
          REQUIRED(batch_inv_normalizer))

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

// Puts the record and the field in front of the message of the Python error.
void name_field(const char* record, const char* field) {
  const py::error_already_set error;
  const std::string text =
      std::string(record) + "." + field + ": " + py::str(error.value()).cast<std::string>();
  PyErr_SetString(error.type().ptr(), text.c_str());
}

// An object of a struct's class. The values of its fields follow it: the struct points into them.
template <class S>
struct Record {
  PyObject_HEAD;
  S value;
  PyObject** values() { return reinterpret_cast<PyObject**>(this + 1); }
};

// The class of a struct, set once by bind_records.
template <class S>
struct RecordClass {
  static const char* name;
  static PyTypeObject* type;
  static std::vector<PyObject*> names;  // of the fields, interned
};
template <class S>
const char* RecordClass<S>::name = nullptr;
template <class S>
PyTypeObject* RecordClass<S>::type = nullptr;
template <class S>
std::vector<PyObject*> RecordClass<S>::names;

// The field of that name, or the number of fields. Keywords mostly come in the order of the list,
// so `next` is tried first; interned names differ as pointers.
size_t find_name(const std::vector<PyObject*>& names, PyObject* wanted, size_t next) {
  if (next < names.size() && names[next] == wanted) return next;
  for (size_t i = 0; i < names.size(); i++) {
    if (names[i] == wanted) return i;
  }
  for (size_t i = 0; i < names.size(); i++) {
    if (PyUnicode_Compare(names[i], wanted) == 0) return i;
  }
  return names.size();
}

// Fills the struct, and the values that it keeps, from the keywords of a call. False with a Python
// error set.
template <class S>
bool fill(Record<S>* record, PyObject* const* args, PyObject* keywords) {
  const char* const name = RecordClass<S>::name;
  const std::vector<Field<S>>& fields = fields_of<S>();
  const Py_ssize_t count = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
  PyObject** const values = record->values();
  PyObject* unknown = nullptr;
  size_t next = 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject* const keyword = PyTuple_GET_ITEM(keywords, i);
    const size_t at = find_name(RecordClass<S>::names, keyword, next);
    if (at == fields.size()) {
      unknown = keyword;
      continue;
    }
    Py_INCREF(args[i]);
    Py_XSETREF(values[at], args[i]);
    next = at + 1;
  }
  for (size_t i = 0; i < fields.size(); i++) {
    if (values[i] != nullptr || fields[i].optional) continue;
    PyErr_Format(PyExc_TypeError, "%s lacks the field %s", name, fields[i].name);
    return false;
  }
  if (unknown != nullptr) {
    PyErr_Format(PyExc_TypeError, "%s has no field %U", name, unknown);
    return false;
  }
  for (size_t i = 0; i < fields.size(); i++) {
    if (values[i] == nullptr || fields[i].read(values[i], &record->value)) continue;
    name_field(name, fields[i].name);
    return false;
  }
  return true;
}

// The constructor: `type(field=value, ...)`.
template <class S>
PyObject* make_record(PyObject* type, PyObject* const* args, size_t given, PyObject* keywords) {
  if (PyVectorcall_NARGS(given) != 0) {
    PyErr_Format(PyExc_TypeError, "%s takes its fields by keyword only", RecordClass<S>::name);
    return nullptr;
  }
  PyTypeObject* const of = reinterpret_cast<PyTypeObject*>(type);
  const py::object object = py::reinterpret_steal<py::object>(of->tp_alloc(of, 0));  // all zeros
  if (!object) return nullptr;
  try {
    if (!fill(reinterpret_cast<Record<S>*>(object.ptr()), args, keywords)) return nullptr;
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const py::builtin_exception& error) {
    error.set_error();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  return object.inc_ref().ptr();
}

template <class S>
void delete_record(PyObject* object) {
  PyTypeObject* const type = Py_TYPE(object);
  PyObject** const values = reinterpret_cast<Record<S>*>(object)->values();
  for (size_t i = 0; i < fields_of<S>().size(); i++) Py_CLEAR(values[i]);
  type->tp_free(object);
  Py_DECREF(type);
}

template <class S>
void bind_record(py::module_& m, const char* name) {
  const std::vector<Field<S>>& fields = fields_of<S>();
  PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&delete_record<S>)}, {0, nullptr}};
  // Until Python 3.12 the type points at its name instead of copying it.
  static const std::string full = m.attr("__name__").cast<std::string>() + "." + name;
  PyType_Spec spec = {full.c_str(),
                      static_cast<int>(sizeof(Record<S>) + fields.size() * sizeof(PyObject*)), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  const py::object type = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!type) throw py::error_already_set();
  RecordClass<S>::name = name;
  RecordClass<S>::type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  RecordClass<S>::type->tp_vectorcall = &make_record<S>;
  py::list all, optional;
  for (const Field<S>& f : fields) {
    RecordClass<S>::names.push_back(PyUnicode_InternFromString(f.name));
    all.append(f.name);
    if (f.optional) optional.append(f.name);
  }
  type.attr("FIELDS") = py::tuple(all);
  type.attr("OPTIONAL") = py::tuple(optional);
  m.attr(name) = type;
}

}  // namespace

template <class S>
const S* struct_in(PyObject* object) {
  if (Py_TYPE(object) != RecordClass<S>::type) return nullptr;
  return &reinterpret_cast<Record<S>*>(object)->value;
}

// Every struct that Python fills, one per line.
// clang-format off
#define TOKFUSE_RECORDS(each) \
  each(LogitsArgs) \
  each(TokenStatsOut) \
  each(TokenStatsGrad) \
  each(GradRows) \
  each(KeptArgs) \
  each(IdsArgs) \
  each(DivergenceArgs) \
  each(DivergenceOut) \
  each(DivergenceGrad) \
  each(DistillArgs) \
  each(DistillOut) \
  each(DistillGrad) \
  each(ObjectiveArgs) \
  each(TokenObjectiveArgs) \
  each(PrepareArgs) \
  each(MetricsArgs) \
  each(LossArgs) \
  each(CountArgs) \
  each(GroupAdvantageArgs) \
  each(GaeArgs) \
  each(VtraceArgs) \
  each(WhitenArgs) \
  each(OpeArgs) \
  each(MomentsArgs) \
  each(KeepRule) \
  each(OffPolicyArgs) \
  each(SketchArgs)
// clang-format on

#define STRUCT_IN(type) template const type* struct_in<type>(PyObject*);
TOKFUSE_RECORDS(STRUCT_IN)
#undef STRUCT_IN

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
