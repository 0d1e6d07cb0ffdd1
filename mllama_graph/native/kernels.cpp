// Kernels of a CPU's steps: every operation of the contract (mllama_graph/model/ops.py) that a step takes.
//
// Decode steps are bound by memory: a weight or a key is read once from memory, whatever number of rows use it, and widened on
// the way where it is stored in 16 bits.
//
// Sums are formed in one order, whatever the number of rows, of threads and of the padding around them: a row's product
// has the same bits alone, in a batch and in a prompt's chunk.
//
// Built on torch's stable ABI; threads are those of torch. What operations take and return is said in __init__.py.

#include "attention.h"
#include "linear.h"
#include "rows.h"
#include "tiles.h"

STABLE_TORCH_LIBRARY_IMPL(mllama_graph, CPU, library) {
  library.impl("lay_out_", TORCH_BOX(&lay_out_));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("attend_pages", TORCH_BOX(&attend_pages));
  library.impl("attend_prompt", TORCH_BOX(&attend_prompt));
  library.impl("attend_tiles", TORCH_BOX(&attend_tiles));
  library.impl("attend_image", TORCH_BOX(&attend_image));
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("layer_norm", TORCH_BOX(&layer_norm));
  library.impl("rope_angles", TORCH_BOX(&rope_angles));
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("gelu", TORCH_BOX(&gelu));
  library.impl("swiglu", TORCH_BOX(&swiglu));
  library.impl("gated", TORCH_BOX(&gated));
  library.impl("add_gated", TORCH_BOX(&add_gated));
  library.impl("embed", TORCH_BOX(&embed));
  library.impl("take_row", TORCH_BOX(&take_row));
  library.impl("normalise", TORCH_BOX(&normalise));
  library.impl("patch_embed", TORCH_BOX(&patch_embed));
  library.impl("add_tile_embedding", TORCH_BOX(&add_tile_embedding));
  library.impl("add_positions", TORCH_BOX(&add_positions));
  library.impl("pad_rows", TORCH_BOX(&pad_rows));
  library.impl("join_features", TORCH_BOX(&join_features));
  library.impl("write_pages_", TORCH_BOX(&write_pages_));
}
