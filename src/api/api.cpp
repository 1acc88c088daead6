// The public C++ API over the rooms.
#include "mlxlm/mlxlm.h"

#include "api/impl.h"
#include "base/error.h"
#include "cache/prompt_file.h"
#include "gen/generate.h"
#include "gen/memory.h"
#include "gen/runner.h"
#include "gen/speculative.h"

namespace mlxlm {

namespace {

gen::Options to_options(const GenerateOptions& o, const text::Tokenizer& tokenizer) {
  gen::Options options;
  options.max_tokens = o.max_tokens;
  const auto sampling = to_sampling(o, tokenizer);
  options.sampler = gen::sampler_options(sampling);
  options.processors = gen::processor_options(sampling);
  options.max_kv_size_tokens = o.max_kv_size;
  options.prefill_step_tokens = o.prefill_step_size;
  options.stop = o.stop;
  options.kv_quantization = {.bits = o.kv_bits, .group_size = o.kv_group_size, .start_tokens = o.quantized_kv_start};
  options.draft_tokens = o.num_draft_tokens;
  options.ngram_draft_tokens = o.ngram_draft_tokens;
  return options;
}

GenerationResponse to_public(const gen::Response& r) {
  return {.text = r.text,
          .token = r.token,
          .logprob = r.logprob,
          .prompt_tokens = r.prompt_tokens,
          .generation_tokens = r.generation_tokens,
          .drafted_tokens = r.drafted_tokens,
          .accepted_tokens = r.accepted_tokens,
          .from_draft = r.from_draft,
          .prompt_tps = r.prompt_tokens_per_s,
          .generation_tps = r.generation_tokens_per_s,
          .peak_memory_gb = r.peak_memory_gb,
          .finish_reason = gen::finish_name(r.finish)};
}

gen::Response run(Model& model, const std::string& prompt, const GenerateOptions& options, bool want_logprob,
                  const std::function<bool(const gen::Response&)>& on_response) {
  auto& session = model.impl().session;
  auto full = to_options(options, session.tokenizer);
  full.want_logprob = want_logprob;
  full.draft_model = draft_model_of(options, session);
  auto* cache = options.prompt_cache != nullptr ? &options.prompt_cache->impl().caches : nullptr;
  // What a prompt continues has its special tokens already.
  const bool continues = cache != nullptr && !cache->empty();
  const auto tokens = continues ? session.tokenizer.encode(prompt, false) : encode_prompt(session.tokenizer, prompt);
  if (continues) cache::check_prompt_quantization(*cache, options.kv_bits, options.kv_bits > 0 ? options.kv_group_size : 0);
  return gen::stream_generate(*session.loaded.model, session.tokenizer, tokens, full, on_response, cache);
}

}  // namespace

engine::Sampling to_sampling(const GenerateOptions& o, const text::Tokenizer& tokenizer) {
  return {.temperature = o.temperature,
          .top_p = o.top_p,
          .min_p = o.min_p,
          .min_tokens_to_keep = o.min_tokens_to_keep,
          .top_k = o.top_k,
          .xtc_probability = o.xtc_probability,
          .xtc_threshold = o.xtc_threshold,
          .xtc_special_tokens = o.xtc_probability > 0.f ? xtc_special_tokens(tokenizer) : std::vector<int>{},
          .seed = o.seed,
          .logit_bias = o.logit_bias,
          .repetition_penalty = o.repetition_penalty,
          .presence_penalty = o.presence_penalty,
          .frequency_penalty = o.frequency_penalty,
          .repetition_context_size = o.repetition_context_size,
          .presence_context_size = o.presence_context_size,
          .frequency_context_size = o.frequency_context_size};
}

model::CausalModel* draft_model_of(const GenerateOptions& options, const Session& session) {
  if (options.draft_model == nullptr) return nullptr;
  const auto& draft = options.draft_model->impl().session;
  gen::check_same_vocabulary(session.tokenizer, draft.tokenizer);
  return draft.loaded.model.get();
}

PromptCache::PromptCache() : impl_(std::make_unique<Impl>()) {}
PromptCache::PromptCache(PromptCache&&) noexcept = default;
PromptCache& PromptCache::operator=(PromptCache&&) noexcept = default;
PromptCache::~PromptCache() = default;

PromptCache PromptCache::load(const Model& model, const std::string& file) {
  std::error_code none;
  const auto size = std::filesystem::file_size(file, none);
  if (none) throw Error(Code::not_found, file, "could not be opened");
  gen::check_available_for(file, static_cast<int64_t>(size));
  PromptCache made;
  made.impl_->caches = cache::load_prompt_file(file, model.impl().session.loaded.model->description());
  return made;
}

void PromptCache::save(const Model& model, const std::string& file) const {
  if (impl_->caches.empty()) throw Error(Code::bad_request, "prompt cache", "holds nothing yet, wanted a text to save");
  cache::save_prompt_file(file, impl_->caches, model.impl().session.loaded.model->description(),
                          {{"model", model.impl().session.loaded.path.string()}, {"tokenizer_config", "{}"}});
}

int PromptCache::tokens() const {
  return impl_->caches.empty() ? 0 : cache::prompt_tokens(impl_->caches);
}
int PromptCache::trim(int n) {
  return n > 0 && !impl_->caches.empty() ? cache::trim(impl_->caches, n) : 0;
}

PromptCache PromptCache::copy() const {
  PromptCache made;
  made.impl_->caches = cache::copy(impl_->caches);
  return made;
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

std::vector<int> Model::encode(const std::string& text, bool add_special_tokens) const {
  return impl_->session.tokenizer.encode(text, add_special_tokens);
}

std::string Model::decode(const std::vector<int>& tokens) const {
  return impl_->session.tokenizer.decode(tokens);
}

std::string Model::chat_prompt(const std::string& user, const std::string& system) const {
  const auto& tokenizer = impl_->session.tokenizer;
  if (!tokenizer.has_chat_template()) return user;
  json messages = json::array();
  if (!system.empty()) messages.push_back({{"role", "system"}, {"content", system}});
  messages.push_back({{"role", "user"}, {"content", user}});
  return tokenizer.apply_chat_template(messages);
}

Model load(const std::string& path_or_repo, const LoadOptions& options) {
  const auto path = resolve_model(path_or_repo, {.revision = options.revision, .offline = options.offline});
  return Model(std::make_unique<Model::Impl>(Model::Impl{open_session(path)}));
}

std::string generate(Model& model, const std::string& prompt, const GenerateOptions& options) {
  std::string text;
  run(model, prompt, options, false, [&](const gen::Response& r) {
    text += r.text;
    return true;
  });
  return text;
}

GenerationResponse stream_generate(Model& model, const std::string& prompt, const GenerateOptions& options,
                                   const std::function<bool(const GenerationResponse&)>& on_response) {
  return to_public(run(model, prompt, options, true, [&](const gen::Response& r) { return on_response(to_public(r)); }));
}

}  // namespace mlxlm
