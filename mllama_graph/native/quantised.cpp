// CPU kernels of linear layers with quantised weights: a library of its own, built by runs that have such layers.

#include "coded.h"
#include "integers.h"

namespace {

// Converts the rows of a tensor (O, ...) to the panels of linear.h, in place, in words of `bytes` bytes.
void lay_out_words_(Tensor tensor, int64_t bytes) {
  const int64_t outputs = tensor.size(0), size = tensor.numel() / std::max<int64_t>(1, outputs) * tensor.element_size();
  if (!tensor.is_contiguous() || size % bytes) fail("lay_out_words_ takes contiguous rows of whole words");
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  bytes == 1 ? lay_out_rows<uint8_t>(data, outputs, size) : lay_out_rows<uint32_t>(data, outputs, size / 4);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama_graph, CPU, library) {
  library.impl("lay_out_words_", &boxed<lay_out_words_>);
  library.impl("linear_coded", &boxed<linear_coded>);
  library.impl("linear_integers", &boxed<linear_integers>);
}
