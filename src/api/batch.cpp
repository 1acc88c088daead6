// batch_generate of the public C++ API.
#include "mlxlm/batch_generate.h"

#include "api/impl.h"
#include "base/error.h"

namespace mlxlm {

namespace {

gen::BatchItem to_item(const BatchPrompt& p, const text::Tokenizer& tokenizer, bool want_logprobs) {
  const auto& o = p.options;
  const auto* caches = o.prompt_cache != nullptr ? &o.prompt_cache->impl().caches : nullptr;
  const bool continues = caches != nullptr && !caches->empty();
  const auto encoded = [&] { return continues ? tokenizer.encode(p.prompt, false) : encode_prompt(tokenizer, p.prompt); };
  gen::BatchItem item{.prompt = p.tokens.empty() ? encoded() : p.tokens,
                      .max_tokens = o.max_tokens,
                      .sampling = to_sampling(o, tokenizer),
                      .stop = o.stop,
                      .max_kv_size_tokens = o.max_kv_size,
                      .kv_quantization = {.bits = o.kv_bits, .group_size = o.kv_group_size, .start_tokens = o.quantized_kv_start},
                      .drafts = drafts_of(o),
                      .caches = caches};
  item.sampling.want_logprob = want_logprobs;
  return item;
}

BatchResult to_public(const gen::BatchAnswer& a) {
  return {.text = a.text,
          .tokens = a.tokens,
          .logprobs = a.logprobs,
          .finish_reason = a.finish == gen::Finish::none ? "error" : gen::finish_name(a.finish),
          .error = a.error ? a.error->what() : "",
          .prompt_tokens = a.prompt_tokens,
          .generation_tokens = a.generation_tokens,
          .accepted_tokens = a.accepted_tokens};
}

model::CausalModel* draft_model_of_all(const std::vector<BatchPrompt>& prompts, const Session& session) {
  const Model* found = nullptr;
  model::CausalModel* model = nullptr;
  for (const auto& p : prompts) {
    if (p.options.draft_model == nullptr || p.options.draft_model == found) continue;
    if (found != nullptr) throw Error(Code::bad_request, "draft_model", "wanted the same one for all prompts of a batch");
    found = p.options.draft_model;
    model = draft_model_of(p.options, session);
  }
  return model;
}

}  // namespace

std::vector<BatchResult> batch_generate(Model& model, const std::vector<BatchPrompt>& prompts, const BatchOptions& options,
                                        BatchStats* stats) {
  auto& session = model.impl().session;
  std::vector<gen::BatchItem> items;
  for (const auto& p : prompts) items.push_back(to_item(p, session.tokenizer, options.want_logprobs));
  gen::BatchRun run{
      .limits = gen::default_limits(options.max_sequences), .cancel = options.cancel, .keep_caches = options.return_prompt_caches};
  run.limits.prefill_tokens = options.prefill_step_size;
  run.on_text = options.on_text;
  run.draft_model = draft_model_of_all(prompts, session);
  if (options.on_result) run.on_answer = [&](std::size_t i, const gen::BatchAnswer& a) { options.on_result(i, to_public(a)); };
  gen::BatchGenerator::Stats measured;
  std::vector<BatchResult> results;
  for (auto& a : gen::batch_generate(*session.loaded.model, session.tokenizer, items, run, &measured)) {
    results.push_back(to_public(a));
    if (!a.caches.empty()) results.back().prompt_cache = to_prompt_cache(std::move(a.caches));
  }
  if (stats) *stats = to_stats(measured);
  return results;
}

std::vector<BatchResult> batch_generate(Model& model, const std::vector<std::string>& prompts, const GenerateOptions& each,
                                        const BatchOptions& options, BatchStats* stats) {
  std::vector<BatchPrompt> all;
  for (const auto& prompt : prompts) all.push_back({prompt, each});
  return batch_generate(model, all, options, stats);
}

}  // namespace mlxlm
