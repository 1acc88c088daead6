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
#include "cache/prompt_file.h"
#include "gen/memory.h"
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

void evaluate_state(const cache::Caches& caches) {
  std::vector<mx::array> arrays;
  for (const auto& c : caches) {
    if (!c) continue;
    auto state = c->state();
    arrays.insert(arrays.end(), state.begin(), state.end());
  }
  mx::eval(arrays);
}

CacheSizes sizes_of(const Options& options, int value_bytes) {
  return {options.max_kv_size_tokens, value_bytes, options.kv_quantization, options.prefill_step_tokens};
}

/** Throws unless `tokens` can be run, and what they add to `caches` fits into memory. */
void check_prompt(const arch::Model& model, const std::vector<int>& prompt, const Options& options, const cache::Caches& caches) {
  const int vocab = model.vocab;
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
  cache::check_quantization(model, options.kv_quantization);
  if (on_gpu()) return;
  // The dtype of an empty cache is not known yet: 2 bytes a number is the least it can be. check_growth() knows better after a chunk.
  const int64_t tokens = static_cast<int64_t>(prompt.size()) + cache::prompt_tokens(caches);
  const int bytes = value_bytes(caches);
  check_available(cache_bytes(model, tokens, sizes_of(options, bytes > 0 ? bytes : 2)) - cache::total_bytes(caches), tokens);
}

/** After a chunk the caches tell what a number really takes. */
void check_growth(const arch::Model& model, int64_t tokens_to_come, const Options& options, const cache::Caches& caches) {
  const int bytes = value_bytes(caches);
  if (on_gpu() || bytes == 0) return;
  const int64_t tokens = tokens_to_come + cache::prompt_tokens(caches);
  check_available(cache_bytes(model, tokens, sizes_of(options, bytes)) - cache::total_bytes(caches), tokens);
}

/** As in the reference, the last token of a prompt then sees what quantization left of the others, and all that a bounded cache holds. */
bool last_token_alone(const Options& options, const cache::Caches& caches) {
  if (options.kv_quantization.bits > 0 || options.max_kv_size_tokens > 0) return true;
  return std::ranges::any_of(caches, [](const cache::CachePtr& c) {
    const auto* attention = dynamic_cast<const cache::AttentionCache*>(c.get());
    return attention != nullptr && attention->offset() > 0 && attention->max_size() > 0;
  });
}

/** Runs all but the last token of a prompt, or, unless `whole`, all but what one more step takes; returns how many, or nothing when cancelled. */
std::optional<int> run_chunks(model::CausalModel& model, const std::vector<int>& prompt, const Options& options, cache::Caches& caches, bool whole) {
  const int total = static_cast<int>(prompt.size());
  const int alone = last_token_alone(options, caches) ? 1 : 0, last = whole ? 0 : alone > 0 ? alone : options.prefill_step_tokens;
  int processed = 0;
  if (options.on_prefill) options.on_prefill(0, total);
  while (total - processed > last) {
    if (options.cancel && options.cancel->load(std::memory_order_relaxed)) return std::nullopt;
    const int count = std::min(options.prefill_step_tokens, std::max(1, total - processed - alone));
    model.run(mx::array(prompt.data() + processed, {count}, mx::int32), {{count, 0, &caches}});
    cache::quantize_caches(caches, options.kv_quantization);
    evaluate_state(caches);
    mx::clear_cache();
    processed += count;
    check_growth(model.description(), total - processed, options, caches);
    if (options.on_prefill && (processed < total || whole)) options.on_prefill(processed, total);
  }
  return processed;
}

/** A token that was sampled on the device, and what is to be told about it. */
struct Sampled {
  mx::array token;  // int32 [1]
  std::optional<mx::array> logprob{}, logprobs{};
  std::vector<mx::array> arrays() const {
    std::vector<mx::array> all{token};
    if (logprob) all.push_back(*logprob);
    if (logprobs) all.push_back(*logprobs);
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
  }

  Response run(const std::function<bool(const Response&)>& on_response);

 private:
  void validate() const;
  std::optional<Sampled> prefill();
  Sampled step(const mx::array& tokens);
  Response response(const Sampled& sampled, int token) const;
  Response finish(Response last, Finish reason);
  bool cancelled() const { return options_.cancel && options_.cancel->load(std::memory_order_relaxed); }
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
  std::vector<int> history_;  // prompt and generated tokens, only for processors
  int count_ = 0;             // generated tokens
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
  check_prompt(model_.description(), prompt_, options_, caches_);
}

Sampled Generation::step(const mx::array& tokens) {
  auto logits = model_.run(tokens, {{tokens.shape(0), 1, &caches_}});
  cache::quantize_caches(caches_, options_.kv_quantization);
  if (options_.processors.any()) logits = sample::process(logits, history_, options_.processors);
  const bool greedy = options_.sampler.temperature == 0.f;
  // Normalizing does not move the maximum, so plain greedy decoding skips it.
  if (greedy && !options_.want_logprob && !options_.want_logprobs) return {sampler_(logits)};
  const auto logprobs = logits - mx::logsumexp(logits, -1, true);
  Sampled sampled{sampler_(logprobs)};
  if (options_.want_logprob || options_.want_logprobs) {
    const auto chosen = mx::take_along_axis(logprobs, mx::expand_dims(sampled.token, 1), -1);
    sampled.logprob = mx::astype(mx::reshape(chosen, {}), mx::float32);
  }
  if (options_.want_logprobs) sampled.logprobs = mx::contiguous(mx::astype(mx::reshape(logprobs, {-1}), mx::float32));
  return sampled;
}

/** Runs the prompt and samples the first token; nothing when it was cancelled. */
std::optional<Sampled> Generation::prefill() {
  const int total = static_cast<int>(prompt_.size());
  const auto processed = run_chunks(model_, prompt_, options_, caches_, false);
  if (!processed || cancelled()) return std::nullopt;
  if (options_.processors.any()) history_ = prompt_;
  Sampled first = step(mx::array(prompt_.data() + *processed, {total - *processed}, mx::int32));
  mx::eval(first.arrays());
  mx::clear_cache();
  if (options_.on_prefill) options_.on_prefill(total, total);
  return first;
}

Response Generation::response(const Sampled& sampled, int token) const {
  Response r;
  r.token = token;
  if (sampled.logprob) r.logprob = mx::array(*sampled.logprob).item<float>();
  if (sampled.logprobs) {
    mx::array all = *sampled.logprobs;
    mx::eval(all);
    r.logprobs.assign(all.data<float>(), all.data<float>() + all.size());
  }
  r.prompt_tokens = static_cast<int>(prompt_.size());
  r.prompt_tokens_per_s = r.prompt_tokens / prompt_s_;
  r.generation_tokens = count_;
  r.generation_tokens_per_s = count_ / seconds_since(decode_start_);
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

Response Generation::run(const std::function<bool(const Response&)>& on_response) {
  const auto start = Clock::now();
  auto current = prefill();
  prompt_s_ = seconds_since(start);
  decode_start_ = Clock::now();
  if (!current) {
    Response none;
    none.prompt_tokens = static_cast<int>(prompt_.size());
    none.peak_memory_gb = peak_memory_gb();
    none.finish = Finish::cancelled;
    on_response(none);
    return none;
  }
  while (true) {
    ++count_;
    const bool last = is_last(count_);
    std::optional<Sampled> next;
    // Processors need the token itself before the next step can be described.
    if (options_.processors.any()) history_.push_back(current->token.item<int>());
    if (!last || keeps_caches_) {
      next = step(current->token);
      mx::async_eval(next->arrays());
    }
    const int token = current->token.item<int>();
    const bool at_end = !options_.ignore_eos && tokenizer_.eos_token_ids().contains(token);
    Response r = response(*current, token);
    if (!at_end) {
      detokenizer_->add_token(token);
      r.text = stops_.feed(detokenizer_->take_segment());
    }
    const bool over = at_end || last || stops_.stopped() || cancelled();
    if (over) {
      r = finish(std::move(r), at_end ? Finish::stop : cancelled() && !last ? Finish::cancelled : Finish::length);
    }
    const bool wanted = on_response(r);
    if (over || !wanted) {
      if (next) mx::eval(next->arrays());  // no work may outlive the caches it writes to
      if (!over) r.finish = Finish::cancelled;
      return r;
    }
    if (count_ % 256 == 0) mx::clear_cache();
    current = std::move(next);
  }
}

}  // namespace

bool prefill(model::CausalModel& model, const std::vector<int>& prompt, const Options& options, cache::Caches& caches) {
  check_prompt(model.description(), prompt, options, caches);
  if (caches.empty()) caches = cache::make_caches(model.description(), options.max_kv_size_tokens);
  return run_chunks(model, prompt, options, caches, true).has_value();
}

/** MLX's allocator does not see mapped and packed weights, which is where a CPU model lies. */
double peak_memory_gb() {
  const auto allocated = static_cast<int64_t>(mx::get_peak_memory());
  return static_cast<double>(on_gpu() ? allocated : std::max(allocated, peak_resident_bytes())) / 1e9;
}

Response stream_generate(model::CausalModel& model, const text::Tokenizer& tokenizer, const std::vector<int>& prompt,
                         const Options& options, const std::function<bool(const Response&)>& on_response, cache::Caches* caches) {
  return Generation(model, tokenizer, prompt, options, caches).run(on_response);
}

}  // namespace mlxlm::gen
