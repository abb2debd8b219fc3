// Whole calls of the eager mode on CUDA: one native function reads and checks the arguments
// (eager_args.h), makes the outputs by torch's allocator, and launches. The same steps in Python
// take longer than the kernels of a small batch.
//
// Values of device memory are not read. A launch that fails raises the error of the general path.
#include <memory>
#include <vector>

#include "bindings/bind_cuda.h"
#include "bindings/eager_args.h"
#include "cuda/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

#if defined(TOKFUSE_CUDA_HOST)
constexpr int32_t kDevice = kDlCpu;
Place place_on(DlDevice) { return Place(0, nullptr); }
#else
constexpr int32_t kDevice = kDlCuda;
Place place_on(DlDevice device) {
  return Place(device.id, reinterpret_cast<cudaStream_t>(current_stream(device.id)));
}
#endif

// The arguments of a call whose main input is `main`.
EagerArgs args_of(PyObject* main) {
  DlTensor t;
  plain(read_tensor(main, &t) && t.device.type == kDevice);
  return EagerArgs(t.device);
}

// The tensors of a call: its outputs in order, and memory that is given back at its end.
class Tensors {
 public:
  // Vectors have n elements, and are on the device of `like`.
  Tensors(const EagerArgs& args, PyObject* like, int64_t n) : args_(args), like_(like), n_(n) {
    outputs_.reserve(12);
  }

  float* floats() {
    vector_ = vector_ ? empty_like(vector_.ptr()) : new_empty(like_, {n_}, kDlFloat32);
    return add<float>(vector_);
  }
  // loss, loss_sum and count. The last is a view of the metric sums, which follow later.
  LossArgs loss(const ObjectiveArgs& o) {
    sums_ = new_empty(like_, {kMetricCount}, kDlFloat64);
    const py::object one = new_empty(like_, {}, kDlFloat32);
    LossArgs loss = {o.inv_normalizer, o.normalize_by_seqs, add<float>(one), nullptr};
    loss.loss_sum = add<float>(empty_like(one.ptr()));
    const py::int_ slot(static_cast<int>(o.normalize_by_seqs ? kSeqs : kTokens));
    PyObject* const count = PyObject_GetItem(sums_.ptr(), slot.ptr());
    if (count == nullptr) throw py::error_already_set();
    add<double>(py::reinterpret_steal<py::object>(count));
    return loss;
  }
  double* sums() { return add<double>(sums_); }
  void* matrix(int64_t columns) { return add<void>(new_empty(like_, {n_, columns})); }

  // Memory for `floats` elements of four bytes and `doubles` of eight, which come first. It is used
  // in the order of the stream, so that it can be given back before the kernels have run.
  void scratch(int64_t doubles, int64_t floats) {
    const int64_t size = doubles + (floats + 1) / 2;
    memory_ = new_empty(sums_.ptr(), {size});
    free_ = static_cast<char*>(address(memory_.ptr()));
  }
  template <class T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(free_);
    free_ += count * static_cast<int64_t>(sizeof(T));
    return taken;
  }

  PyObject* release() {
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(outputs_.size()));
    if (tuple == nullptr) return nullptr;
    for (size_t i = 0; i < outputs_.size(); i++) {
      PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), outputs_[i].release().ptr());
    }
    return tuple;
  }

 private:
  void* address(PyObject* object) const { return args_.tensor(object).data; }
  template <class T>
  T* add(py::object tensor) {
    outputs_.push_back(std::move(tensor));
    return static_cast<T*>(address(outputs_.back().ptr()));
  }

  const EagerArgs& args_;
  PyObject* like_;
  int64_t n_;
  py::object vector_, sums_, memory_;
  char* free_ = nullptr;
  std::vector<py::object> outputs_;
};

TokenStatsOut stats_outputs(Tensors& tensors) {
  TokenStatsOut out = {};
  for (float** field : {&out.logp, &out.entropy, &out.lse, &out.sum_sq, &out.top1}) {
    *field = tensors.floats();
  }
  return out;
}

// The objective as the row kernel takes it, which sees one token: what belongs to sequences is
// spread over their tokens. C++ for `per_token` of runtime/policy/inputs.py.
struct TokenInputsOnDevice {
  TokenObjectiveArgs objective;
  const int32_t* counts;  // (S) or null
};

int64_t spread_floats(const ObjectiveArgs& o) { return 2 * o.tokens + o.seqs + 1; }

// Takes at most spread_floats(o) elements of the scratch memory.
TokenInputsOnDevice spread(const Place& place, const ObjectiveArgs& o, Tensors& tensors) {
  TokenObjectiveArgs x = {};
  x.params = o.params;
  x.old_logp = o.old_logp;
  x.advantage = o.advantage;
  x.token_weight = o.token_weight;
  x.signal = o.signal;
  x.ref_logp = o.ref_logp;
  x.kl_weight = o.kl_weight;
  x.entropy_weight = o.entropy_weight;
  x.anchor_logp = o.anchor_logp;
  x.anchor_weight = o.anchor_weight;
  int32_t* counts = nullptr;
  if (o.cu_seqlens != nullptr) {
    counts = tensors.take<int32_t>(o.seqs);
    PrepareArgs p = {o.seqs, o.cu_seqlens, o.mask, nullptr, counts, nullptr, nullptr};
    if (o.params.seq_mean != 0) x.agg_weight = p.agg_weight = tensors.take<float>(o.tokens);
    if (o.advantage_per_seq != 0) {
      p.seq_advantage = o.advantage;
      x.advantage = p.advantage = tensors.take<float>(o.tokens);
    }
    run_policy_prepare(place, p);
  }
  x.inv_normalizer = static_cast<float>(o.inv_normalizer);
  if (o.inv_normalizer < 0 && o.normalize_by_seqs == 0 && o.mask == nullptr && o.tokens > 0) {
    x.inv_normalizer = static_cast<float>(1.0 / static_cast<double>(o.tokens));
  } else if (o.inv_normalizer < 0) {
    float* const inverse = tensors.take<float>(1);
    run_policy_count(place,
                     {o.tokens, o.seqs, o.mask, o.normalize_by_seqs ? counts : nullptr, inverse});
    x.batch_inv_normalizer = inverse;
    x.inv_normalizer = 1.0f;
  }
  return {x, counts};
}

// Statistics, objective and gradient of each row in one launch, then the metric sums and the loss.
void step_of_tokens(const Place& place, const LogitsArgs& a, const TokenStatsOut& stats,
                    const ObjectiveArgs& o, const GradRows& grad, const LossArgs& loss,
                    Tensors& tensors) {
  const int64_t n = o.tokens, partials = policy_partials(n, 0);
  tensors.scratch(partials, 4 * n + spread_floats(o));
  MetricsArgs m = {};
  m.partial = tensors.take<double>(partials);
  TokenInputsOnDevice x = spread(place, o, tensors);
  x.objective.token_loss = o.token_loss;
  x.objective.d_logp = tensors.take<float>(n);
  x.objective.d_entropy = tensors.take<float>(n);
  x.objective.ratio = tensors.take<float>(n);
  x.objective.flags = tensors.take<int32_t>(n);
  run_policy_step(place, a, stats, x.objective, grad);
  m.tokens = n;
  m.seqs = x.counts == nullptr ? 0 : o.seqs;
  m.logp = stats.logp;
  m.entropy = stats.entropy;
  m.old_logp = o.old_logp;
  m.ref_logp = o.ref_logp;
  m.mask = o.mask;
  m.token_loss = o.token_loss;
  m.d_logp = x.objective.d_logp;
  m.d_entropy = x.objective.d_entropy;
  m.ratio = x.objective.ratio;
  m.flags = x.objective.flags;
  m.counts = x.counts;
  m.sums = o.sums;
  run_policy_metrics(place, m, loss);
}

// Statistics, objective, gradient: for a ratio that needs the statistics of other tokens, or of
// this pass. C++ for `statistics_first` of runtime/backends/policy_runs.py.
void step_in_passes(const Place& place, const LogitsArgs& a, TokenStatsOut stats, ObjectiveArgs o,
                    const GradRows& grad, const LossArgs& loss, Tensors& tensors) {
  const int64_t n = o.tokens, partials = policy_partials(n, o.seqs);
  tensors.scratch(partials, 4 * n);
  o.partial = tensors.take<double>(partials);
  o.d_logp = tensors.take<float>(n);
  o.d_entropy = tensors.take<float>(n);
  stats.row_max = tensors.take<float>(n);
  stats.inv_sum = tensors.take<float>(n);
  if (o.old_logp == nullptr) o.old_logp = stats.logp;
  run_token_stats_fwd(place, a, stats);
  run_policy_loss(place, o, loss);
  TokenStatsGrad g = {};
  g.row_max = stats.row_max;
  g.inv_sum = stats.inv_sum;
  g.logp = stats.logp;
  g.entropy = stats.entropy;
  g.grad_logp = o.d_logp;
  g.grad_entropy = o.d_entropy;
  g.grad_logits = grad.grad_logits;
  g.grad_stride = grad.grad_stride;
  g.grad_dtype = grad.grad_dtype;
  run_token_stats_bwd(place, a, g);
}

// `answer`, but a failed launch raises its error: a launch before it may have written.
template <class Call>
PyObject* answer_of_launches(Call call) {
  return answer([&]() -> PyObject* {
    try {
      return call();
    } catch (const LaunchError& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
  });
}

// (logits, target, options, threads, for_gradient) -> the five statistics, with for_gradient also
// row_max and inv_sum.
PyObject* eager_token_stats(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer_of_launches([&]() -> PyObject* {
    plain(count == 5);
    const EagerArgs given = args_of(args[0]);
    const LogitsArgs a = given.logits(args[0], args[1], args[2], thread_count(args[3]));
    Tensors tensors(given, args[0], a.tokens);
    TokenStatsOut out = stats_outputs(tensors);
    if (args[4] == Py_True) {
      out.row_max = tensors.floats();
      out.inv_sum = tensors.floats();
    }
    run_token_stats_fwd(place_on(given.device()), a, out);
    return tensors.release();
  });
}

// (logits, target, options, threads, row_max, inv_sum, logp, entropy, grad_logp, grad_entropy,
// grad_lse)
//   -> grad_logits
PyObject* eager_token_stats_bwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer_of_launches([&]() -> PyObject* {
    plain(count == 11);
    const EagerArgs given = args_of(args[0]);
    const LogitsArgs a = given.logits(args[0], args[1], args[2], thread_count(args[3]));
    TokenStatsGrad g = {};
    const float** const fields[] = {&g.row_max,   &g.inv_sum,      &g.logp,    &g.entropy,
                                    &g.grad_logp, &g.grad_entropy, &g.grad_lse};
    for (int i = 0; i < 7; i++) *fields[i] = given.differentiable(args[4 + i], a.tokens);
    for (int i = 0; i < 4; i++) plain(*fields[i] != nullptr);
    const py::object grad = new_empty(args[0], {a.tokens, a.vocab});
    g.grad_logits = given.tensor(grad.ptr()).data;
    g.grad_stride = a.vocab;
    g.grad_dtype = a.dtype;
    run_token_stats_bwd(place_on(given.device()), a, g);
    return grad.inc_ref().ptr();
  });
}

// (logp, entropy, inputs, record, by_seqs, inverse, threads)
//   -> loss, loss_sum, count, token_loss, sums, d_logp, d_entropy
PyObject* eager_policy_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer_of_launches([&]() -> PyObject* {
    plain(count == 7);
    const EagerArgs given = args_of(args[0]);
    ObjectiveArgs o = given.policy_loss(args);
    if (o.old_logp == nullptr) o.old_logp = o.logp;
    Tensors tensors(given, args[0], o.tokens);
    const LossArgs loss = tensors.loss(o);
    o.token_loss = tensors.floats();
    o.sums = tensors.sums();
    o.d_logp = tensors.floats();
    o.d_entropy = tensors.floats();
    const int64_t partials = policy_partials(o.tokens, o.seqs);
    tensors.scratch(partials, 0);
    o.partial = tensors.take<double>(partials);
    run_policy_loss(place_on(given.device()), o, loss);
    return tensors.release();
  });
}

// (logits, target, options, inputs, record, by_seqs, inverse, threads, in_place)
//   -> loss, loss_sum, count, token_loss, sums, the five statistics, grad_logits unless in place
PyObject* eager_policy_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return answer_of_launches([&]() -> PyObject* {
    plain(count == 9);
    const EagerArgs given = args_of(args[0]);
    const int threads = thread_count(args[7]);
    const LogitsArgs a = given.logits(args[0], args[1], args[2], threads);
    ObjectiveArgs o = given.objective(args[3], args[4], args[5], args[6], a.tokens, threads, true);
    plain(o.mask == a.mask);
    Tensors tensors(given, args[0], a.tokens);
    const LossArgs loss = tensors.loss(o);
    o.token_loss = tensors.floats();
    o.sums = tensors.sums();
    const TokenStatsOut stats = stats_outputs(tensors);
    o.logp = stats.logp;
    o.entropy = stats.entropy;
    GradRows grad = {const_cast<void*>(a.logits), a.stride, a.dtype, nullptr};
    if (args[8] != Py_True) {
      grad.grad_logits = tensors.matrix(a.vocab);
      grad.grad_stride = a.vocab;
    }
    const Place place = place_on(given.device());
    if (o.params.level == Level::kToken && o.old_logp != nullptr) {
      step_of_tokens(place, a, stats, o, grad, loss, tensors);
    } else {
      step_in_passes(place, a, stats, o, grad, loss, tensors);
    }
    return tensors.release();
  });
}

PyMethodDef methods[] = {
    fast_method("eager_token_stats", eager_token_stats),
    fast_method("eager_token_stats_bwd", eager_token_stats_bwd),
    fast_method("eager_policy_loss", eager_policy_loss),
    fast_method("eager_policy_step", eager_policy_step),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_eager(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace cuda
}  // namespace tokfuse
