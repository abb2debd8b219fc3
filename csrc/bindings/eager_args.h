// The arguments of whole calls of the eager mode, which the functions for the CPU (eager.cpp) and
// for CUDA (bind_cuda_eager.cpp) read alike.
//
// A call returns None if its arguments do not have the plain form that is read here: another
// device, a dtype that must be converted, strides, a subclass, a wrong shape or value. The caller
// then takes the general path, which converts the argument or raises an error that explains it.
// Nothing has been written if None is returned.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/records.h"
#include "bindings/tensors.h"

namespace tokfuse {

struct NotPlain {};  // thrown and caught in one call, which needs the general path

inline void plain(bool ok) {
  if (!ok) throw NotPlain();
}

int thread_count(PyObject* object);

// Reads the tensors of one call. All of them are on one device.
class EagerArgs {
 public:
  explicit EagerArgs(DlDevice device) : device_(device) {}
  DlDevice device() const { return device_; }

  // A tensor without a gradient, or one whose gradient the caller attaches.
  DlTensor tensor(PyObject* object) const;
  // The address of a contiguous vector of n elements without gradient, or null for None.
  template <class T>
  const T* vector(PyObject* object, int64_t n, DlType type) const;
  const float* floats(PyObject* object, int64_t n) const {
    return vector<float>(object, n, kDlFloat32);
  }
  // `options` is runtime.core.logit_options.LogitOptions. The logits may require a gradient: the
  // caller attaches it.
  LogitsArgs logits(PyObject* logits, PyObject* target, PyObject* options, int threads) const;
  // `inputs` is runtime.policy.inputs.PolicyInputs; `record` is Objective.record. old_logp is null
  // for an update on policy.
  ObjectiveArgs objective(PyObject* inputs, PyObject* record, PyObject* by_seqs, PyObject* inverse,
                          int64_t tokens, int threads, bool has_entropy) const;
  // The arguments of policy_loss: logp, entropy, and those of `objective` up to threads. logp and
  // entropy may require a gradient.
  ObjectiveArgs policy_loss(PyObject* const* args) const;
  // Like `floats`, for a vector that may require a gradient.
  const float* differentiable(PyObject* object, int64_t n) const {
    return checked_vector<float>(object, n, kDlFloat32);
  }

 private:
  template <class T>
  const T* checked_vector(PyObject* object, int64_t n, DlType type) const;

  DlDevice device_;
};

template <class T>
const T* EagerArgs::checked_vector(PyObject* object, int64_t n, DlType type) const {
  if (object == Py_None) return nullptr;
  const DlTensor t = tensor(object);
  plain(t.ndim == 1 && t.shape[0] == n && t.type == type);
  plain(n <= 1 || t.strides[0] == 1);
  return static_cast<const T*>(t.data);
}

template <class T>
const T* EagerArgs::vector(PyObject* object, int64_t n, DlType type) const {
  const T* const data = checked_vector<T>(object, n, type);
  plain(object == Py_None || !requires_grad(object));
  return data;
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
  } catch (const pybind11::error_already_set&) {  // holds the Python error and drops it
  } catch (const std::exception&) {
  }
  Py_RETURN_NONE;
}

// METH_FASTCALL, because the dispatch of pybind11 takes as long as the rest of a call at one token.
template <class F>
PyMethodDef fast_method(const char* name, F f) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL,
          nullptr};
}

}  // namespace tokfuse
