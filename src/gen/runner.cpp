// One model call a step. What a row alone would do in gen/generate.cpp is done here to its row of the logits, so the tokens are the same.
#include "gen/runner.h"

#include <algorithm>
#include <numeric>

#include <fmt/format.h>
#include <mlx/memory.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/layer_shape.h"
#include "cache/quantized.h"
#include "gen/callers_choice.h"
#include "gen/generate.h"
#include "gen/memory.h"
#include "kernels/cpu/kernels.h"
#include "plan/plan.h"

namespace mlxlm::gen {
namespace {

constexpr int kBlockTokens = 256;  // as caches grow
constexpr int64_t kClearEverySteps = 128;

/** Other steps end soon by themselves. */
bool is_long(const engine::StepPlan& plan) {
  constexpr std::size_t many_tokens = 64;
  std::size_t tokens = 0;
  for (const auto& row : plan.rows) tokens += row.tokens.size();
  return tokens >= many_tokens;
}

/** What a layer that keeps everything keeps for a token; nothing where its memory cannot be had ahead. */
std::optional<cache::KvShape> shape_of(const cache::Cache& c) {
  const auto* kv = dynamic_cast<const cache::KvCache*>(&c);
  if (kv == nullptr || !kv->plans_writes() || !kernels::cpu::active()) return std::nullopt;
  return kv->shape();
}

}  // namespace

/** How a sequence chooses its tokens. */
struct ModelRunner::Chooser {
  Chooser(const engine::Sampling& s, std::shared_ptr<engine::TokenMask> m, const engine::Drafts& d)
      : sampling(s), processors(processor_options(s)), sampler(sampler_options(s)), mask(std::move(m)), drafts(d) {}
  engine::Sampling sampling;
  sample::ProcessorOptions processors;
  sample::Sampler sampler;
  std::shared_ptr<engine::TokenMask> mask;
  engine::Drafts drafts;
  NgramDrafter ngrams{};
  std::unique_ptr<ModelDrafter> drafter{};         // made with the first draft
  std::optional<mx::array> draft_probabilities{};  // that the latest draft was drawn from

  bool wants_logprobs() const { return sampling.want_logprob || sampling.want_logprobs || sampling.top_logprobs > 0; }
  /** The most likely token and nothing else: such rows share one argmax. */
  bool plain() const { return sampling.temperature == 0.f && !wants_logprobs() && !processors.any() && !mask && !sampling.is_callers(); }
};

/** What is read when the step has been evaluated. A row with a draft has several logits. */
struct ModelRunner::Choice {
  mx::array token;                                 // int32 [n]; the likeliest where there is a draft
  std::optional<mx::array> logprob{}, logprobs{};  // float32 [] (without a draft only), [n,V]
  std::optional<sample::Verdict> verdict{};        // of a draft that was judged already

  void add_to(std::vector<mx::array>& arrays) const {
    arrays.push_back(token);
    if (logprob) arrays.push_back(*logprob);
    if (logprobs) arrays.push_back(*logprobs);
  }
};

sample::SamplerOptions sampler_options(const engine::Sampling& s) {
  return {.temperature = s.temperature,
          .top_p = s.top_p,
          .min_p = s.min_p,
          .min_tokens_to_keep = s.min_tokens_to_keep,
          .top_k = s.top_k,
          .xtc_probability = s.xtc_probability,
          .xtc_threshold = s.xtc_threshold,
          .xtc_special_tokens = s.xtc_special_tokens,
          .seed = s.seed};
}

sample::ProcessorOptions processor_options(const engine::Sampling& s) {
  return {.logit_bias = s.logit_bias,
          .repetition_penalty = s.repetition_penalty,
          .repetition_context_size = s.repetition_context_size,
          .presence_penalty = s.presence_penalty,
          .presence_context_size = s.presence_context_size,
          .frequency_penalty = s.frequency_penalty,
          .frequency_context_size = s.frequency_context_size};
}

ModelRunner::ModelRunner(model::CausalModel& model, const engine::Limits& limits, model::CausalModel* draft_model)
    : model_(model),
      draft_model_(draft_model),
      chunk_tokens_(limits.prefill_tokens),
      limited_chunk_tokens_(std::max(limits.prefill_tokens, limits.limited_chunk_tokens)),
      layout_(plan::cache_layout(model.description())) {
  auto caches = cache::make_caches(model.description());
  mx::eval(model.run(mx::zeros({1}, mx::int32), {{1, 1, &caches}}));
  for (const auto& c : caches) {
    int64_t value_bytes = 0, fixed = 0;
    if (c) {
      const auto state = c->state();
      mx::eval(state);
      for (const auto& a : state) {
        if (a.ndim() == 4) value_bytes = std::max<int64_t>(value_bytes, mx::size_of(a.dtype()));
      }
      if (dynamic_cast<cache::AttentionCache*>(c.get()) == nullptr) fixed = c->bytes();
    }
    layer_shapes_.push_back(c ? shape_of(*c) : std::nullopt);
    layer_value_bytes_.push_back(std::max<int64_t>(value_bytes, 2));
    layer_fixed_bytes_.push_back(fixed);
  }
  if (draft_model_ == nullptr) return;
  auto drafts = cache::make_caches(draft_model_->description());
  mx::eval(draft_model_->run(mx::zeros({1}, mx::int32), {{1, 1, &drafts}}));
  draft_value_bytes_ = std::max(2, value_bytes(drafts));
}

void ModelRunner::check(std::span<const int> tokens, const engine::Sampling& sampling, const engine::CacheOptions& cache,
                        const engine::Drafts& drafts) const {
  const int vocab = model_.description().vocab;
  for (const int token : tokens) {
    if (token < 0 || token >= vocab) {
      throw Error(Code::bad_request, "prompt", fmt::format("got token {}, wanted 0 to {} (the model's vocabulary)", token, vocab - 1));
    }
  }
  sample::check(sampler_options(sampling), vocab);
  sample::check(processor_options(sampling), vocab);
  if (sampling.top_logprobs < 0 || sampling.top_logprobs > vocab) {
    throw Error(Code::bad_request, "top_logprobs", fmt::format("got {}, wanted 0 to {}", sampling.top_logprobs, vocab));
  }
  cache::check_quantization(model_.description(), {cache.kv_bits, cache.kv_group_size, cache.quantized_from_tokens});
  if (drafts.model_tokens > 0 && draft_model_ == nullptr) {
    throw Error(Code::bad_request, "num_draft_tokens", "got it without a draft model");
  }
}

ModelRunner::Held& ModelRunner::held(engine::CacheId cache) {
  const auto found = held_.find(cache);
  if (found == held_.end()) throw Error(Code::internal, "cache", fmt::format("{} is not known", cache));
  return found->second;
}

const ModelRunner::Held& ModelRunner::held(engine::CacheId cache) const {
  return const_cast<ModelRunner*>(this)->held(cache);
}

engine::CacheId ModelRunner::reserve(int64_t tokens, const engine::CacheOptions& options) {
  auto caches = cache::make_caches(model_.description(), options.max_kv_size_tokens);
  if (options.kv_bits > 0) tokens = std::min<int64_t>(tokens, options.quantized_from_tokens);
  for (std::size_t i = 0; i < caches.size(); ++i) {
    // Memory for the whole prompt at once: else each growth copies all of it, in the middle of other sequences' steps.
    auto* kv = dynamic_cast<cache::KvCache*>(caches[i].get());
    if (kv == nullptr || !layer_shapes_[i] || tokens <= kBlockTokens) continue;
    kv->plan_write(static_cast<int>(tokens), *layer_shapes_[i]);
    kv->trim(static_cast<int>(tokens));
  }
  held_.emplace(++last_id_, Held{std::move(caches), 0, options});
  return last_id_;
}

/** Runs what a rejected draft left to run again. */
void ModelRunner::settle(Held& h) {
  if (h.trail) h.trail->settle();
}

Trail& ModelRunner::trail(Held& h) {
  if (!h.trail) h.trail = std::make_unique<Trail>(model_, h.caches);
  return *h.trail;
}

/** Converts what is due; whether anything may have changed. */
bool ModelRunner::quantize(Held& h) {
  const auto& o = h.options;
  if (o.kv_bits == 0 || h.tokens < o.quantized_from_tokens) return false;
  const auto due = [](const cache::CachePtr& c) {
    const auto* attention = dynamic_cast<const cache::AttentionCache*>(c.get());
    return attention != nullptr && attention->can_quantize();
  };
  if (std::ranges::none_of(h.caches, due)) return false;
  settle(h);
  cache::quantize_caches(h.caches, {o.kv_bits, o.kv_group_size, 0});
  return true;
}

const cache::Caches& ModelRunner::caches(engine::CacheId cache) {
  auto& h = held(cache);
  settle(h);
  return h.caches;
}

engine::CacheId ModelRunner::adopt(cache::Caches caches) {
  cache::check_fits(caches, model_.description());
  int tokens = 0;
  for (const auto& c : caches) tokens = c ? std::max(tokens, c->offset()) : tokens;
  held_.emplace(++last_id_, Held{std::move(caches), tokens});
  return last_id_;
}

cache::Caches ModelRunner::take(engine::CacheId cache) {
  try {
    settle(held(cache));
  } catch (...) {
    free(cache);
    throw;
  }
  auto caches = std::move(held(cache).caches);
  held_.erase(cache);
  return caches;
}

engine::CacheId ModelRunner::copy(engine::CacheId cache, int tokens) {
  auto& from = held(cache);
  settle(from);
  Held made;
  made.options = from.options;
  for (const auto& c : from.caches) made.caches.push_back(!c ? nullptr : shares_memory_ ? c->copy() : c->separate_copy());
  made.tokens = from.tokens;
  held_.emplace(++last_id_, std::move(made));
  const auto id = last_id_;
  try {
    trim(id, tokens);
  } catch (...) {
    free(id);
    throw;
  }
  return id;
}

void ModelRunner::trim(engine::CacheId cache, int tokens) {
  auto& h = held(cache);
  const int excess = h.tokens - tokens;
  if (excess == 0) return;
  if (excess < 0 || !info(cache).trimmable) {
    throw Error(Code::internal, "cache", fmt::format("holds {} tokens and cannot be cut to {}", h.tokens, tokens));
  }
  settle(h);
  for (auto& c : h.caches) {
    if (c) c->trim(excess);
  }
  h.tokens = tokens;
}

void ModelRunner::free(engine::CacheId cache) noexcept {
  held_.erase(cache);
}

engine::CacheInfo ModelRunner::info(engine::CacheId cache) const {
  const auto& h = held(cache);
  const int pending = h.trail ? h.trail->pending() : 0;
  engine::CacheInfo info{.tokens = h.tokens, .trimmable = pending == 0};
  for (const auto& c : h.caches) {
    if (!c) continue;
    info.tokens = c->offset() + pending;
    info.trimmable = info.trimmable && c->trimmable();
    info.bytes += c->bytes();
  }
  return info;
}

void ModelRunner::begin(engine::SequenceId sequence, const engine::Sampling& sampling, std::shared_ptr<engine::TokenMask> mask,
                        const engine::Drafts& drafts) {
  choosers_.insert_or_assign(sequence, std::make_shared<Chooser>(sampling, std::move(mask), drafts));
}

void ModelRunner::end(engine::SequenceId sequence) noexcept {
  choosers_.erase(sequence);
}

/** A draft is never worth an answer: who cannot have one gets none. */
std::vector<std::vector<int>> ModelRunner::draft(const std::vector<engine::DraftWanted>& wanted) {
  std::vector<std::vector<int>> drafts(wanted.size());
  std::vector<std::vector<int>> histories(wanted.size());
  std::vector<ModelDrafter::Wanted> by_model;
  std::vector<std::size_t> index;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const auto& w = wanted[i];
    auto& chooser = *choosers_.at(w.sequence);
    auto& h = held(w.cache);
    chooser.draft_probabilities.reset();
    int most = w.most;
    while (most > 0 && !trail(h).one_call_agrees(most + 1)) --most;
    if (most == 0) continue;
    histories[i].assign(w.tokens.begin(), w.tokens.end());
    if (chooser.drafts.ngram_tokens > 0) {
      drafts[i] = chooser.ngrams.propose(histories[i], most).tokens;
    } else {
      if (!chooser.drafter) {
        chooser.drafter = std::make_unique<ModelDrafter>(*draft_model_, model_.description().vocab, h.options.max_kv_size_tokens,
                                                         limited_chunk_tokens_, chooser.sampler, chooser.processors);
      }
      by_model.push_back({chooser.drafter.get(), &histories[i], most});
      index.push_back(i);
    }
  }
  if (by_model.empty()) return drafts;
  try {
    auto made = ModelDrafter::propose_together(by_model);
    for (std::size_t k = 0; k < made.size(); ++k) {
      drafts[index[k]] = std::move(made[k].tokens);
      choosers_.at(wanted[index[k]].sequence)->draft_probabilities = std::move(made[k].probabilities);
    }
  } catch (...) {
    end_evaluation();
    for (const auto i : index) choosers_.at(wanted[i].sequence)->drafter.reset();
  }
  return drafts;
}

void ModelRunner::keep(engine::CacheId cache, int tokens) {
  auto& h = held(cache);
  if (!h.marked) return;
  h.marked = false;
  h.trail->back_to(tokens - h.tokens + 1);  // h.tokens counts the row's own token, which stays
  h.tokens = tokens;
  if (quantize(h)) evaluate_state(h.caches);
}

/** In the order of the plan. */
mx::array ModelRunner::logits_of(const engine::StepPlan& plan) {
  std::vector<int> tokens;
  std::vector<model::Segment> segments;
  for (const auto& row : plan.rows) {
    auto& h = held(row.cache);
    auto mine = row.tokens;
    mine.insert(mine.end(), row.draft.begin(), row.draft.end());
    if (!row.draft.empty()) {
      h.marked = true;
      trail(h).mark(static_cast<int>(mine.size()), true);
    }
    if (h.trail) mine = h.trail->take_call(mine);
    tokens.insert(tokens.end(), mine.begin(), mine.end());
    segments.push_back({static_cast<int>(mine.size()), row.wanted_rows, &h.caches});
  }
  return model_.run(mx::array(tokens.data(), {static_cast<int>(tokens.size())}, mx::int32), segments);
}

/** Logits [1,V] with -inf where the mask forbids. */
mx::array ModelRunner::masked(const mx::array& logits, engine::TokenMask& mask) const {
  const auto bits = mask.allowed();
  if (bits.empty()) return logits;
  const int vocab = logits.shape(-1);
  if (bits.size() * 32 < static_cast<std::size_t>(vocab)) {
    throw Error(Code::internal, "mask", fmt::format("has bits for {} tokens, wanted {}", bits.size() * 32, vocab));
  }
  std::vector<uint8_t> allowed(vocab);
  bool any = false;
  for (int i = 0; i < vocab; ++i) {
    allowed[i] = bits[i / 32] >> (i % 32) & 1;
    any = any || allowed[i];
  }
  if (!any) throw Error(Code::bad_request, "mask", "allows no token");
  const auto keep = mx::array(allowed.data(), {1, vocab}, mx::bool_);
  return mx::where(keep, logits, mx::array(-std::numeric_limits<float>::infinity(), logits.dtype()));
}

ModelRunner::Choice ModelRunner::choose_one(const engine::PlannedRow& row, Chooser& chooser, mx::array logits) {
  if (chooser.sampling.is_callers()) {
    const auto allowed = [&](const mx::array& one) { return chooser.mask ? masked(one, *chooser.mask) : one; };
    auto chosen = choose_by_caller(row, chooser.sampling, chooser.processors, chooser.sampler, allowed, logits, chooser.wants_logprobs());
    return {.token = mx::array(chosen.verdict.token), .logprobs = std::move(chosen.logprobs), .verdict = chosen.verdict};
  }
  const bool drafted = !row.draft.empty();
  if (chooser.processors.any() && !drafted) logits = sample::process(logits, row.history, chooser.processors);
  if (chooser.processors.any() && drafted) {
    auto before = row.history;
    std::vector<mx::array> rows;
    for (int i = 0; i < logits.shape(0); ++i) {
      if (i > 0) before.push_back(row.draft[i - 1]);
      rows.push_back(sample::process(mx::slice(logits, {i, 0}, {i + 1, logits.shape(1)}), before, chooser.processors));
    }
    logits = mx::concatenate(rows, 0);
  }
  if (chooser.mask) logits = masked(logits, *chooser.mask);
  const bool greedy = chooser.sampler.greedy();
  if (greedy && !chooser.wants_logprobs()) return {drafted ? sample::likeliest(logits) : chooser.sampler(logits)};
  const auto logprobs = sample::log_probabilities(logits);
  Choice choice{mx::array(0)};
  if (drafted && !greedy) {
    choice.verdict = chooser.sampler.judge(logprobs, row.draft, chooser.draft_probabilities);
  } else {
    choice.token = drafted ? sample::likeliest(logprobs) : chooser.sampler(logprobs);
  }
  if (chooser.wants_logprobs() && !drafted) {
    const auto chosen = mx::take_along_axis(logprobs, mx::expand_dims(choice.token, 1), -1);
    choice.logprob = mx::astype(mx::reshape(chosen, {}), mx::float32);
  }
  if (chooser.sampling.want_logprobs || chooser.sampling.top_logprobs > 0 || (drafted && chooser.wants_logprobs())) {
    choice.logprobs = mx::contiguous(mx::astype(logprobs, mx::float32));
  }
  return choice;
}

/** By index of the row in the plan. A row that fails says so in the result. */
std::map<std::size_t, ModelRunner::Choice> ModelRunner::choose(const engine::StepPlan& plan, const mx::array& logits,
                                                               engine::StepResult& result) {
  std::map<std::size_t, Choice> choices;
  std::optional<mx::array> likeliest;  // [R], shared by the plain rows
  bool any_mask = false;
  for (const auto& row : plan.rows) any_mask = any_mask || (row.wanted_rows > 0 && choosers_.at(row.sequence)->mask);
  if (any_mask) mx::async_eval({logits});  // runs while masks are waited for
  int at = 0;
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    const auto& row = plan.rows[i];
    if (row.wanted_rows == 0) continue;
    auto& chooser = *choosers_.at(row.sequence);
    const auto own = [&](const mx::array& a) { return mx::slice(a, {at, 0}, {at + row.wanted_rows, a.shape(1)}); };
    try {
      if (chooser.plain()) {
        if (!likeliest) likeliest = mx::reshape(sample::likeliest(logits), {-1, 1});
        choices.emplace(i, Choice{mx::contiguous(mx::reshape(own(*likeliest), {-1}))});
      } else {
        choices.emplace(i, choose_one(row, chooser, own(logits)));
      }
    } catch (...) {
      result.rows[i].error = engine::current_error();
    }
    at += row.wanted_rows;
  }
  return choices;
}

namespace {

std::vector<engine::TokenLogprob> best(std::span<const float> logprobs, int count) {
  std::vector<int> order(logprobs.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [&](int a, int b) { return logprobs[a] != logprobs[b] ? logprobs[a] > logprobs[b] : a < b; });
  std::vector<engine::TokenLogprob> top;
  for (int i = 0; i < count; ++i) top.push_back({order[i], logprobs[order[i]]});
  return top;
}

}  // namespace

/** What is to be told about `token`, chosen from the logits of row `row`. */
engine::ChosenToken ModelRunner::read(const Choice& choice, int row, int token, const engine::Sampling& sampling) {
  engine::ChosenToken chosen{.token = token};
  if (choice.logprob) chosen.logprob = mx::array(*choice.logprob).item<float>();
  if (choice.logprobs) {
    const auto vocab = static_cast<std::size_t>(choice.logprobs->shape(-1));
    const std::span all(choice.logprobs->data<float>() + static_cast<std::size_t>(row) * vocab, vocab);
    if (!choice.logprob) chosen.logprob = all[token];
    chosen.top = best(all, sampling.top_logprobs);
    if (sampling.want_logprobs) chosen.logprobs.assign(all.begin(), all.end());
  }
  return chosen;
}

void ModelRunner::read(const engine::PlannedRow& row, const Choice& choice, Chooser& chooser, engine::RowResult& result) {
  sample::Verdict verdict;
  if (choice.verdict) {
    verdict = *choice.verdict;
  } else {
    const int* tokens = choice.token.data<int>();
    while (verdict.accepted < static_cast<int>(row.draft.size()) && tokens[verdict.accepted] == row.draft[verdict.accepted])
      ++verdict.accepted;
    verdict.token = tokens[verdict.accepted];
  }
  for (int i = 0; i <= verdict.accepted; ++i) {
    result.chosen.push_back(read(choice, i, i < verdict.accepted ? row.draft[i] : verdict.token, chooser.sampling));
  }
}

engine::StepResult ModelRunner::run(const engine::StepPlan& plan) {
  engine::StepResult result;
  std::vector<std::pair<Chooser*, sample::Sampler>> before;
  for (const auto& row : plan.rows) {
    result.rows.push_back({.sequence = row.sequence});
    auto& chooser = *choosers_.at(row.sequence);
    if (row.wanted_rows > 0 && chooser.sampling.temperature != 0.f) before.emplace_back(&chooser, chooser.sampler);
  }
  try {
    const auto* stop = is_long(plan) ? stop_ : nullptr;  // a short one ends by itself, and keeps what it computed
    const model::StopScope scope(model_, stop);
    const auto logits = logits_of(plan);
    const auto choices = choose(plan, logits, result);
    std::vector<mx::array> arrays;
    for (const auto& [i, choice] : choices) choice.add_to(arrays);
    for (const auto& row : plan.rows) {
      auto& h = held(row.cache);
      h.tokens += static_cast<int>(row.tokens.size());
      if (row.draft.empty()) quantize(h);
      for (const auto& c : h.caches) {
        if (!c) continue;
        auto state = c->state();
        arrays.insert(arrays.end(), state.begin(), state.end());
      }
    }
    mx::eval(arrays);
    if (stop != nullptr && stop->load(std::memory_order_relaxed)) throw Error(Code::cancelled, "step", "was stopped");
    for (const auto& [i, choice] : choices) read(plan.rows[i], choice, *choosers_.at(plan.rows[i].sequence), result.rows[i]);
  } catch (...) {
    end_evaluation();
    for (auto& [chooser, sampler] : before) chooser->sampler = sampler;
    throw;
  }
  if (plan.number % kClearEverySteps == 0) mx::clear_cache();
  return result;
}

}  // namespace mlxlm::gen
