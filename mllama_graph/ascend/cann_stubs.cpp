// CANN entry points whose behaviour matters on a machine without an NPU; stubs.py adds no-ops for the rest.
//
// Signatures follow CANN's headers (acl/acl_rt.h, acl/acl_op_compiler.h, ge/ge_api.h, graph/ascend_string.h). Device
// memory is host memory, streams and events are handles that are always ready, and 0 is success everywhere.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

namespace {

constexpr int kSuccess = 0;
// The status of an eager operation on an NPU tensor, so that it raises instead of returning garbage.
constexpr int kNoKernels = 500001;
constexpr size_t kAlignment = 512;
constexpr size_t kMemory = size_t{64} << 30;

thread_local int32_t current_device = 0;

int allocate(void** pointer, size_t bytes) { return posix_memalign(pointer, kAlignment, bytes ? bytes : 1); }

// Streams and events are only compared and destroyed.
int handle(void** pointer) {
  *pointer = std::malloc(64);
  return kSuccess;
}

int copy(void* to, const void* from, size_t bytes) {
  std::memmove(to, from, bytes);
  return kSuccess;
}

int fill(void* to, int32_t value, size_t bytes) {
  std::memset(to, value, bytes);
  return kSuccess;
}

}  // namespace

extern "C" {

// ---- one device

int aclrtGetDeviceCount(uint32_t* count) { *count = 1; return kSuccess; }
int aclrtSetDevice(int32_t device) { current_device = device; return kSuccess; }
int aclrtGetDevice(int32_t* device) { *device = current_device; return kSuccess; }
int aclrtGetCurrentContext(void** context) {
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(current_device + 1));
  return kSuccess;
}
int aclrtSetCurrentContext(void*) { return kSuccess; }
int aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) { *can = 1; return kSuccess; }
// torch_npu selects converters and checks by chip: an Atlas A2 (910B) unless MLLAMA_STUB_SOC names another.
const char* aclrtGetSocName() {
  const char* name = std::getenv("MLLAMA_STUB_SOC");
  return name ? name : "Ascend910B3";
}
int aclrtGetMemInfo(int, size_t* free, size_t* total) { *free = *total = kMemory; return kSuccess; }

// ---- versions: torchair lowers some operations by CANN's version. It is the newest release that was read for the
// rules, unless MLLAMA_STUB_CANN names another. The driver has none.

// enum aclCANNPackageName
constexpr int kDriver = 7;
const char* stated_version() {
  const char* version = std::getenv("MLLAMA_STUB_CANN");
  return version ? version : "9.1.0";
}
// struct aclCANNPackageVersion begins with the version, as text of at most 128 characters.
int aclsysGetCANNVersion(int package, char* version) {
  std::strncpy(version, package == kDriver ? "" : stated_version(), 127);
  return kSuccess;
}
int aclsysGetVersionStr(const char*, char* version) {
  std::strncpy(version, stated_version(), 127);
  return kSuccess;
}

// ---- device memory is host memory

int aclrtMalloc(void** pointer, size_t bytes, int) { return allocate(pointer, bytes); }
int aclrtMallocAlign32(void** pointer, size_t bytes, int) { return allocate(pointer, bytes); }
int aclrtMallocHost(void** pointer, size_t bytes) { return allocate(pointer, bytes); }
int aclrtFree(void* pointer) { std::free(pointer); return kSuccess; }
int aclrtFreeHost(void* pointer) { std::free(pointer); return kSuccess; }
int aclrtMemcpy(void* to, size_t, const void* from, size_t bytes, int) { return copy(to, from, bytes); }
int aclrtMemcpyAsync(void* to, size_t, const void* from, size_t bytes, int, void*) { return copy(to, from, bytes); }
int aclrtMemset(void* to, size_t, int32_t value, size_t bytes) { return fill(to, value, bytes); }
int aclrtMemsetAsync(void* to, size_t, int32_t value, size_t bytes, void*) { return fill(to, value, bytes); }

// ---- streams and events are always ready

int aclrtCreateStream(void** stream) { return handle(stream); }
int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) { return handle(stream); }
int aclrtCreateEvent(void** event) { return handle(event); }
int aclrtCreateEventWithFlag(void** event, uint32_t) { return handle(event); }
int aclrtCreateEventExWithFlag(void** event, uint32_t) { return handle(event); }
int aclrtStreamQuery(void*, int* ready) { *ready = 1; return kSuccess; }
int aclrtQueryEventStatus(void*, int* ready) { *ready = 1; return kSuccess; }
int aclrtQueryEventWaitStatus(void*, int* ready) { *ready = 1; return kSuccess; }
int aclrtEventElapsedTime(float* milliseconds, void*, void*) { *milliseconds = 0; return kSuccess; }

// ---- there are no kernels

int aclopCompileAndExecute() { return kNoKernels; }
int aclopCompileAndExecuteV2() { return kNoKernels; }
int aclopExecuteV2() { return kNoKernels; }
const char* aclGetRecentErrMsg() { return "CANN is a stub here: it has no kernels for eager operations"; }
const char* aclrtGetErrorVerbose() { return ""; }
size_t aclGetCompileoptSize(int) { return 256; }
int aclGetCompileopt(int, char* value, size_t) { value[0] = 0; return kSuccess; }

}  // extern "C"

// ---- the graph engine (GE): strings and options, which it receives before any graph

namespace ge {

class AscendString {
 public:
  AscendString(const char* text);
  const char* GetString() const;
  bool operator<(const AscendString& other) const;
  bool operator==(const AscendString& other) const;

 private:
  std::shared_ptr<std::string> text_;
};

AscendString::AscendString(const char* text) : text_(text ? new std::string(text) : nullptr) {}
const char* AscendString::GetString() const { return text_ ? text_->c_str() : ""; }
bool AscendString::operator<(const AscendString& other) const {
  return std::strcmp(GetString(), other.GetString()) < 0;
}
bool AscendString::operator==(const AscendString& other) const {
  return std::strcmp(GetString(), other.GetString()) == 0;
}

uint32_t GEInitialize(const std::map<AscendString, AscendString>&) { return kSuccess; }
uint32_t GEFinalize() { return kSuccess; }
AscendString GEGetWarningMsgV2() { return AscendString(""); }

}  // namespace ge
