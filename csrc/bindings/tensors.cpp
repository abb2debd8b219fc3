#include "bindings/tensors.h"

#include <algorithm>

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

constexpr int32_t kDlCpu = 1;
constexpr uint32_t kDlMajor = 1;

// Set once, under the GIL, by use_tensors; the types live as long as torch does.
const DlExchange* g_exchange = nullptr;
PyTypeObject* g_tensor = nullptr;
PyTypeObject* g_parameter = nullptr;
PyObject* g_requires_grad = nullptr;

// True when the tensors of this torch can be read here.
bool use_tensors(const py::object& capsule, const py::object& tensor, const py::object& parameter) {
  auto* exchange =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->version.major != kDlMajor || exchange->tensor_from_object == nullptr) return false;
  require(PyType_Check(tensor.ptr()) && PyType_Check(parameter.ptr()), "tensor types expected");
  g_tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  g_parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  g_requires_grad = PyUnicode_InternFromString("requires_grad");
  g_exchange = exchange;
  return true;
}

void set_error(void*, const char*, const char* message) {
  PyErr_SetString(PyExc_RuntimeError, message);
}

constexpr int32_t kMaxDims = 4;

// A contiguous tensor in a buffer of buffers.h, which its last owner gives back.
void delete_large(DlManaged* managed);

struct Large {
  Large(const int64_t* sizes, int32_t ndim, DlType type, void* data) {
    int64_t stride = 1;
    for (int32_t i = ndim - 1; i >= 0; i--) {
      shape[i] = sizes[i];
      strides[i] = stride;
      stride *= sizes[i];
    }
    const DlTensor tensor = {data, {kDlCpu, 0}, ndim, type, shape, strides, 0};
    managed = {{kDlMajor, 0}, this, delete_large, 0, tensor};
  }

  DlManaged managed;
  int64_t shape[kMaxDims], strides[kMaxDims];
};

void delete_large(DlManaged* managed) {
  Large* large = static_cast<Large*>(managed->context);
  return_buffer(managed->tensor.data);
  delete large;
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
  return out->device.type == kDlCpu;
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
  Large* large = nullptr;
  DlManaged* managed = nullptr;
  int64_t sizes[kMaxDims];
  std::copy(shape, shape + ndim, sizes);
  const int64_t bytes = byte_count(shape, ndim, type);
  if (bytes >= kKeptBytes) {
    large = new Large(shape, ndim, type, take_buffer(static_cast<size_t>(bytes)));
    managed = &large->managed;
  } else {
    DlTensor wanted = {nullptr, {kDlCpu, 0}, ndim, type, sizes, nullptr, 0};
    if (g_exchange->allocate(&wanted, &managed, nullptr, set_error) != 0) {
      throw py::error_already_set();
    }
  }
  *data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  void* object = nullptr;
  if (g_exchange->object_from_managed(managed, &object) != 0) {
    if (large != nullptr) delete_large(managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

void bind_tensors(py::module_& m) {
  m.def("use_tensors", &use_tensors);
  m.def("empty", &empty);
  m.def("release_buffers", &release_buffers);
  m.def("kept_bytes", &kept_bytes);
  m.def("kept_limit", &kept_limit);
  kept_limit();  // an impossible TOKFUSE_KEEP_MIB fails here, at import, not at the first call
}

}  // namespace tokfuse
