// The fused executor: a whole step as one primitive over the packed weights of a graph model.
#pragma once

#include <memory>

#include "model/blocks.h"
#include "model/causal_model.h"

namespace mlxlm::model {

/** What the fused executor takes over from a graph model: the weights are shared, not copied. */
struct FusedParts {
  Store::Made made;
  mx::Dtype dtype;
  std::shared_ptr<nn::Linear> embed, head;
};

/** The fused executor where every op of the description has kernels; else `graph` itself. Calls that the kernels cannot serve (a quantized
 *  cache) go to the graph model. */
std::unique_ptr<CausalModel> fuse(std::unique_ptr<CausalModel> graph, FusedParts parts);

}  // namespace mlxlm::model
