// BatchGenerator of the public C++ API, over that of gen/.
#include "mlxlm/batch_generator.h"

#include <algorithm>

#include <fmt/format.h>

#include "api/impl.h"
#include "base/error.h"
#include "cache/prompt_file.h"
#include "engine/async_mask.h"

namespace mlxlm {
namespace {

using Insert = gen::BatchGenerator::Insert;

gen::BatchOptions to_options(const BatchGeneratorOptions& o, const Session& session) {
  if (o.each.prompt_cache != nullptr) throw Error(Code::bad_request, "prompt_cache", "got one for all sequences, wanted it with an insert");
  if (o.prefix_cache_bytes > 0 && o.keep_caches) {
    throw Error(Code::bad_request, "prefix_cache_bytes", "got it with keep_caches, wanted one of them: a cache is handed over or stored");
  }
  gen::BatchOptions options{.limits = gen::default_limits(o.max_sequences), .tokenizer = &session.tokenizer};
  options.limits.prefill_tokens = o.prefill_step_size;
  options.limits.prefix_cache_bytes = o.prefix_cache_bytes;
  if (o.memory_bytes) options.limits.memory_bytes = *o.memory_bytes;
  options.draft_model = draft_model_of(o.each, session);
  return options;
}

void check_length(const char* name, std::size_t length, std::size_t prompts) {
  if (length == 0 || length == prompts) return;
  throw Error(Code::bad_request, name, fmt::format("got {} entries, wanted one for each of {} prompts", length, prompts));
}

void check_lengths(const InsertLists& lists, std::size_t prompts) {
  check_length("max_tokens", lists.max_tokens.size(), prompts);
  check_length("caches", lists.caches.size(), prompts);
  check_length("all_tokens", lists.all_tokens.size(), prompts);
  check_length("samplers", lists.samplers.size(), prompts);
  check_length("logits_processors", lists.logits_processors.size(), prompts);
  check_length("stop_sequences", lists.stop_sequences.size(), prompts);
  check_length("options", lists.options.size(), prompts);
  check_length("masks", lists.masks.size(), prompts);
  check_length("logprobs", lists.logprobs.size(), prompts);
}

template <class T>
const T& entry(const std::vector<T>& list, std::size_t i, const T& otherwise) {
  return list.empty() ? otherwise : list[i];
}

const char* name_of(engine::Finish finish) {
  constexpr const char* names[] = {"", "stop", "length", "cancelled", "error"};
  return names[static_cast<int>(finish)];
}

BatchGenerator::Response to_public(gen::BatchGenerator::Response r) {
  BatchGenerator::Response made{.uid = r.uid,
                                .text = std::move(r.text),
                                .from_draft = r.from_draft,
                                .finish_reason = name_of(r.finish),
                                .error = r.error ? r.error->what() : "",
                                .all_tokens = std::move(r.all_tokens)};
  if (r.chosen) {
    made.token = r.chosen->token;
    made.logprob = r.chosen->logprob;
    made.logprobs = std::move(r.chosen->logprobs);
    for (const auto& top : r.chosen->top) made.top_logprobs.emplace_back(top.token, top.logprob);
  }
  if (!r.caches.empty()) made.prompt_cache = to_prompt_cache(std::move(r.caches));
  return made;
}

std::map<BatchGenerator::Uid, BatchGenerator::Extracted> to_public(std::map<int64_t, std::pair<cache::Caches, std::vector<int>>> found) {
  std::map<BatchGenerator::Uid, BatchGenerator::Extracted> made;
  for (auto& [uid, held] : found)
    made.emplace(uid, BatchGenerator::Extracted{to_prompt_cache(std::move(held.first)), std::move(held.second)});
  return made;
}

}  // namespace

BatchStats to_stats(const gen::BatchGenerator::Stats& s) {
  BatchStats stats;
  stats.prompt_tokens = s.prompt_tokens;
  stats.generation_tokens = s.generation_tokens;
  stats.decode_tokens = s.decode_tokens;
  stats.steps = s.steps;
  stats.generation_steps = s.generation_steps;
  stats.drafted_tokens = s.drafted_tokens;
  stats.accepted_tokens = s.accepted_tokens;
  stats.prompt_s = s.prompt_s;
  stats.decode_s = s.decode_s;
  stats.wall_s = s.wall_s;
  stats.peak_memory_gb = s.peak_memory_gb;
  return stats;
}

PromptCache to_prompt_cache(cache::Caches caches) {
  PromptCache made;
  made.impl().caches = std::move(caches);
  return made;
}

engine::Drafts drafts_of(const GenerateOptions& o) {
  return {.ngram_tokens = o.ngram_draft_tokens, .model_tokens = o.draft_model != nullptr ? o.num_draft_tokens : 0};
}

BatchStats BatchStats::since(const BatchStats& start) const {
  auto d = *this;  // the peak is that of the process
  d.prompt_tokens -= start.prompt_tokens;
  d.generation_tokens -= start.generation_tokens;
  d.decode_tokens -= start.decode_tokens;
  d.steps -= start.steps;
  d.generation_steps -= start.generation_steps;
  d.drafted_tokens -= start.drafted_tokens;
  d.accepted_tokens -= start.accepted_tokens;
  d.prompt_s -= start.prompt_s;
  d.decode_s -= start.decode_s;
  d.wall_s -= start.wall_s;
  return d;
}

struct BatchGenerator::Impl {
  Impl(Session& s, BatchGeneratorOptions o) : session(s), options(std::move(o)) {
    batch.emplace(*session.loaded.model, to_options(options, session), options.keep_caches);
    if (options.stop_tokens) {
      stop_tokens = *options.stop_tokens;
    } else {
      for (const int eos : session.tokenizer.eos_token_ids()) stop_tokens.push_back({eos});
    }
  }

  gen::BatchGenerator& open() {
    if (batch) return *batch;
    throw Error(Code::bad_request, "batch generator", "got an insert after close()");
  }

  engine::Sampling sampling_of(std::size_t i, const GenerateOptions& o, const InsertLists& lists) const {
    auto sampling = to_sampling(o, session.tokenizer);
    const auto& sampler = entry(lists.samplers, i, options.sampler);
    sampling.sampler = sampler ? sampler : options.sampler;
    for (const auto& process : entry(lists.logits_processors, i, options.logits_processors)) {
      if (process) sampling.processors.push_back(process);
    }
    const auto& wanted = entry(lists.logprobs, i, options.logprobs);
    sampling.want_logprob = wanted.chosen;
    sampling.want_logprobs = wanted.all;
    sampling.top_logprobs = wanted.top;
    return sampling;
  }

  Insert insert_of(std::size_t i, const std::vector<std::vector<int>>& segments, const InsertLists& lists) const {
    const auto& o = entry(lists.options, i, options.each);
    if (o.prompt_cache != nullptr) throw Error(Code::bad_request, "prompt_cache", "got one in options, wanted it in InsertLists::caches");
    if (o.draft_model != nullptr && o.draft_model != options.each.draft_model) {
      throw Error(Code::bad_request, "draft_model", "got another one than the generator's");
    }
    const cache::Quantization quantization{.bits = o.kv_bits, .group_size = o.kv_group_size, .start_tokens = o.quantized_kv_start};
    Insert one{.segments = segments,
               .max_tokens = entry(lists.max_tokens, i, o.max_tokens),
               .stop = o.stop,
               .max_kv_size_tokens = o.max_kv_size,
               .sampling = sampling_of(i, o, lists),
               .stop_tokens = entry(lists.stop_sequences, i, stop_tokens),
               .kv_quantization = quantization,
               .drafts = drafts_of(o)};
    if (!lists.caches.empty() && lists.caches[i] != nullptr) one.caches = cache::copy(lists.caches[i]->impl().caches);
    if (!lists.all_tokens.empty()) one.all_tokens = lists.all_tokens[i];
    if (!lists.masks.empty() && lists.masks[i]) one.mask = std::make_shared<engine::AsyncMask>(lists.masks[i]);
    return one;
  }

  Session& session;
  BatchGeneratorOptions options;
  std::vector<std::vector<int>> stop_tokens;
  std::optional<gen::BatchGenerator> batch;  // none = closed
  BatchStats last{};                         // of a closed one
};

BatchGenerator::BatchGenerator(Model& model, BatchGeneratorOptions options)
    : impl_(std::make_unique<Impl>(model.impl().session, std::move(options))) {}
BatchGenerator::BatchGenerator(BatchGenerator&&) noexcept = default;
BatchGenerator& BatchGenerator::operator=(BatchGenerator&&) noexcept = default;
BatchGenerator::~BatchGenerator() = default;

std::vector<BatchGenerator::Uid> BatchGenerator::insert(const std::vector<std::vector<int>>& prompts, const InsertLists& lists) {
  std::vector<std::vector<std::vector<int>>> segments;
  for (const auto& prompt : prompts) segments.push_back({prompt});
  return insert_segments(segments, lists);
}

std::vector<BatchGenerator::Uid> BatchGenerator::insert_segments(const std::vector<std::vector<std::vector<int>>>& segments,
                                                                 const InsertLists& lists) {
  auto& batch = impl_->open();
  check_lengths(lists, segments.size());
  std::vector<Insert> inserts;
  for (std::size_t i = 0; i < segments.size(); ++i) inserts.push_back(impl_->insert_of(i, segments[i], lists));
  return batch.insert_segments(std::move(inserts));
}

BatchGenerator::Step BatchGenerator::next() {
  Step step;
  if (!impl_->batch) return step;
  auto [prompts, responses] = impl_->batch->next();
  for (const auto& p : prompts) step.prompts.push_back({p.uid, p.processed_tokens, p.total_tokens, p.end_of_segment, p.end_of_prompt});
  for (auto& r : responses) step.responses.push_back(to_public(std::move(r)));
  return step;
}

std::vector<BatchGenerator::Response> BatchGenerator::next_generated() {
  while (true) {
    auto step = next();
    if (!step.responses.empty() || !has_work()) return std::move(step.responses);
  }
}

bool BatchGenerator::has_work() const {
  return impl_->batch && impl_->batch->has_work();
}

std::map<BatchGenerator::Uid, BatchGenerator::Extracted> BatchGenerator::extract_cache(const std::vector<Uid>& uids) {
  if (!impl_->batch) return {};
  return to_public(impl_->batch->extract_cache(uids));
}

std::map<BatchGenerator::Uid, BatchGenerator::Extracted> BatchGenerator::remove(const std::vector<Uid>& uids, bool return_prompt_caches) {
  if (!impl_->batch) return {};
  return to_public(impl_->batch->remove(uids, return_prompt_caches));
}

int64_t BatchGenerator::prompt_cache_bytes() const {
  return impl_->batch ? impl_->batch->prompt_cache_bytes() : 0;
}

BatchStats BatchGenerator::stats() const {
  return impl_->batch ? to_stats(impl_->batch->stats()) : impl_->last;
}

MemoryReport BatchGenerator::memory() const {
  MemoryReport report{.weight_bytes = impl_->session.loaded.model->weight_bytes()};
  if (!impl_->batch) return report;
  const auto held = impl_->batch->memory();
  report.held_bytes = held.held_bytes;
  report.reserved_bytes = held.reserved_bytes;
  report.stored_bytes = held.stored_bytes;
  report.stored_budget_bytes = held.stored_budget_bytes;
  report.limit_bytes = held.limit_bytes;
  for (const auto& r : held.requests) report.sequences.push_back({r.id, r.running, r.tokens, r.held_bytes, r.reserved_bytes});
  return report;
}

void BatchGenerator::close() {
  if (!impl_->batch) return;
  impl_->last = stats();
  impl_->batch.reset();
}

}  // namespace mlxlm
