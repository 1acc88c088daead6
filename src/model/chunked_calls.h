// Calls that cross the end of a chunk of chunked attention become several.
#pragma once

#include <vector>

#include "arch/model.h"
#include "model/causal_model.h"

namespace mlxlm::model {

/** A token of chunked attention sees its own chunk only, so a call of whole tokens of one chunk needs no mask beside the causal one. */
class ChunkedCalls {
 public:
  explicit ChunkedCalls(const arch::Model& model);
  /** Whether run() must take these segments apart. */
  bool cross(const std::vector<Segment>& segments) const;
  /** As model.run(tokens, segments), in calls that do not cross. Segments without caches get some for the time being. */
  mx::array run(CausalModel& model, const mx::array& tokens, const std::vector<Segment>& segments) const;

 private:
  /** Tokens until the next end of a chunk, of a sequence that has seen `offset`. */
  int room(int offset) const;
  std::vector<int> sizes_;  // of chunks, in tokens
  int cache_ = -1;          // one that knows how much was seen
};

}  // namespace mlxlm::model
