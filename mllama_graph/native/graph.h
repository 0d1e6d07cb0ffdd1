// Prefix of the code that Inductor generates for a graph whose nodes only call operators or view tensors: the handles
// and checks that this code uses, and the functions by which torch's package loader finds, binds and runs the graph.
//
// The functions of torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h) are declared here, and those of a
// package (torch/csrc/inductor/aoti_runtime/interface.h) are defined here, because torch's own headers and runtime
// would take 7 of the 8 seconds in which a graph is compiled. Weights always belong to the caller, and no constants are
// folded.

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

extern "C" {
struct AtenTensorOpaque;
struct AOTIProxyExecutorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using AOTIProxyExecutorHandle = AOTIProxyExecutorOpaque*;

int32_t aoti_torch_new_uninitialized_tensor(AtenTensorHandle*);
int32_t aoti_torch_new_tensor_handle(AtenTensorHandle, AtenTensorHandle*);
int32_t aoti_torch_delete_tensor_object(AtenTensorHandle);
int32_t aoti_torch__reinterpret_tensor(AtenTensorHandle, int64_t, const int64_t*, const int64_t*, int64_t,
                                       AtenTensorHandle*);
int32_t aoti_torch_proxy_executor_call_function(AOTIProxyExecutorHandle, int, int, int64_t*, int, AtenTensorHandle*);
bool aoti_torch_grad_mode_is_enabled();
void aoti_torch_grad_mode_set_enabled(bool);
}

#define AOTI_TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != 0) torch::aot_inductor::fail(#call " failed");

namespace torch::aot_inductor {

[[noreturn]] inline void fail(const char* text) { throw std::runtime_error(text); }

// Owns a tensor handle, which it deletes at the end of its scope.
class RAIIAtenTensorHandle {
 public:
  RAIIAtenTensorHandle(AtenTensorHandle handle) : handle_(handle) {}
  RAIIAtenTensorHandle(RAIIAtenTensorHandle&& other) : handle_(other.release()) {}
  ~RAIIAtenTensorHandle() { reset(); }
  void reset() {
    if (handle_) aoti_torch_delete_tensor_object(release());
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  operator AtenTensorHandle() const { return handle_; }

 private:
  AtenTensorHandle handle_;
};

using Tensors = std::vector<RAIIAtenTensorHandle>;

inline Tensors steal_from_raw_handles_to_raii_handles(AtenTensorHandle* handles, size_t count) {
  return Tensors(handles, handles + count);
}

inline RAIIAtenTensorHandle reinterpret_tensor_wrapper(AtenTensorHandle x, int64_t dims, const int64_t* sizes,
                                                       const int64_t* strides, int64_t offset) {
  AtenTensorHandle view;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x, dims, sizes, strides, offset, &view));
  return view;
}

template <class T>
T&& wrap_with_raii_handle_if_needed(T&& x) {
  return static_cast<T&&>(x);
}

// A weight: its name in the graph, and in the model.
struct Constant {
  const char *name, *original;
};

// The graph object of the loader. Its static members are defined after the code that Inductor generates.
struct Graph {
  static const size_t outputs;
  static const std::vector<Constant> constants;
  Tensors bound;
  const Tensors* constants_ = &bound;

  void run_impl(AtenTensorHandle* input_handles, AtenTensorHandle* output_handles,
                AOTIProxyExecutorHandle proxy_executor);

  void bind(const std::unordered_map<std::string, AtenTensorHandle>& given) {
    Tensors tensors;
    for (const Constant& constant : constants) {
      const auto found = given.find(constant.name);
      if (found == given.end()) throw std::runtime_error(std::string("no weight is given for ") + constant.original);
      AtenTensorHandle own;
      AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(found->second, &own));
      tensors.emplace_back(own);
    }
    bound.swap(tensors);
  }
};

struct NoGrad {
  const bool before = aoti_torch_grad_mode_is_enabled();
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before); }
};

static thread_local std::string last_error;

// Returns 0, or 1 if f throws.
template <class F>
int32_t attempt(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace torch::aot_inductor

#define PACKAGE_FUNCTION(name, ...) extern "C" [[gnu::visibility("default")]] int32_t AOTInductor##name(__VA_ARGS__)
#define PACKAGE_FUNCTION_REFUSED(name)                                                                   \
  PACKAGE_FUNCTION(name) {                                                                               \
    torch::aot_inductor::last_error = #name ": this package only binds weights that stay the caller's"; \
    return 1;                                                                                            \
  }

using torch::aot_inductor::attempt;
using torch::aot_inductor::Graph;

PACKAGE_FUNCTION(ModelContainerCreateWithDevice, Graph** graph, size_t, const char*, const char*) {
  return attempt([=] { *graph = new Graph; });
}
PACKAGE_FUNCTION(ModelContainerDelete, Graph* graph) {
  delete graph;
  return 0;
}
PACKAGE_FUNCTION(ModelContainerRun, Graph* graph, AtenTensorHandle* inputs, size_t, AtenTensorHandle* outputs, size_t,
                 void*, AOTIProxyExecutorHandle executor) {
  return attempt([=] {
    const torch::aot_inductor::NoGrad guard;
    graph->run_impl(inputs, outputs, executor);
  });
}
PACKAGE_FUNCTION(ModelContainerRunSingleThreaded, Graph* graph, AtenTensorHandle* inputs, size_t given,
                 AtenTensorHandle* outputs, size_t wanted, void* stream, AOTIProxyExecutorHandle executor) {
  return AOTInductorModelContainerRun(graph, inputs, given, outputs, wanted, stream, executor);
}
PACKAGE_FUNCTION(ModelContainerGetNumOutputs, Graph*, size_t* count) {
  *count = Graph::outputs;
  return 0;
}
PACKAGE_FUNCTION(ModelContainerGetNumConstants, Graph*, size_t* count) {
  *count = Graph::constants.size();
  return 0;
}
PACKAGE_FUNCTION(ModelContainerGetConstantName, Graph*, size_t i, const char** name) {
  return attempt([=] { *name = Graph::constants.at(i).name; });
}
PACKAGE_FUNCTION(ModelContainerGetConstantOriginalFQN, Graph*, size_t i, const char** name) {
  return attempt([=] { *name = Graph::constants.at(i).original; });
}
PACKAGE_FUNCTION(ModelContainerUpdateUserManagedConstantBuffer, Graph* graph,
                 const std::unordered_map<std::string, AtenTensorHandle>* tensors, bool, bool) {
  return attempt([=] { graph->bind(*tensors); });
}
PACKAGE_FUNCTION(ModelContainerGetCallSpec, Graph*, const char** in, const char** out) {
  *in = *out = "";
  return 0;
}
PACKAGE_FUNCTION(GetLastError, const char** text) {
  *text = torch::aot_inductor::last_error.c_str();
  return 0;
}
PACKAGE_FUNCTION_REFUSED(ModelContainerGetConstantDtype)
PACKAGE_FUNCTION_REFUSED(ModelContainerExtractConstantsMap)
PACKAGE_FUNCTION_REFUSED(ModelContainerUpdateConstantBuffer)
PACKAGE_FUNCTION_REFUSED(ModelContainerUpdateConstantBufferFromCpu)
PACKAGE_FUNCTION_REFUSED(ModelContainerUpdateInactiveConstantBuffer)
PACKAGE_FUNCTION_REFUSED(ModelContainerRunConstantFolding)
PACKAGE_FUNCTION_REFUSED(ModelContainerSwapConstantBuffer)
PACKAGE_FUNCTION_REFUSED(ModelContainerFreeInactiveConstantBuffer)
PACKAGE_FUNCTION_REFUSED(ModelContainerGetConstantsBlobSize)
PACKAGE_FUNCTION_REFUSED(ModelUpdateConstantsFromBlob)
