// Chunked prefill, then decode with one token of look-ahead. Reference: mlx_lm/generate.py generate_step, stream_generate
#include "gen/generate.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include <fmt/format.h>
#include <mlx/device.h>
#include <mlx/memory.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/layer_shape.h"
#include "cache/prompt_file.h"
#include "gen/memory.h"
#include "gen/speculative.h"
#include "text/stop_matcher.h"

namespace mlxlm::gen {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::max(1e-9, std::chrono::duration<double>(Clock::now() - start).count());
}

bool on_gpu() {
  return mx::default_device() == mx::Device::gpu;
}

/** What is to be told about a token. */
struct Told {
  std::optional<mx::array> logprob{}, logprobs{};
};

/** Caches that are quantized already stay so, whatever the options say, and have no floats left. An empty cache has no dtype yet: then what
 * the model says. */
CacheSizes sizes_of(const model::CausalModel& model, const Options& options, const cache::Caches& caches) {
  const int bytes = value_bytes(caches);
  CacheSizes sizes{options.max_kv_size_tokens, bytes > 0 ? bytes : model.cache_value_bytes(), options.kv_quantization,
                   options.prefill_step_tokens};
  for (const auto& c : caches) {
    const auto* attention = dynamic_cast<const cache::AttentionCache*>(c.get());
    const auto* rows = attention != nullptr ? dynamic_cast<const cache::QuantizedCache*>(&attention->inner()) : nullptr;
    if (rows == nullptr) continue;
    sizes.quantization = {.bits = rows->bits(), .group_size = rows->group_size(), .start_tokens = 0};
    sizes.prefill_step_tokens = 1;
    break;
  }
  return sizes;
}

bool is_set(const std::atomic<bool>* cancel) {
  return cancel != nullptr && cancel->load(std::memory_order_relaxed);
}

/** Throws unless `tokens` can be run, and what they add to `caches` fits into memory. */
void check_prompt(const model::CausalModel& model, const std::vector<int>& prompt, const Options& options, const cache::Caches& caches) {
  const int vocab = model.description().vocab;
  if (prompt.empty()) throw Error(Code::bad_request, "prompt", "got no tokens, wanted at least one");
  for (int token : prompt) {
    if (token < 0 || token >= vocab) {
      throw Error(Code::bad_request, "prompt", fmt::format("got token {}, wanted 0 to {} (the model's vocabulary)", token, vocab - 1));
    }
  }
  if (options.prefill_step_tokens < 1) {
    throw Error(Code::bad_request, "prefill_step_size", fmt::format("got {}, wanted at least 1", options.prefill_step_tokens));
  }
  if (options.max_kv_size_tokens < 0) {
    throw Error(Code::bad_request, "max_kv_size", fmt::format("got {}, wanted 0 (unbounded) or more", options.max_kv_size_tokens));
  }
  cache::check_quantization(model.description(), options.kv_quantization);
  if (!caches.empty()) cache::check_fits(caches, model.description());
  const auto tokens = static_cast<int64_t>(prompt.size());
  check_available(prompt_bytes(model, tokens, options, caches), tokens + cache::prompt_tokens(caches));
}

/** After a chunk the caches tell what a number really takes. */
void check_growth(const model::CausalModel& model, int64_t tokens_to_come, const Options& options, const cache::Caches& caches) {
  if (value_bytes(caches) == 0) return;
  check_available(prompt_bytes(model, tokens_to_come, options, caches), tokens_to_come + cache::prompt_tokens(caches));
}

/** As in the reference, the last token of a prompt then sees what quantization left of the others, and all that a bounded cache holds. */
bool last_token_alone(const Options& options, const cache::Caches& caches) {
  if (options.kv_quantization.bits > 0 || options.max_kv_size_tokens > 0) return true;
  return std::ranges::any_of(caches, [](const cache::CachePtr& c) {
    const auto* attention = dynamic_cast<const cache::AttentionCache*>(c.get());
    return attention != nullptr && attention->offset() > 0 && attention->max_size() > 0;
  });
}

/** One chunk of a prompt; false when it was cancelled, and then the caches are as before. */
bool run_chunk(model::CausalModel& model, const int* tokens, int count, const Options& options, cache::Caches& caches) {
  Undo undo(caches, count, options.cancel != nullptr);
  const model::StopScope scope(model, options.cancel);
  model.run(mx::array(tokens, {count}, mx::int32), {{count, 0, &caches}});
  if (options.cancel != nullptr) evaluate_state(caches);
  if (is_set(options.cancel)) {
    undo.back();
    return false;
  }
  cache::quantize_caches(caches, options.kv_quantization);
  evaluate_state(caches);
  mx::clear_cache();
  return true;
}

/** Runs all but the last token of a prompt, or, unless `whole`, all but what one more step takes; returns how many, or nothing when
 * cancelled. */
std::optional<int> run_chunks(model::CausalModel& model, const std::vector<int>& prompt, const Options& options, cache::Caches& caches,
                              bool whole) {
  const int total = static_cast<int>(prompt.size());
  const int alone = last_token_alone(options, caches) ? 1 : 0, last = whole ? 0 : alone > 0 ? alone : options.prefill_step_tokens;
  const int boundary = std::min(options.prefill_boundary, total - 1);
  int processed = 0;
  if (options.on_prefill) options.on_prefill(0, total);
  while (total - processed > last || processed < boundary) {
    int count = std::min(options.prefill_step_tokens, std::max(1, total - processed - alone));
    if (processed < boundary) count = std::min(count, boundary - processed);
    if (is_set(options.cancel) || !run_chunk(model, prompt.data() + processed, count, options, caches)) return std::nullopt;
    processed += count;
    check_growth(model, total - processed, options, caches);
    if (options.on_prefill && (processed < total || whole)) options.on_prefill(processed, total);
  }
  return processed;
}

/** A token that was sampled on the device. */
struct Sampled {
  mx::array token;  // int32 [1]
  Told told{};
  std::vector<mx::array> arrays() const {
    std::vector<mx::array> all{token};
    if (told.logprob) all.push_back(*told.logprob);
    if (told.logprobs) all.push_back(*told.logprobs);
    return all;
  }
};

/** The loop over one sequence. */
class Generation {
 public:
  Generation(model::CausalModel& model, const text::Tokenizer& tokenizer, const std::vector<int>& prompt, const Options& options,
             cache::Caches* caches)
      : model_(model),
        tokenizer_(tokenizer),
        prompt_(prompt),
        options_(options),
        keeps_caches_(caches != nullptr),
        caches_(caches ? *caches : own_caches_),
        sampler_(options.sampler),
        stops_(options.stop),
        detokenizer_(tokenizer.make_detokenizer()) {
    validate();
    if (caches_.empty()) caches_ = cache::make_caches(model.description(), options.max_kv_size_tokens);
    const int vocab = model.description().vocab;
    if (options.draft_model != nullptr) {
      drafter_ = std::make_unique<ModelDrafter>(*options.draft_model, vocab, options.max_kv_size_tokens, options.prefill_step_tokens,
                                                sampler_, options.processors, options.draft_memory);
    } else if (options.ngram_draft_tokens > 0) {
      drafter_ = std::make_unique<NgramDrafter>();
    }
  }

  Response run(const std::function<bool(const Response&)>& on_response);

 private:
  void validate() const;
  void validate_drafts() const;
  std::optional<Sampled> prefill();
  Sampled step(const mx::array& tokens) { return sample_from(model_.run(tokens, {{tokens.shape(0), 1, &caches_}})); }
  Sampled sample_from(mx::array logits);
  void decode(Sampled current);
  void make_room(int tokens);
  void decode_speculatively(const Sampled& first);
  bool draft_and_check(Trail& trail, int last_token);
  mx::array normalized(const mx::array& logits) const;
  Told told(const mx::array& logprobs, const mx::array& token) const;
  bool deliver(int token, const Told& told, bool from_draft);
  Response response(int token, const Told& told) const;
  Response finish(Response last, Finish reason);
  bool keeps_history() const { return options_.processors.any() || drafter_; }
  bool cancelled() const { return is_set(options_.cancel); }
  bool is_last(int count) const { return options_.max_tokens >= 0 && count >= options_.max_tokens; }

  model::CausalModel& model_;
  const text::Tokenizer& tokenizer_;
  const std::vector<int>& prompt_;
  const Options& options_;
  const bool keeps_caches_;
  cache::Caches own_caches_;
  cache::Caches& caches_;
  sample::Sampler sampler_;
  text::StopMatcher stops_;
  std::unique_ptr<text::Detokenizer> detokenizer_;
  std::unique_ptr<Drafter> drafter_;  // null = plain decoding
  const std::function<bool(const Response&)>* on_response_ = nullptr;
  Response last_;              // what was delivered last
  bool last_is_held_ = false;  // speculation: the last token is in the caches
  std::vector<int> history_;   // context, prompt and generated tokens, only for processors and drafts
  int count_ = 0;              // generated tokens
  int drafted_ = 0, accepted_ = 0;
  int held_at_start_ = 0;    // speculation: tokens in the caches beside those of history_
  int64_t room_tokens_ = 0;  // that the caches may hold before memory must be asked for
  double prompt_s_ = 0;
  Clock::time_point decode_start_{};
};

void Generation::validate() const {
  const int vocab = model_.description().vocab;
  if (options_.max_tokens == 0 || options_.max_tokens < -1) {
    throw Error(Code::bad_request, "max_tokens", fmt::format("got {}, wanted at least 1, or -1 for no limit", options_.max_tokens));
  }
  sample::check(options_.sampler, vocab);
  sample::check(options_.processors, vocab);
  check_prompt(model_, prompt_, options_, caches_);
  validate_drafts();
}

void Generation::validate_drafts() const {
  constexpr int most = 256;
  const int tokens = options_.draft_tokens, ngram_tokens = options_.ngram_draft_tokens;
  if (options_.draft_model != nullptr && (tokens < 1 || tokens > most)) {
    throw Error(Code::bad_request, "num_draft_tokens", fmt::format("got {}, wanted 1 to {}", tokens, most));
  }
  if (ngram_tokens < 0 || ngram_tokens > most) {
    throw Error(Code::bad_request, "ngram_draft_tokens", fmt::format("got {}, wanted 0 (off) to {}", ngram_tokens, most));
  }
  if (options_.draft_model != nullptr && ngram_tokens > 0) {
    throw Error(Code::bad_request, "ngram_draft_tokens", "got both it and a draft model, wanted one of them");
  }
  if (options_.draft_model != nullptr) {
    const auto& drafts = *options_.draft_model;
    const auto tokens = static_cast<int64_t>(options_.context.size() + prompt_.size());
    const int64_t held = options_.draft_memory ? cache::total_bytes(options_.draft_memory->caches) : 0;
    const CacheSizes sizes{.max_kv_size_tokens = options_.max_kv_size_tokens, .value_bytes = drafts.cache_value_bytes()};
    check_available(cache_bytes(drafts.description(), tokens, sizes) - held, tokens);
  }
}

/** Log-probabilities, unless only the maximum matters: normalizing does not move it. */
mx::array Generation::normalized(const mx::array& logits) const {
  if (sampler_.greedy() && !options_.want_logprob && !options_.want_logprobs) return logits;
  return sample::log_probabilities(logits);
}

/** logprobs [1, V], token [1]. */
Told Generation::told(const mx::array& logprobs, const mx::array& token) const {
  Told told;
  if (options_.want_logprob || options_.want_logprobs) {
    const auto chosen = mx::take_along_axis(logprobs, mx::expand_dims(token, 1), -1);
    told.logprob = mx::astype(mx::reshape(chosen, {}), mx::float32);
  }
  if (options_.want_logprobs) told.logprobs = mx::contiguous(mx::astype(mx::reshape(logprobs, {-1}), mx::float32));
  return told;
}

/** After the call that gave the logits. */
Sampled Generation::sample_from(mx::array logits) {
  cache::quantize_caches(caches_, options_.kv_quantization);
  if (options_.processors.any()) logits = sample::process(logits, history_, options_.processors);
  const auto logprobs = normalized(logits);
  const auto token = sampler_(logprobs);
  return {token, told(logprobs, token)};
}

/** Runs the prompt and samples the first token; nothing when it was cancelled. */
std::optional<Sampled> Generation::prefill() {
  const int total = static_cast<int>(prompt_.size());
  const auto processed = run_chunks(model_, prompt_, options_, caches_, false);
  if (!processed || cancelled()) return std::nullopt;
  if (keeps_history()) {
    history_ = options_.context;
    history_.insert(history_.end(), prompt_.begin(), prompt_.end());
  }
  const int count = total - *processed;
  Undo undo(caches_, count, options_.cancel != nullptr);
  const model::StopScope scope(model_, options_.cancel);
  const auto logits = model_.run(mx::array(prompt_.data() + *processed, {count}, mx::int32), {{count, 1, &caches_}});
  if (options_.cancel != nullptr) {  // before anything is quantized, which there is no way back from
    mx::eval(logits);
    evaluate_state(caches_);
  }
  if (cancelled()) {
    undo.back();
    return std::nullopt;
  }
  Sampled first = sample_from(logits);
  mx::eval(first.arrays());
  mx::clear_cache();
  if (drafter_) drafter_->read(history_, options_.cancel);
  if (options_.on_prefill) options_.on_prefill(total, total);
  return first;
}

Response Generation::response(int token, const Told& told) const {
  Response r;
  r.token = token;
  if (told.logprob) r.logprob = mx::array(*told.logprob).item<float>();
  if (told.logprobs) {
    mx::array all = *told.logprobs;
    mx::eval(all);
    r.logprobs.assign(all.data<float>(), all.data<float>() + all.size());
  }
  r.prompt_tokens = static_cast<int>(prompt_.size());
  r.prompt_tokens_per_s = r.prompt_tokens / prompt_s_;
  r.generation_tokens = count_;
  r.generation_tokens_per_s = count_ / seconds_since(decode_start_);
  r.drafted_tokens = drafted_;
  r.accepted_tokens = accepted_;
  r.peak_memory_gb = peak_memory_gb();
  return r;
}

/** What the detokenizer and the stop matcher still hold belongs to the last response. */
Response Generation::finish(Response last, Finish reason) {
  detokenizer_->finalize();
  last.text += stops_.feed(detokenizer_->take_segment());
  last.text += stops_.flush();
  last.finish = stops_.stopped() ? Finish::stop : reason;
  return last;
}

/** Hands the next token over; false when it was the last one. */
bool Generation::deliver(int token, const Told& told, bool from_draft) {
  ++count_;
  if (from_draft) ++accepted_;
  const bool last = is_last(count_);
  const bool at_end = !options_.ignore_eos && tokenizer_.eos_token_ids().contains(token);
  Response r = response(token, told);
  r.from_draft = from_draft;
  if (!at_end) {
    detokenizer_->add_token(token);
    r.text = stops_.feed(detokenizer_->take_segment());
  }
  const bool over = at_end || last || stops_.stopped() || cancelled();
  if (over) {
    r = finish(std::move(r), at_end ? Finish::stop : cancelled() && !last ? Finish::cancelled : Finish::length);
  }
  last_ = std::move(r);
  if (!(*on_response_)(last_) && !over) last_.finish = Finish::cancelled;
  if (count_ % 256 == 0) mx::clear_cache();
  return last_.finish == Finish::none;
}

Response Generation::run(const std::function<bool(const Response&)>& on_response) {
  on_response_ = &on_response;
  const auto start = Clock::now();
  auto first = prefill();
  prompt_s_ = seconds_since(start);
  decode_start_ = Clock::now();
  if (!first) {
    last_.prompt_tokens = static_cast<int>(prompt_.size());
    last_.peak_memory_gb = peak_memory_gb();
    last_.finish = Finish::cancelled;
    on_response(last_);
  } else if (drafter_) {
    decode_speculatively(*first);
  } else {
    decode(std::move(*first));
  }
  return std::move(last_);
}

/** Before the caches take so many tokens more. */
void Generation::make_room(int tokens) {
  if (cache::prompt_tokens(caches_) + tokens <= room_tokens_) return;
  room_tokens_ = check_answer(model_.description(), caches_, tokens, sizes_of(model_, options_, caches_));
}

/** The next token is computed while the last one is handed over. */
void Generation::decode(Sampled current) {
  while (true) {
    std::optional<Sampled> next;
    // Processors need the token itself before the next step can be described.
    if (options_.processors.any()) history_.push_back(current.token.item<int>());
    if (!is_last(count_ + 1) || keeps_caches_) {
      make_room(1);
      next = step(current.token);
      mx::async_eval(next->arrays());
    }
    const int token = current.token.item<int>();
    if (!deliver(token, current.told, false)) {
      if (next) mx::eval(next->arrays());  // no work may outlive the caches it writes to
      return;
    }
    current = std::move(*next);
  }
}

void Generation::decode_speculatively(const Sampled& first) {
  Trail trail(model_, caches_);
  held_at_start_ = cache::prompt_tokens(caches_) - static_cast<int>(history_.size());
  const int token = mx::array(first.token).item<int>();
  history_.push_back(token);
  bool more = deliver(token, first.told, false);
  while (more) more = draft_and_check(trail, history_.back());
  drafter_->finish();
  if (!keeps_caches_) return;
  make_room(1);
  if (!last_is_held_) mx::eval(trail.run({history_.back()}, 0));
  trail.settle();
  evaluate_state(caches_);
}

/** One call of the model over the last token and a draft of what follows. False when a token that came out of it was the last one. */
bool Generation::draft_and_check(Trail& trail, int last_token) {
  int most = options_.draft_model != nullptr ? options_.draft_tokens : options_.ngram_draft_tokens;
  if (options_.max_tokens >= 0) most = std::min(most, options_.max_tokens - count_ - 1);
  // No call may cross the token from which on the caches are quantized.
  const auto& quantization = options_.kv_quantization;
  const int held = held_at_start_ + static_cast<int>(history_.size()) - 1;  // tokens in the caches
  if (quantization.bits > 0 && held < quantization.start_tokens) most = std::min(most, quantization.start_tokens - held - 1);
  while (most > 0 && !trail.one_call_agrees(most + 1)) --most;
  const auto draft = most > 0 ? drafter_->propose(history_, most) : Draft{};
  const int drafted = static_cast<int>(draft.tokens.size());
  std::vector<int> tokens{last_token};
  tokens.insert(tokens.end(), draft.tokens.begin(), draft.tokens.end());
  make_room(drafted + 1 + trail.pending());
  trail.mark(drafted + 1, true);
  auto logits = trail.run(tokens, drafted + 1);
  const auto row = [](const mx::array& a, int i) { return mx::slice(a, {i, 0}, {i + 1, a.shape(1)}); };
  if (options_.processors.any()) {
    std::vector<mx::array> rows;
    auto before = history_;
    for (int i = 0; i <= drafted; ++i) {
      if (i > 0) before.push_back(draft.tokens[i - 1]);
      rows.push_back(sample::process(row(logits, i), before, options_.processors));
    }
    logits = mx::concatenate(rows, 0);
  }
  const auto logprobs = normalized(logits);
  const auto verdict = sampler_.judge(logprobs, draft.tokens, draft.probabilities);
  drafted_ += drafted;
  int kept = 1;  // of `tokens`
  bool more = true;
  for (int i = 0; i <= verdict.accepted && more; ++i) {
    last_is_held_ = i < verdict.accepted;
    const int token = last_is_held_ ? draft.tokens[i] : verdict.token;
    if (last_is_held_) ++kept;
    history_.push_back(token);
    more = deliver(token, told(row(logprobs, i), mx::array({token}, {1}, mx::int32)), last_is_held_);
  }
  trail.back_to(kept);
  // Tokens that run again were before those that see a quantized cache.
  if (quantization.bits > 0 && held < quantization.start_tokens && held + kept >= quantization.start_tokens) trail.settle();
  cache::quantize_caches(caches_, options_.kv_quantization);
  return more;
}

}  // namespace

const char* finish_name(Finish finish) {
  constexpr const char* names[] = {"", "stop", "length", "cancelled"};
  return names[static_cast<int>(finish)];
}

int64_t prompt_bytes(const model::CausalModel& model, int64_t tokens, const Options& options, const cache::Caches& caches) {
  const auto all = tokens + cache::prompt_tokens(caches);
  return cache_bytes(model.description(), all, sizes_of(model, options, caches)) - cache::total_bytes(caches);
}

bool prefill(model::CausalModel& model, const std::vector<int>& prompt, const Options& options, cache::Caches& caches) {
  check_prompt(model, prompt, options, caches);
  if (caches.empty()) caches = cache::make_caches(model.description(), options.max_kv_size_tokens);
  return run_chunks(model, prompt, options, caches, true).has_value();
}

/** MLX's allocator does not see mapped and packed weights, which is where a CPU model lies. */
void end_evaluation() noexcept {
  try {
    mx::synchronize();
  } catch (...) {
  }
}

double peak_memory_gb() {
  const auto allocated = static_cast<int64_t>(mx::get_peak_memory());
  return static_cast<double>(on_gpu() ? allocated : std::max(allocated, peak_resident_bytes())) / 1e9;
}

Response stream_generate(model::CausalModel& model, const text::Tokenizer& tokenizer, const std::vector<int>& prompt,
                         const Options& options, const std::function<bool(const Response&)>& on_response, cache::Caches* caches) {
  Generation generation(model, tokenizer, prompt, options, caches);
  try {
    return generation.run(on_response);
  } catch (...) {
    end_evaluation();
    throw;
  }
}

}  // namespace mlxlm::gen
