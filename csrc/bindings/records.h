// Argument structs as Python classes with keyword-only constructors, and NamedTuples read by name.
//
// One list of its fields (records.cpp) makes a struct a class:
//
//     native.GradRows(grad_logits=tensor, grad_stride=8, grad_dtype=0)
//
// A pointer is given as None or as a tensor (anything with `data_ptr()`), which the struct keeps
// alive. A missing, misnamed or superfluous field raises TypeError. So does a value of the wrong
// type; a code that is no enumerator raises ValueError. The function that takes the struct checks
// whether its fields fit together.
//
// The classes are made without pybind11: its constructor copies the keywords into a dictionary and
// registers the object, which took 10 us of a token_stats call; here a field is an entry of the
// argument array. Bound functions take a struct like any other argument.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/loss_args.h"
#include "common/objective_args.h"
#include "common/packed_args.h"
#include "common/row_args.h"

namespace tokfuse {

// Adds the class of every argument struct to `m`.
void bind_records(pybind11::module_& m);
// The names of the classes.
const std::vector<const char*>& record_names();

// The struct in an object of its class, or null if `object` is of another class. Defined for every
// struct that Python fills.
template <class S>
const S* struct_in(PyObject* object);

// ------------------------------------------------------------------------- NamedTuples of Python

// The fields of a Python type are not those that C++ reads. This is a fault of the build, not of
// the call, so it is always raised as TypeError.
struct WrongFields : pybind11::type_error {
  using pybind11::type_error::type_error;
};

// Reads a NamedTuple by the names of its fields, which must be exactly `names`. Positions are
// looked up once per type, so reading a field is one array access.
template <size_t kCount>
class TupleFields {
 public:
  TupleFields(const char* what, std::array<const char*, kCount> names)
      : what_(what), names_(names) {}

  // The fields of one tuple, by the index of their name. Borrowed references.
  class View {
   public:
    View(PyObject* tuple, const TupleFields& fields) : tuple_(tuple), fields_(fields) {}
    PyObject* operator[](size_t name) const {
      return PyTuple_GET_ITEM(tuple_, fields_.position_[name]);
    }

   private:
    PyObject* tuple_;
    const TupleFields& fields_;
  };

  View of(PyObject* tuple) {
    if (Py_TYPE(tuple) != type_) learn(tuple);
    return View(tuple, *this);
  }

 private:
  void learn(PyObject* tuple);

  const char* what_;
  std::array<const char*, kCount> names_;
  std::array<Py_ssize_t, kCount> position_ = {};
  PyTypeObject* type_ = nullptr;  // owned: another type could get the address of a freed one
};

// Writes the positions of `names` in the `_fields` of the tuple's type; throws WrongFields.
void find_fields(const char* what, PyObject* tuple, const char* const* names, size_t count,
                 Py_ssize_t* position);

template <size_t kCount>
void TupleFields<kCount>::learn(PyObject* tuple) {
  find_fields(what_, tuple, names_.data(), kCount, position_.data());
  Py_INCREF(Py_TYPE(tuple));
  Py_XDECREF(reinterpret_cast<PyObject*>(type_));
  type_ = Py_TYPE(tuple);
}

// Reads a runtime.policy.objective.ObjectiveRecord.
ObjectiveParams objective_params(PyObject* record);

// ---------------------------------------------------------------------------- fields from Python

// The last enumerator of an enum, and the error message for a code that is no enumerator.
template <class E>
struct Codes;
#define TOKFUSE_CODES(type, last_enumerator, text)      \
  template <>                                           \
  struct Codes<type> {                                  \
    static constexpr type last = type::last_enumerator; \
    static constexpr const char* wrong = text;          \
  }
TOKFUSE_CODES(DType, kFloat16, "dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16)");
TOKFUSE_CODES(Divergence, kTotalVariation, "unknown divergence code");
TOKFUSE_CODES(Baseline, kNone, "unknown baseline code");
TOKFUSE_CODES(Scale, kMean, "unknown scale code");
TOKFUSE_CODES(WeightLevel, kExternal, "unknown level code");
TOKFUSE_CODES(WeightMode, kKeep, "unknown mode code");
TOKFUSE_CODES(Statistic, kK3, "unknown statistic code");
TOKFUSE_CODES(Over, kMax, "unknown reduction code");
TOKFUSE_CODES(Normalize, kGroup, "unknown normalize code");
#undef TOKFUSE_CODES

// Each returns false with a Python error set.
bool read_value(PyObject* value, int64_t* out);
bool read_value(PyObject* value, double* out);
bool read_address(PyObject* value, uintptr_t* out);

inline bool read_value(PyObject* value, int* out) {
  int64_t wide = 0;
  if (!read_value(value, &wide)) return false;
  *out = static_cast<int>(wide);
  if (*out == wide) return true;
  PyErr_SetString(PyExc_OverflowError, "does not fit into 32 bits");
  return false;
}

inline bool read_value(PyObject* value, float* out) {
  double wide = 0;
  if (!read_value(value, &wide)) return false;
  *out = static_cast<float>(wide);
  return true;
}

template <class T>
bool read_value(PyObject* value, T** out) {
  uintptr_t address = 0;
  if (!read_address(value, &address)) return false;
  *out = reinterpret_cast<T*>(address);
  return true;
}

template <class E, std::enable_if_t<std::is_enum_v<E>, int> = 0>
bool read_value(PyObject* value, E* out) {
  int64_t code = 0;
  if (!read_value(value, &code)) return false;
  if (code < 0 || code > static_cast<int64_t>(Codes<E>::last)) {
    PyErr_SetString(PyExc_ValueError, Codes<E>::wrong);
    return false;
  }
  *out = static_cast<E>(code);
  return true;
}

inline bool read_value(PyObject* value, ObjectiveParams* out) {
  *out = objective_params(value);
  return true;
}

// A struct that is a class itself.
template <class S, std::enable_if_t<std::is_class_v<S>, int> = 0>
bool read_value(PyObject* value, S* out) {
  const S* given = struct_in<S>(value);
  if (given != nullptr) {
    *out = *given;
    return true;
  }
  PyErr_Format(PyExc_TypeError, "of type %s", Py_TYPE(value)->tp_name);
  return false;
}

// One field of S: how it is read from a Python value, and whether it may be left out.
template <class S>
struct Field {
  const char* name;
  bool optional;
  bool (*read)(PyObject* value, S* out);
};

}  // namespace tokfuse

// A plain struct as the argument of a bound function: a copy, because the caller keeps the object
// until the function returns.
namespace pybind11 {
namespace detail {
template <class S>
class type_caster<S, std::enable_if_t<std::is_aggregate_v<S> && std::is_trivially_copyable_v<S>>> {
 public:
  PYBIND11_TYPE_CASTER(S, const_name("argument struct"));

  bool load(handle source, bool) {
    const S* given = tokfuse::struct_in<S>(source.ptr());
    if (given != nullptr) value = *given;
    return given != nullptr;
  }
};
}  // namespace detail
}  // namespace pybind11
