// Whole calls of the eager mode on the CPU: one native function reads and checks the arguments
// (eager_args.h), runs the kernel and makes the outputs. At one token the same steps in Python take
// twenty times the kernel's time.
#include <cstdlib>
#include <memory>
#include <vector>

#include "bindings/bind.h"
#include "bindings/eager_args.h"
#include "common/loss_args.h"
#include "cpu/ids_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

const EagerArgs kOnCpu({kDlCpu, 0});

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

// row_max and inv_sum, as outputs for a gradient, otherwise in memory that this object holds.
class BackwardState {
 public:
  BackwardState(TokenStatsOut& out, Results& results, int64_t n, PyObject* for_gradient) {
    if (for_gradient == Py_True) {
      out.row_max = results.floats(n);
      out.inv_sum = results.floats(n);
    } else {
      unseen_ = scratch(2 * n);
      out.row_max = unseen_.get();
      out.inv_sum = unseen_.get() + n;
    }
  }

 private:
  std::unique_ptr<float[]> unseen_;
};

// Where loss, loss_sum and count are written. All three come from the metric sums.
struct LossCells {
  float *loss, *loss_sum;
  double* count;
};

void write_loss(const ObjectiveArgs& o, const LossCells& cells) {
  const float loss = static_cast<float>(o.sums[kLoss]);
  const double count = o.sums[o.normalize_by_seqs ? kSeqs : kTokens];
  *cells.loss = loss;
  *cells.loss_sum = undivided_loss(loss, o.inv_normalizer, count);
  *cells.count = count;
}

LossCells loss_cells(Results& results) {
  LossCells cells;
  cells.loss = static_cast<float*>(results.add({}, kDlFloat32));
  cells.loss_sum = static_cast<float*>(results.add({}, kDlFloat32));
  cells.count = static_cast<double*>(results.add({}, kDlFloat64));
  return cells;
}

// (logits, target, options, threads, for_gradient) -> the five statistics, with for_gradient also
// row_max and inv_sum.
PyObject* eager_token_stats(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer([&]() -> PyObject* {
    plain(count == 5);
    const int threads = thread_count(args[3]);
    const LogitsArgs a = kOnCpu.logits(args[0], args[1], args[2], threads);
    Results results;
    TokenStatsOut out = stats_outputs(results, a.tokens);
    const BackwardState state(out, results, a.tokens, args[4]);
    {
      py::gil_scoped_release release;
      if (TOKFUSE_CALL(first_bad_row, a) >= 0) throw NotPlain();
      TOKFUSE_CALL(token_stats_fwd, a, out);
    }
    return results.release();
  });
}

// (logits, target, options, threads, for_gradient, ids) -> the outputs of eager_token_stats, then
// logp_at in the shape of ids, a matrix of int64. With for_gradient, the offsets of its rows last.
PyObject* eager_token_stats_at(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer([&]() -> PyObject* {
    plain(count == 6);
    const int threads = thread_count(args[3]);
    const LogitsArgs a = kOnCpu.logits(args[0], args[1], args[2], threads);
    const DlTensor matrix = kOnCpu.tensor(args[5]);
    plain(matrix.ndim == 2 && matrix.shape[0] == a.tokens && matrix.type == kDlInt64);
    const int64_t width = matrix.shape[1];
    const bool rows_follow = a.tokens <= 1 || matrix.strides[0] == width;
    plain(width == 0 || ((width == 1 || matrix.strides[1] == 1) && rows_follow));
    Results results;
    TokenStatsOut out = stats_outputs(results, a.tokens);
    const BackwardState state(out, results, a.tokens, args[4]);
    IdsArgs ids = {};
    ids.ids = static_cast<const int64_t*>(matrix.data);
    ids.num_ids = a.tokens * width;
    ids.logp_at = static_cast<float*>(results.add({a.tokens, width}, kDlFloat32));
    std::unique_ptr<int64_t[]> unseen;
    int64_t* offsets = nullptr;
    if (args[4] == Py_True) {
      offsets = static_cast<int64_t*>(results.add({a.tokens + 1}, kDlInt64));
    } else {
      unseen.reset(offsets = new int64_t[static_cast<size_t>(a.tokens) + 1]);
    }
    for (int64_t t = 0; t <= a.tokens; t++) offsets[t] = t * width;
    ids.offsets = offsets;
    {
      py::gil_scoped_release release;
      if (TOKFUSE_CALL(first_bad_row, a) >= 0) throw NotPlain();
      if (TOKFUSE_CALL(token_stats_at_fwd, a, out, ids) >= 0) throw NotPlain();
    }
    return results.release();
  });
}

// (logp, entropy, inputs, record, by_seqs, inverse, threads)
//   -> loss, loss_sum, count, token_loss, sums, d_logp, d_entropy
PyObject* eager_policy_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer([&]() -> PyObject* {
    plain(count == 7);
    ObjectiveArgs o = kOnCpu.policy_loss(args);
    plain(o.old_logp != nullptr);
    const int64_t n = o.tokens;
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
    const LogitsArgs a = kOnCpu.logits(args[0], args[1], args[2], threads);
    const int64_t n = a.tokens;
    ObjectiveArgs o = kOnCpu.objective(args[3], args[4], args[5], args[6], n, threads, true);
    plain(o.params.level == Level::kToken && o.old_logp != nullptr && o.mask == a.mask);
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

PyMethodDef methods[] = {
    fast_method("eager_token_stats", eager_token_stats),
    fast_method("eager_token_stats_at", eager_token_stats_at),
    fast_method("eager_policy_loss", eager_policy_loss),
    fast_method("eager_policy_step", eager_policy_step),
    {"environment_sets", environment_sets, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_eager(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace tokfuse
