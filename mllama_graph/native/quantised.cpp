// CPU kernels of linear layers with quantised weights: a library of its own, built by runs that have such layers.

#include "coded.h"
#include "codes_to_panels.h"
#include "integers.h"
#include "rounding.h"

namespace {

// `lay_codes` of codes_to_panels.h, with a layout by its number.
void lay_codes_(Tensor weight, int64_t at, Tensor stored, int64_t layout, std::optional<Tensor> order, bool whole) {
  lay_codes(weight, at, stored, static_cast<Stored>(layout), order, in_words(weight.scalar_type(), whole));
}

// y = x w' + bias: x (..., I) fp32; w in panels of words: int8, E4M3, or two codes of 4 bits in each byte, which index
// `table` or else count from -8; scale and shift (O, G) in panels. order: the input of each column of w.
Tensor linear_coded(Tensor given, Tensor weight, Tensor scale, std::optional<Tensor> shift, std::optional<Tensor> order,
                    std::optional<Tensor> table, std::optional<Tensor> bias, std::optional<Tensor> real) {
  const Tensor x = packed(given);
  const bool halves = weight.scalar_type() == ScalarType::Byte;
  const int64_t inputs = x.size(x.dim() - 1), outputs = weight.size(0), groups = scale.size(1);
  const int64_t rows = inputs ? x.numel() / inputs : 0, some = real_of(rows, real);
  if (x.scalar_type() != ScalarType::Float || weight.dim() != 2 || !weight.is_contiguous() ||
      weight.size(1) * (halves ? 2 : 1) != inputs || scale.size(0) != outputs || !groups || inputs % groups ||
      (halves && inputs / groups % Table::kInputs))
    fail("linear_coded takes x (..., I) in float32, a contiguous weight of codes (O, I) and scales (O, G)");
  const ScalarType kind = weight.scalar_type();
  if (!halves && kind != ScalarType::Char && kind != ScalarType::Float8_e4m3fn)
    fail("linear_coded takes weights of int8, float8_e4m3fn and uint8");
  Tensor y = allocated_rows(x, outputs, some);
  const float* from = floats(x);
  std::vector<float> sorted, sums;
  if (order) {
    sorted = sorted_rows(from, some, inputs, integers(*order));
    from = sorted.data();
  }
  const float *scales = floats(scale), *shifts = shift ? floats(*shift) : nullptr;
  if (in_whole_numbers(kind, table.has_value())) {
    const WholeWeight w{static_cast<const uint32_t*>(weight.const_data_ptr()), scales, shifts, inputs, outputs,
                        inputs / groups};
    const auto run = [&]<class C, int P>() {
      whole_of<C, P>(whole_rows<C, P>(from, some, inputs, block_of(w.group), nullptr, 0), w, results(y), some);
    };
    const bool bytes = kind == ScalarType::Char;
    if constexpr (kPairs) bytes ? run.operator()<BytePairs, 1>() : run.operator()<HalfbytePairs, 1>();
    else bytes ? run.operator()<ByteCodes, 2>() : run.operator()<HalfbyteCodes, 2>();
    add_bias(results(y), bias, some);
    return y;
  }
  if (shift) sums = group_sums(from, some, inputs, inputs / groups);
  const auto run = [&](const auto& decoder) {
    using Word = typename std::decay_t<decltype(decoder)>::Word;
    const Coded<Word> w{static_cast<const Word*>(weight.const_data_ptr()), scales, shifts, inputs, outputs,
                        inputs / groups};
    coded_of(decoder, from, w, sums.data(), results(y), some);
  };
  if (kind == ScalarType::Float8_e4m3fn) {
    run(Fp8{});
  } else if (table) {
    run(Table(floats(*table)));
  } else if constexpr (!kFastBytes && !kPairs) {
    kind == ScalarType::Char ? run(Int8{}) : run(Int4{});
  }
  add_bias(results(y), bias, some);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama_graph, CPU, library) {
  library.impl("lay_codes_", &boxed<lay_codes_>);
  library.impl("lay_rounded_", &boxed<lay_rounded_>);
  library.impl("sum_codes", &boxed<sum_codes>);
  library.impl("unnested", &boxed<unnested>);
  library.impl("linear_coded", &boxed<linear_coded>);
  library.impl("linear_integers", &boxed<linear_integers>);
}
