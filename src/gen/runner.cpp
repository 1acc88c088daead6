// One model call a step. What a row alone would do in gen/generate.cpp is done here to its row of the logits, so the tokens are the same.
#include "gen/runner.h"

#include <algorithm>
#include <numeric>

#include <fmt/format.h>
#include <mlx/memory.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "kernels/cpu/kernels.h"
#include "plan/plan.h"

namespace mlxlm::gen {
namespace {

constexpr int kBlockTokens = 256;      // as caches grow
constexpr int64_t kClearEverySteps = 128;

/** Ends the evaluation of a step that failed: no work may outlive the caches that it writes to. */
void settle() noexcept {
  try {
    mx::synchronize();
  } catch (...) {
  }
}

/** What a layer that keeps everything keeps for a token; nothing where its memory cannot be had ahead. */
std::optional<cache::KvShape> shape_of(const cache::Cache& c) {
  const auto* kv = dynamic_cast<const cache::KvCache*>(&c);
  if (kv == nullptr || !kv->plans_writes() || !kernels::cpu::active()) return std::nullopt;
  std::vector<mx::array> buffers;
  for (const auto& a : kv->state()) {
    if (a.ndim() == 4) buffers.push_back(a);
  }
  if (buffers.size() != 2) return std::nullopt;
  return cache::KvShape{buffers[0].shape(1), buffers[0].shape(3), buffers[1].shape(3), buffers[0].dtype()};
}

}  // namespace

/** How a sequence chooses its tokens. */
struct ModelRunner::Chooser {
  Chooser(const engine::Sampling& s, std::shared_ptr<engine::TokenMask> m)
      : sampling(s), processors(processor_options(s)), sampler(sampler_options(s)), mask(std::move(m)) {}
  engine::Sampling sampling;
  sample::ProcessorOptions processors;
  sample::Sampler sampler;
  std::shared_ptr<engine::TokenMask> mask;

  bool wants_logprobs() const { return sampling.want_logprob || sampling.want_logprobs || sampling.top_logprobs > 0; }
  /** The most likely token and nothing else: such rows share one argmax. */
  bool plain() const { return sampling.temperature == 0.f && !wants_logprobs() && !processors.any() && !mask; }
};

/** What is read when the step has been evaluated. */
struct ModelRunner::Choice {
  mx::array token;                      // int32 [1]
  std::optional<mx::array> logprob{}, logprobs{};  // float32 [], [V]
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

ModelRunner::ModelRunner(model::CausalModel& model, const engine::Limits& limits)
    : model_(model),
      chunk_tokens_(limits.prefill_tokens),
      limited_chunk_tokens_(std::max(limits.prefill_tokens, limits.limited_chunk_tokens)) {
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
}

void ModelRunner::check(std::span<const int> tokens, const engine::Sampling& sampling) const {
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
}

/** A cache grows by half of itself, in whole blocks; one with a limit holds a step more than that. */
int64_t ModelRunner::cost_bytes(int64_t tokens, int max_kv_size_tokens) const {
  const int64_t grown = tokens <= kBlockTokens ? kBlockTokens : (tokens * 3 / 2 + kBlockTokens) / kBlockTokens * kBlockTokens;
  const auto layout = plan::cache_layout(model_.description());
  int64_t bytes = 0;
  for (std::size_t i = 0; i < layout.size(); ++i) {
    int64_t limit = layout[i].kind == plan::CacheKind::rotating ? layout[i].window_tokens : 0;
    if (max_kv_size_tokens > 0) limit = limit > 0 ? std::min<int64_t>(limit, max_kv_size_tokens) : max_kv_size_tokens;
    const auto rows = limit > 0 ? std::min(tokens + kBlockTokens, limit + (max_kv_size_tokens > 0 ? limited_chunk_tokens_ : chunk_tokens_)) : grown;
    bytes += rows * layout[i].values_per_token * layer_value_bytes_[i] + layer_fixed_bytes_[i];
  }
  return bytes;
}

ModelRunner::Held& ModelRunner::held(engine::CacheId cache) {
  const auto found = held_.find(cache);
  if (found == held_.end()) throw Error(Code::internal, "cache", fmt::format("{} is not known", cache));
  return found->second;
}

const ModelRunner::Held& ModelRunner::held(engine::CacheId cache) const { return const_cast<ModelRunner*>(this)->held(cache); }

engine::CacheId ModelRunner::reserve(int64_t tokens, int max_kv_size_tokens) {
  auto caches = cache::make_caches(model_.description(), max_kv_size_tokens);
  for (std::size_t i = 0; i < caches.size(); ++i) {
    // Memory for the whole prompt at once: else each growth copies all of it, in the middle of other sequences' steps.
    auto* kv = dynamic_cast<cache::KvCache*>(caches[i].get());
    if (kv == nullptr || !layer_shapes_[i] || tokens <= kBlockTokens) continue;
    kv->plan_write(static_cast<int>(tokens), *layer_shapes_[i]);
    kv->trim(static_cast<int>(tokens));
  }
  held_.emplace(++last_id_, Held{std::move(caches)});
  return last_id_;
}

engine::CacheId ModelRunner::adopt(cache::Caches caches) {
  if (caches.size() != model_.description().layers.size()) {
    throw Error(Code::bad_request, "cache",
                fmt::format("has {} layers, wanted {}", caches.size(), model_.description().layers.size()));
  }
  int tokens = 0;
  for (const auto& c : caches) tokens = c ? std::max(tokens, c->offset()) : tokens;
  held_.emplace(++last_id_, Held{std::move(caches), tokens});
  return last_id_;
}

cache::Caches ModelRunner::take(engine::CacheId cache) {
  auto caches = std::move(held(cache).caches);
  held_.erase(cache);
  return caches;
}

engine::CacheId ModelRunner::copy(engine::CacheId cache, int tokens) {
  const auto& from = held(cache);
  Held made;
  for (const auto& c : from.caches) made.caches.push_back(c ? c->copy() : nullptr);
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
  for (auto& c : h.caches) {
    if (c) c->trim(excess);
  }
  h.tokens = tokens;
}

void ModelRunner::free(engine::CacheId cache) noexcept { held_.erase(cache); }

engine::CacheInfo ModelRunner::info(engine::CacheId cache) const {
  const auto& h = held(cache);
  engine::CacheInfo info{.tokens = h.tokens, .trimmable = true};
  for (const auto& c : h.caches) {
    if (!c) continue;
    info.tokens = c->offset();
    info.trimmable = info.trimmable && c->trimmable();
    info.bytes += c->bytes();
  }
  return info;
}

void ModelRunner::begin(engine::SequenceId sequence, const engine::Sampling& sampling, std::shared_ptr<engine::TokenMask> mask) {
  choosers_.insert_or_assign(sequence, std::make_shared<Chooser>(sampling, std::move(mask)));
}

void ModelRunner::end(engine::SequenceId sequence) noexcept { choosers_.erase(sequence); }

mx::array ModelRunner::logits_of(const engine::StepPlan& plan) {
  std::vector<int> tokens;
  std::vector<model::Segment> segments;
  for (const auto& row : plan.rows) {
    tokens.insert(tokens.end(), row.tokens.begin(), row.tokens.end());
    segments.push_back({static_cast<int>(row.tokens.size()), row.wanted_rows, &held(row.cache).caches});
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
  if (chooser.processors.any()) logits = sample::process(logits, row.history, chooser.processors);
  if (chooser.mask) logits = masked(logits, *chooser.mask);
  if (chooser.sampling.temperature == 0.f && !chooser.wants_logprobs()) return {chooser.sampler(logits)};
  const auto logprobs = sample::log_probabilities(logits);
  Choice choice{chooser.sampler(logprobs)};
  if (chooser.wants_logprobs()) {
    const auto chosen = mx::take_along_axis(logprobs, mx::expand_dims(choice.token, 1), -1);
    choice.logprob = mx::astype(mx::reshape(chosen, {}), mx::float32);
  }
  if (chooser.sampling.want_logprobs || chooser.sampling.top_logprobs > 0) {
    choice.logprobs = mx::contiguous(mx::astype(mx::reshape(logprobs, {-1}), mx::float32));
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
    const auto own = [&](const mx::array& a) { return mx::slice(a, {at, 0}, {at + 1, a.shape(1)}); };
    try {
      if (chooser.plain()) {
        if (!likeliest) likeliest = mx::reshape(sample::likeliest(logits), {-1, 1});
        choices.emplace(i, Choice{own(*likeliest)});
      } else {
        choices.emplace(i, choose_one(row, chooser, own(logits)));
      }
    } catch (...) {
      result.rows[i].error = engine::current_error();
    }
    ++at;
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

engine::StepResult ModelRunner::run(const engine::StepPlan& plan) {
  engine::StepResult result;
  std::vector<std::pair<Chooser*, sample::Sampler>> before;
  for (const auto& row : plan.rows) {
    result.rows.push_back({.sequence = row.sequence});
    auto& chooser = *choosers_.at(row.sequence);
    if (row.wanted_rows > 0 && chooser.sampling.temperature != 0.f) before.emplace_back(&chooser, chooser.sampler);
  }
  try {
    const auto logits = logits_of(plan);
    const auto choices = choose(plan, logits, result);
    std::vector<mx::array> arrays;
    for (const auto& [i, choice] : choices) {
      arrays.push_back(choice.token);
      if (choice.logprob) arrays.push_back(*choice.logprob);
      if (choice.logprobs) arrays.push_back(*choice.logprobs);
    }
    for (const auto& row : plan.rows) {
      for (const auto& c : held(row.cache).caches) {
        if (!c) continue;
        auto state = c->state();
        arrays.insert(arrays.end(), state.begin(), state.end());
      }
    }
    mx::eval(arrays);
    for (const auto& [i, choice] : choices) {
      const auto& sampling = choosers_.at(plan.rows[i].sequence)->sampling;
      engine::ChosenToken chosen{.token = mx::array(choice.token).item<int>()};
      if (choice.logprob) chosen.logprob = mx::array(*choice.logprob).item<float>();
      if (choice.logprobs) {
        const std::span all(choice.logprobs->data<float>(), choice.logprobs->size());
        chosen.top = best(all, sampling.top_logprobs);
        if (sampling.want_logprobs) chosen.logprobs.assign(all.begin(), all.end());
      }
      result.rows[i].chosen.push_back(std::move(chosen));
    }
  } catch (...) {
    settle();
    for (auto& [chooser, sampler] : before) chooser->sampler = sampler;
    throw;
  }
  for (const auto& row : plan.rows) held(row.cache).tokens += static_cast<int>(row.tokens.size());
  if (plan.number % kClearEverySteps == 0) mx::clear_cache();
  return result;
}

}  // namespace mlxlm::gen
