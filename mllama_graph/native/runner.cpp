// Runs ahead-of-time packages through the dispatcher, which releases the GIL during the call.
//
// None of torch's own Python classes does (AOTIModelPackageLoader.run and boxed_run, AOTIModelContainerRunnerCpu.run):
// they hold the GIL until the package returns. A package that waits for a gloo collective then never returns if gloo's
// thread needs the GIL to release a tensor, and no other Python thread of the process runs meanwhile.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace {

using Package = torch::inductor::AOTIModelPackageLoader;

std::mutex lock;
std::unordered_map<int64_t, std::shared_ptr<Package>> packages;
int64_t last_handle = 0;

std::shared_ptr<Package> find(int64_t handle) {
  std::lock_guard<std::mutex> guard(lock);
  const auto found = packages.find(handle);
  TORCH_CHECK(found != packages.end(), "no package is loaded under handle ", handle);
  return found->second;
}

// device_index is -1 for the CPU and for a package's own device.
int64_t load_package(const std::string& path, int64_t device_index) {
  auto package = std::make_shared<Package>(path, "model", /*run_single_threaded=*/false, /*num_runners=*/1,
                                           static_cast<c10::DeviceIndex>(device_index));
  std::lock_guard<std::mutex> guard(lock);
  packages.emplace(++last_handle, std::move(package));
  return last_handle;
}

// The memory is freed when the last run in progress returns.
void unload_package(int64_t handle) {
  find(handle);
  std::lock_guard<std::mutex> guard(lock);
  packages.erase(handle);
}

std::vector<std::string> constant_names(int64_t handle) { return find(handle)->get_constant_fqns(); }

// Binds all constants of a package to the caller's tensors, whose memory is used without a copy.
void load_constants(int64_t handle, const std::vector<std::string>& names, const std::vector<at::Tensor>& values) {
  TORCH_CHECK(names.size() == values.size(), names.size(), " names of constants, but ", values.size(), " tensors");
  std::unordered_map<std::string, at::Tensor> constants;
  for (size_t i = 0; i < names.size(); i++) constants.emplace(names[i], values[i]);
  find(handle)->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
}

// The inputs are returned beside the outputs. Where a tensor has a Python object, torch takes the GIL to drop the last
// other reference to it: the package would wait for it in the middle of its run, when it has used an input up. The
// caller has the GIL when it drops these.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> run_package(int64_t handle,
                                                                         std::vector<at::Tensor> inputs) {
  std::vector<at::Tensor> held = inputs;
  return {find(handle)->boxed_run(std::move(inputs)), std::move(held)};
}

}  // namespace

// One implementation for all devices: a call reaches the package as it would from Python.
TORCH_LIBRARY_FRAGMENT(mllama_graph, library) {
  library.def("load_package(str path, int device_index) -> int", &load_package);
  library.def("unload_package(int handle) -> ()", &unload_package);
  library.def("constant_names(int handle) -> str[]", &constant_names);
  library.def("load_constants(int handle, str[] names, Tensor[] values) -> ()", &load_constants);
  // Inputs may be written, as pages are.
  library.def("run_package(int handle, Tensor(a!)[] inputs) -> (Tensor[], Tensor[])", &run_package);
}
