// What a Model of the public API is made of.
#pragma once

#include "api/session.h"
#include "cache/cache.h"
#include "engine/runner.h"
#include "mlxlm/mlxlm.h"

namespace mlxlm {

struct Model::Impl {
  Session session;
};

struct PromptCache::Impl {
  cache::Caches caches;  // empty = of nothing
};

engine::Sampling to_sampling(const GenerateOptions& options, const text::Tokenizer& tokenizer);

/** The draft model of the options, or null. Throws Error(bad_request) when its tokens are others. */
model::CausalModel* draft_model_of(const GenerateOptions& options, const Session& session);

}  // namespace mlxlm
