#include "bindings/tensors.h"

#include <cstdlib>
#include <new>

#include "bindings/bind.h"
#include "bindings/buffers.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

struct DlVersion {
  uint32_t major, minor;
};
struct DlManaged {
  DlVersion version;
  void* context;
  void (*deleter)(DlManaged*);
  uint64_t flags;
  DlTensor tensor;
};
struct DlExchange {
  DlVersion version;
  void* previous;
  int (*allocate)(DlTensor*, DlManaged**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, DlManaged**);
  int (*object_from_managed)(DlManaged*, void**);
  int (*tensor_from_object)(void*, DlTensor*);
  int (*current_stream)(int32_t, int32_t, void**);
};

constexpr uint32_t kDlMajor = 1;

// Set once by use_tensors, under the GIL. The types live as long as torch.
const DlExchange* g_exchange = nullptr;
PyTypeObject* g_tensor = nullptr;
PyTypeObject* g_parameter = nullptr;
PyObject* g_requires_grad = nullptr;
PyObject *g_new_empty = nullptr, *g_empty_like = nullptr;
PyObject *g_float32 = nullptr, *g_float64 = nullptr, *g_dtype = nullptr;
PyObject* g_current_stream = nullptr;  // null in a CPU build of torch

// A reference that is never given back.
PyObject* kept(const py::object& object) { return object.inc_ref().ptr(); }

// Returns true if the tensors of this torch can be read and made here.
bool use_tensors(const py::object& capsule, const py::object& tensor, const py::object& parameter) {
  auto* exchange =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->version.major != kDlMajor || exchange->tensor_from_object == nullptr) return false;
  require(PyType_Check(tensor.ptr()) && PyType_Check(parameter.ptr()), "tensor types expected");
  g_tensor = reinterpret_cast<PyTypeObject*>(kept(tensor));
  g_parameter = reinterpret_cast<PyTypeObject*>(kept(parameter));
  g_requires_grad = PyUnicode_InternFromString("requires_grad");
  g_new_empty = PyUnicode_InternFromString("new_empty");
  const py::module_ torch = py::module_::import("torch");
  g_empty_like = kept(torch.attr("empty_like"));
  g_float32 = kept(torch.attr("float32"));
  g_float64 = kept(torch.attr("float64"));
  g_dtype = kept(py::make_tuple("dtype"));
  const py::object stream = py::getattr(torch.attr("_C"), "_cuda_getCurrentRawStream", py::none());
  if (!stream.is_none()) g_current_stream = kept(stream);
  g_exchange = exchange;
  return true;
}

constexpr int32_t kMaxDims = 4;

// A contiguous tensor whose memory is ours until torch calls the deleter. Going through torch's
// allocator instead takes a second tensor and 0.3 us.
struct Owned {
  DlManaged managed;
  int64_t shape[kMaxDims], strides[kMaxDims];
};

void delete_large(DlManaged* managed) {
  return_buffer(managed->tensor.data);
  std::free(managed->context);
}

void delete_small(DlManaged* managed) { std::free(managed->context); }

constexpr size_t kAlignment = 64;

// A large tensor takes its memory from buffers.h, a small one has it behind the record.
Owned* allocate(const int64_t* sizes, int32_t ndim, DlType type, size_t bytes) {
  const bool large = bytes >= static_cast<size_t>(kKeptBytes);
  void* const memory = std::malloc(sizeof(Owned) + (large ? 0 : kAlignment + bytes));
  if (memory == nullptr) throw std::bad_alloc();
  Owned* const owned = new (memory) Owned;
  void* data;
  try {
    data = large ? take_buffer(bytes) : owned + 1;
  } catch (...) {
    std::free(memory);
    throw;
  }
  if (!large) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    data = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  int64_t stride = 1;
  for (int32_t i = ndim - 1; i >= 0; i--) {
    owned->shape[i] = sizes[i];
    owned->strides[i] = stride;
    stride *= sizes[i];
  }
  const DlTensor tensor = {data, {kDlCpu, 0}, ndim, type, owned->shape, owned->strides, 0};
  owned->managed = {{kDlMajor, 0}, owned, large ? delete_large : delete_small, 0, tensor};
  return owned;
}

int64_t byte_count(const int64_t* shape, int32_t ndim, DlType type) {
  int64_t bytes = type.bits / 8;
  for (int32_t i = 0; i < ndim; i++) {
    require(shape[i] >= 0 && !__builtin_mul_overflow(bytes, shape[i], &bytes),
            "a size is negative, or the tensor larger than the address space");
  }
  return bytes;
}

// An unwritten tensor for Python; `code` is a DType.
py::object empty(const py::tuple& shape, const py::int_& code) {
  DType dtype;
  if (!read_value(code.ptr(), &dtype)) throw py::error_already_set();
  const DlType type = dl_type(dtype);
  int64_t sizes[kMaxDims];
  require(g_exchange != nullptr, "the tensors of this torch cannot be made here");
  require(shape.size() <= kMaxDims, "a tensor has 0 to 4 dimensions");
  for (size_t i = 0; i < shape.size(); i++) sizes[i] = shape[i].cast<int64_t>();
  void* data = nullptr;
  return empty_tensor(sizes, static_cast<int32_t>(shape.size()), type, &data);
}

}  // namespace

bool read_tensor(PyObject* object, DlTensor* out) {
  if (g_exchange == nullptr) return false;
  if (Py_TYPE(object) != g_tensor && Py_TYPE(object) != g_parameter) return false;
  if (g_exchange->tensor_from_object(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  return true;
}

bool requires_grad(PyObject* tensor) {
  PyObject* flag = PyObject_GetAttr(tensor, g_requires_grad);
  if (flag == nullptr) PyErr_Clear();
  const bool tracked = flag != Py_False;
  Py_XDECREF(flag);
  return tracked;
}

py::object empty_tensor(std::initializer_list<int64_t> shape, DlType type, void** data) {
  return empty_tensor(shape.begin(), static_cast<int32_t>(shape.size()), type, data);
}

py::object empty_tensor(const int64_t* shape, int32_t ndim, DlType type, void** data) {
  require(ndim >= 0 && ndim <= kMaxDims, "a tensor has 0 to 4 dimensions");
  const int64_t bytes = byte_count(shape, ndim, type);
  DlManaged* const managed = &allocate(shape, ndim, type, static_cast<size_t>(bytes))->managed;
  *data = managed->tensor.data;
  void* object = nullptr;
  if (g_exchange->object_from_managed(managed, &object) != 0) {
    managed->deleter(managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

py::object new_empty(PyObject* like, std::initializer_list<int64_t> shape) {
  return new_empty(like, shape, DlType{0, 0, 0});
}

py::object new_empty(PyObject* like, std::initializer_list<int64_t> shape, DlType type) {
  // The sizes one by one: a tuple takes twice the time. Only a shape without sizes needs one.
  py::object owned[kMaxDims];
  PyObject* args[2 + kMaxDims] = {like};
  size_t count = 1;
  require(shape.size() <= kMaxDims, "a tensor has 0 to 4 dimensions");
  if (shape.size() == 0) owned[0] = py::tuple(0);
  for (const int64_t size : shape) owned[count++ - 1] = py::int_(size);
  if (shape.size() == 0) count = 2;
  for (size_t i = 1; i < count; i++) args[i] = owned[i - 1].ptr();
  const bool typed = type.bits != 0;
  if (typed) args[count] = type == kDlFloat64 ? g_float64 : g_float32;
  PyObject* const made =
      PyObject_VectorcallMethod(g_new_empty, args, count, typed ? g_dtype : nullptr);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

py::object empty_like(PyObject* like) {
  PyObject* const made = PyObject_CallOneArg(g_empty_like, like);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

uintptr_t current_stream(int32_t device) {
  require(g_current_stream != nullptr, "this torch has no CUDA streams");
  const py::int_ index(device);
  PyObject* const stream = PyObject_CallOneArg(g_current_stream, index.ptr());
  if (stream == nullptr) throw py::error_already_set();
  const py::object owned = py::reinterpret_steal<py::object>(stream);
  return owned.cast<uintptr_t>();
}

void bind_use_tensors(py::module_& m) { m.def("use_tensors", &use_tensors); }

void bind_tensors(py::module_& m) {
  bind_use_tensors(m);
  m.def("empty", &empty);
  m.def("release_buffers", &release_buffers);
  m.def("kept_bytes", &kept_bytes);
  m.def("kept_limit", &kept_limit);
  kept_limit();  // an invalid TOKFUSE_KEEP_MIB then fails at import, not at the first call
}

}  // namespace tokfuse
