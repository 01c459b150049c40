// `deltamem_next` (step_ops.cpp) as a function of Python, in as little code as will do: in a decode step all of it is
// fetched from memory again in each layer. A library of its own, and the only one that knows Python: its limited API, so
// that it serves every Python from 3.10 on.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>

namespace {

const char* (*next)(void* rows, int64_t count, int64_t columns, int64_t dtype, void* reads, int64_t width,
                    void* residual, int64_t hidden, int64_t layer);
// Where a tensor's data begins, as torch tells the kernels that Inductor writes; throws for what is no tensor.
void* (*data_of)(PyObject* tensor);

// More rows than this run without Python's global lock: they take longer than others should wait.
constexpr int64_t kShort = 64;

PyObject* bind(PyObject*, PyObject* const* given, Py_ssize_t n) {
  if (n != 2) {
    PyErr_SetString(PyExc_TypeError, "bind: expected 2 addresses");
    return nullptr;
  }
  void *const function = PyLong_AsVoidPtr(given[0]), *const data = PyLong_AsVoidPtr(given[1]);
  if (PyErr_Occurred()) return nullptr;
  next = reinterpret_cast<decltype(next)>(function);
  data_of = reinterpret_cast<decltype(data_of)>(data);
  Py_RETURN_NONE;
}

void* address(PyObject* tensor) { return tensor == Py_None ? nullptr : data_of(tensor); }

PyObject* next_layer(PyObject*, PyObject* const* given, Py_ssize_t n) {
  if (n != 9 || next == nullptr) {
    PyErr_SetString(PyExc_TypeError, "next_layer: expected 9 arguments, and bind before");
    return nullptr;
  }
  void *rows, *reads, *residual;
  try {
    rows = address(given[0]), reads = address(given[4]), residual = address(given[6]);
  } catch (const std::exception& wrong) {
    PyErr_SetString(PyExc_TypeError, wrong.what());
    return nullptr;
  }
  const int64_t count = PyLong_AsLongLong(given[1]), columns = PyLong_AsLongLong(given[2]);
  const int64_t dtype = PyLong_AsLongLong(given[3]), width = PyLong_AsLongLong(given[5]);
  const int64_t hidden = PyLong_AsLongLong(given[7]), layer = PyLong_AsLongLong(given[8]);
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* others = count > kShort ? PyEval_SaveThread() : nullptr;
  const char* wrong = next(rows, count, columns, dtype, reads, width, residual, hidden, layer);
  if (others) PyEval_RestoreThread(others);
  if (wrong) {
    PyErr_SetString(PyExc_RuntimeError, wrong);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"bind", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(bind)), METH_FASTCALL,
     "Take the addresses of deltamem_next, and of torch's function that tells where a tensor's data begins."},
    {"next_layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(next_layer)), METH_FASTCALL,
     "Run the next layer; see deltamem_vllm.ops.direct."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__direct() { return PyModule_Create(&module); }
