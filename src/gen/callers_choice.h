// Tokens chosen with functions of the caller (engine::Sampling), which work on the host and on one token after the other.
#pragma once

#include <functional>
#include <optional>

#include "engine/runner.h"
#include "sample/sample.h"

namespace mlxlm::gen {

namespace mx = mlx::core;

struct CallersChoice {
  sample::Verdict verdict{};
  std::optional<mx::array> logprobs{};  // float32 [accepted + 1, V], when wanted
};

/** logits [k+1, V] of a row with a draft of k tokens, which stands as far as the functions choose the same. `masked`: logits [1, V] -> the
 * same. Throws what the functions throw; Error(bad_request) for a token that does not exist. */
CallersChoice choose_by_caller(const engine::PlannedRow& row, const engine::Sampling& sampling, const sample::ProcessorOptions& penalties,
                               sample::Sampler& sampler, const std::function<mx::array(const mx::array&)>& masked, const mx::array& logits,
                               bool wants_logprobs);

}  // namespace mlxlm::gen
