// What a Model of the public API is made of.
#pragma once

#include "api/session.h"
#include "cache/cache.h"
#include "engine/runner.h"
#include "gen/batch.h"
#include "mlxlm/batch_generator.h"
#include "mlxlm/mlxlm.h"

namespace mlxlm {

struct Model::Impl {
  Session session;
};

struct PromptCache::Impl {
  cache::Caches caches;  // empty = of nothing
};

engine::Sampling to_sampling(const GenerateOptions& options, const text::Tokenizer& tokenizer);

engine::Drafts drafts_of(const GenerateOptions& options);
BatchStats to_stats(const gen::BatchGenerator::Stats& stats);
PromptCache to_prompt_cache(cache::Caches caches);

/** The draft model of the options, or null. Throws Error(bad_request) when its tokens are others. */
model::CausalModel* draft_model_of(const GenerateOptions& options, const Session& session);

}  // namespace mlxlm
