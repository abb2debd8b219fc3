#include "bindings/tensors.h"

#include "bindings/bind.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
  int64_t sizes[4];
  int32_t ndim = 0;
  for (int64_t size : shape) sizes[ndim++] = size;
  DlTensor wanted = {nullptr, {kDlCpu, 0}, ndim, type, sizes, nullptr, 0};
  DlManaged* managed = nullptr;
  void* object = nullptr;
  if (g_exchange->allocate(&wanted, &managed, nullptr, set_error) != 0) {
    throw py::error_already_set();
  }
  *data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  if (g_exchange->object_from_managed(managed, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

// The first write to a fresh buffer then faults 512 times less often: touching 100 MB of 4 KiB
// pages costs more than the kernel that fills it.
void advise_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (bytes > 0 && end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)address, (void)bytes;
#endif
}

void bind_tensors(py::module_& m) {
  m.def("use_tensors", &use_tensors);
  m.def("advise_huge_pages", &advise_huge_pages);
}

}  // namespace tokfuse
