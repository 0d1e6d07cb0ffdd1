// CPU kernels: all operations of Ops (mllama_graph/model/ops.py) that a step uses.
//
// Decode steps are memory-bound: a weight is read from memory once, whatever the number of rows, and a key once for all
// query heads that share it. Weights and pages stored in fewer bits are widened in registers or, for many rows, in L1.
//
// The order of summation depends neither on the number of rows nor on threads or padding: a row's result is bitwise
// identical alone, in a batch and in a prompt's chunk.
//
// Built on torch's stable ABI, with threads of their own (parallel.h). operators.py declares what the operators take
// and return.

#include "attention.h"
#include "linear.h"
#include "pages.h"
#include "rows.h"
#include "tiles.h"

STABLE_TORCH_LIBRARY_IMPL(mllama_graph, CPU, library) {
  library.impl("lay_rows_", &boxed<lay_rows_>);
  library.impl("linear", &boxed<linear>);
  library.impl("attend_pages", &boxed<attend_pages>);
  library.impl("attend_prompt", &boxed<attend_prompt>);
  library.impl("attend_tiles", &boxed<attend_tiles>);
  library.impl("attend_image", &boxed<attend_image>);
  library.impl("rms_norm", &boxed<rms_norm>);
  library.impl("add_rms_norm", &boxed<add_rms_norm>);
  library.impl("layer_norm", &boxed<layer_norm>);
  library.impl("rope_angles", &boxed<rope_angles>);
  library.impl("rope", &boxed<rope>);
  library.impl("gelu", &boxed<gelu>);
  library.impl("swiglu", &boxed<swiglu>);
  library.impl("gated", &boxed<gated>);
  library.impl("add_gated", &boxed<add_gated>);
  library.impl("embed", &boxed<embed>);
  library.impl("take_rows", &boxed<take_rows>);
  library.impl("normalise", &boxed<normalise>);
  library.impl("patch_embed", &boxed<patch_embed>);
  library.impl("add_tile_embedding", &boxed<add_tile_embedding>);
  library.impl("add_positions", &boxed<add_positions>);
  library.impl("pad_rows", &boxed<pad_rows>);
  library.impl("join_features", &boxed<join_features>);
  library.impl("write_pages_", &boxed<write_pages_>);
}
