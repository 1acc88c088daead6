// Who runs what in the next step: decoding rows first, then prompts, as far as budget and memory go.
#include <algorithm>
#include <limits>

#include <fmt/format.h>

#include "engine/sequence.h"

namespace mlxlm::engine {
namespace {

constexpr int64_t kMoreTokens[] = {1024, 64, 1};  // reserved at a time for answers without a limit, as room allows
constexpr int kAnswerTokens = 256;                // of an answer, for which a cache is made large enough at once
constexpr int kMostSharedSteps = 32;
constexpr int kLeastSharedTokens = 8;  // less is not worth the copy of a cache in use

}  // namespace

StepPlan Engine::schedule() {
  if (in_step_) throw Error(Code::internal, "schedule", "the last step was neither committed nor failed");
  StepPlan plan{.number = ++step_};
  if (!plan_suspect(plan)) {
    plan_decode(plan);
    const auto decode_rows = plan.rows.size();
    plan_drafts(plan);
    plan_prompts(plan, plan.tokens());
    const bool shared = decode_rows > 0 && plan.rows.size() > decode_rows;
    shared_steps_ = shared ? shared_steps_ + 1 : 0;
  }
  for (const auto& row : plan.rows) find(row.sequence)->in_step = true;
  in_step_ = !plan.rows.empty();
  return plan;
}

/** Tokens of a prompt that holds so many already, were it the only one. */
int Engine::prompt_budget(int decode_rows, int held_tokens) const {
  if (decode_rows > 0 && limits_.step_tokens > 0) return std::clamp(limits_.step_tokens - decode_rows, 0, limits_.prefill_tokens);
  // Now and then decoding has a step of its own, so that the pacer knows what it takes as contexts grow.
  if (decode_rows > 0 && shared_steps_ >= kMostSharedSteps) return 0;
  return pacer_.prompt_tokens(decode_rows, held_tokens);
}

/** Tokens of its next row: up to budget, the end of the sequence, the next boundary or the token from which on its cache is quantized. */
int Engine::chunk_of(const Sequence& q, int budget) const {
  const auto& cache = q.cache_options;
  if (cache.kv_bits > 0 && q.computed_tokens < cache.quantized_from_tokens)
    budget = std::min(budget, cache.quantized_from_tokens - q.computed_tokens);
  if (q.fixed_chunks || q.overflows(q.tokens.size())) {
    // As it would be alone: a prompt in chunks of one size and its last token, what is replayed of the answer token by token.
    if (q.computed_tokens >= q.prompt_tokens) return 1;
    if (!q.fixed_chunks && !q.overflows(q.prompt_tokens)) return std::min(budget, q.prompt_tokens - q.computed_tokens);
    const int brought = static_cast<int>(q.request.cache_tokens.size()), chunk = limits_.limited_chunk_tokens;  // brought: never replaced
    const int end = brought + ((q.computed_tokens - brought) / chunk + 1) * chunk;
    return std::max(1, std::min(end, q.prompt_tokens - 1) - q.computed_tokens);
  }
  int count = std::min(budget, q.pending_tokens());
  for (const int at : q.request.boundaries) {
    if (at > q.computed_tokens) count = std::min(count, at - q.computed_tokens);
  }
  return count;
}

/** Returns the tokens planned. */
int Engine::add_row(StepPlan& plan, Sequence& q, int budget) const {
  const int count = chunk_of(q, budget);
  PlannedRow row{.sequence = q.id, .cache = q.cache};
  const auto first = q.tokens.begin() + q.computed_tokens;
  row.tokens.assign(first, first + count);
  row.wanted_rows = count == q.pending_tokens() ? 1 : 0;
  if (row.wanted_rows > 0 && q.request.sampling.needs_history()) row.history.assign(q.known_tokens().begin(), q.known_tokens().end());
  plan.rows.push_back(std::move(row));
  return count;
}

/** After a step that failed its requests are replayed one at a time, and nobody else runs: only so is it known who is at fault. */
bool Engine::plan_suspect(StepPlan& plan) {
  while (true) {
    Sequence* suspect = nullptr;
    for (const auto id : running_) {
      if (suspect == nullptr && find(id)->suspect_until_tokens > 0) suspect = find(id);
    }
    if (suspect == nullptr && !waiting_.empty() && find(waiting_.front())->suspect_until_tokens > 0) suspect = find(waiting_.front());
    if (suspect == nullptr) return false;
    const auto admission = suspect->running ? Admission::admitted : admit(*suspect);
    if (admission == Admission::failed) continue;
    if (admission != Admission::admitted) return false;  // those that run, or come before it, will make room
    add_row(plan, *suspect, limits_.prefill_tokens);
    return true;
  }
}

void Engine::plan_decode(StepPlan& plan) {
  for (const auto id : std::vector<SequenceId>(running_)) {
    auto* q = find(id);
    if (q != nullptr && q->running && q->decoding() && static_cast<int64_t>(q->tokens.size()) > q->reserved_tokens) extend(*q);
  }
  for (const auto id : running_) {  // as far as they did not give way
    auto* q = find(id);
    if (q->decoding()) add_row(plan, *q, 1);
  }
}

/** How many tokens of a draft may become part of the answer, one after them included, and find room. */
int Engine::most_drafts(const Sequence& q) const {
  int most = q.request.mask ? 0 : std::min<int64_t>(q.request.drafts.most(), q.reserved_tokens - static_cast<int64_t>(q.tokens.size()));
  if (q.request.max_tokens >= 0) most = std::min(most, q.request.max_tokens - q.generated_tokens() - 1);
  if (limits_.max_context_tokens > 0) most = std::min(most, limits_.max_context_tokens - static_cast<int>(q.tokens.size()) - 1);
  const auto& cache = q.cache_options;
  if (cache.kv_bits > 0 && q.computed_tokens < cache.quantized_from_tokens)
    most = std::min(most, cache.quantized_from_tokens - q.computed_tokens - 1);
  return most;
}

/** Guesses for the decoding rows, which share what a step may check. */
void Engine::plan_drafts(StepPlan& plan) {
  std::vector<DraftWanted> wanted;
  std::vector<std::size_t> row_of;
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    const auto& q = *find(plan.rows[i].sequence);
    const int most = q.request.drafts.most() > 0 ? most_drafts(q) : 0;
    if (most <= 0) continue;
    wanted.push_back({q.id, q.cache, q.known_tokens(), most});
    row_of.push_back(i);
  }
  if (wanted.empty()) return;
  int together = limits_.draft_tokens;
  if (limits_.step_tokens > 0) together = std::min(together, (limits_.step_tokens - static_cast<int>(plan.rows.size())) / 2);
  const int share = std::max(0, together / static_cast<int>(wanted.size()));
  if (share == 0) return;
  for (auto& w : wanted) w.most = std::min(w.most, share);
  std::vector<std::vector<int>> drafts;
  try {
    drafts = runner_.draft(wanted);
  } catch (...) {
    return;  // a guess is never worth an answer
  }
  for (std::size_t i = 0; i < row_of.size() && i < drafts.size(); ++i) {
    auto& row = plan.rows[row_of[i]];
    const auto count = std::min<std::size_t>(drafts[i].size(), wanted[i].most);
    row.draft.assign(drafts[i].begin(), drafts[i].begin() + static_cast<std::ptrdiff_t>(count));
    row.wanted_rows += static_cast<int>(count);
    counters_.drafted_tokens += static_cast<int64_t>(count);
  }
}

/** Whether a running prompt will soon store more of this one than there is to use now: then it pays to wait for it. */
bool Engine::is_about_to_be_stored(const Sequence& q) {
  if (limits_.prefix_cache_bytes == 0 || !may_reuse(q)) return false;
  int most = 0;
  for (const auto id : running_) {
    const auto& other = *find(id);
    const auto& at = other.request.boundaries;
    if (other.next_boundary >= at.size() || !other.request.use_prefix_cache || prefix_space(other) != prefix_space(q)) continue;
    const auto end = other.tokens.begin() + std::min<std::ptrdiff_t>(other.prompt_tokens, static_cast<std::ptrdiff_t>(q.tokens.size()) - 1);
    const auto shared = static_cast<int>(std::mismatch(other.tokens.begin(), end, q.tokens.begin()).first - other.tokens.begin());
    for (const int boundary : at) {
      if (boundary > other.computed_tokens && boundary <= shared && !other.overflows(boundary)) most = std::max(most, boundary);
    }
  }
  if (most < kLeastSharedTokens) return false;
  const auto hit = find_reusable(q);
  return !hit || most >= hit->usable_tokens + kLeastSharedTokens;
}

/** Prompts begun go on in order of admission; what is left of the budget admits others in order of arrival. */
void Engine::plan_prompts(StepPlan& plan, int decode_rows) {
  double left = 1;  // of the budget, which is another number of tokens for each prompt
  const auto budget_of = [&](int held_tokens) {
    return std::max(0, static_cast<int>(left * prompt_budget(decode_rows, held_tokens) + 1e-6));
  };
  const auto add = [&](Sequence& q, int budget) {
    left -= static_cast<double>(add_row(plan, q, budget)) / prompt_budget(decode_rows, q.computed_tokens);
  };
  for (const auto id : running_) {
    auto* q = find(id);
    if (q->decoding()) continue;
    if (const int budget = budget_of(q->computed_tokens); budget > 0) add(*q, budget);
  }
  while (budget_of(0) > 0 && !waiting_.empty() && static_cast<int>(running_.size()) < limits_.max_sequences) {
    auto* q = find(waiting_.front());
    if (is_about_to_be_stored(*q)) return;
    const auto admission = admit(*q);
    if (admission == Admission::deferred) return;  // nobody overtakes, so that large requests get their turn
    if (admission == Admission::admitted)
      add(*q, std::max(1, budget_of(q->computed_tokens)));  // else the next one, which may have overtaken it
  }
}

/** As the request would have them alone: chunks end at a multiple of their size, before the last token of the prompt, and after it. */
CacheOptions Engine::cache_options(const Request& r) const {
  CacheOptions o{
      .max_kv_size_tokens = r.max_kv_size_tokens, .with_drafts = r.drafts.most() > 0, .with_draft_model = r.drafts.model_tokens > 0};
  if (r.kv_bits == 0) return o;
  o.kv_bits = r.kv_bits;
  o.kv_group_size = r.kv_group_size;
  const int64_t begin = static_cast<int64_t>(r.cache_tokens.size()), end = begin + static_cast<int64_t>(r.tokens.size());
  const int64_t chunk = limits_.limited_chunk_tokens, start = std::max<int64_t>(r.quantized_kv_start, begin + 1);
  int64_t at = begin + (start - begin + chunk - 1) / chunk * chunk;
  if (at >= end) at = start <= end - 1 ? end - 1 : std::max(start, end);
  o.quantized_from_tokens = static_cast<int>(std::min<int64_t>(at, std::numeric_limits<int>::max()));
  return o;
}

uint64_t Engine::prefix_space(const Sequence& q) const {
  return engine::prefix_space(q.cache_options);
}

uint64_t prefix_space(const CacheOptions& o) {
  auto space = static_cast<uint64_t>(o.max_kv_size_tokens);
  if (o.kv_bits > 0) {
    for (const auto part : {o.kv_bits, o.kv_group_size, o.quantized_from_tokens})
      space = (space ^ static_cast<uint64_t>(part)) * 1099511628211ull + 1;
  }
  return space;
}

/** The least that so many tokens of it will take: in the cache that it has, or in one that is made for it. */
int64_t Engine::least_bytes(const Sequence& q, int64_t tokens) const {
  return q.replaceable ? runner_.cost_bytes(tokens, q.cache_options) : runner_.growth_bytes(q.cache, std::nullopt, tokens, q.cache_options);
}

int64_t Engine::tokens_to_reserve(const Sequence& q) const {
  const auto held = static_cast<int64_t>(q.tokens.size());
  const auto cap = limits_.max_context_tokens > 0 ? limits_.max_context_tokens : std::numeric_limits<int64_t>::max();
  if (q.request.max_tokens >= 0) return std::min<int64_t>(static_cast<int64_t>(q.prompt_tokens) + q.request.max_tokens, cap);
  const auto room = limits_.memory_bytes - (q.replaceable ? 0 : reserved_bytes_);  // what cannot give way takes it at once
  for (const auto more : kMoreTokens) {
    if (limits_.memory_bytes == 0 || least_bytes(q, held + more) <= room) return std::min<int64_t>(held + more, cap);
  }
  return held;
}

int64_t Engine::unwritten_bytes() const {
  return store_ != nullptr ? store_->unwritten_bytes() : 0;
}

/** True when so many more bytes may be held; what the store has not yet written gives way, then stored prefixes, but not in vain. */
bool Engine::make_room(int64_t bytes) {
  if (limits_.memory_bytes == 0) return true;
  const int64_t left = limits_.memory_bytes - reserved_bytes_ - bytes;
  if (left < 0) return false;
  if (store_ != nullptr) store_->shrink_unwritten(std::max<int64_t>(0, left - prefixes_.bytes()));
  release(prefixes_.shrink_to(left - unwritten_bytes()));
  return true;
}

/** Beside the prefix in memory, and never more than prefixes may take there. */
bool Engine::has_room_to_save(int64_t bytes) const {
  const auto unwritten = unwritten_bytes() + bytes;
  if (unwritten > limits_.prefix_cache_bytes) return false;
  return limits_.memory_bytes == 0 || reserved_bytes_ + prefixes_.bytes() + bytes + unwritten <= limits_.memory_bytes;
}

/** As make_room(), for one more stored prefix: older ones make room before it is there, so that the budget holds meanwhile. */
bool Engine::make_room_for_prefix(int64_t bytes) {
  if (bytes > limits_.prefix_cache_bytes || !make_room(bytes)) return false;
  release(prefixes_.shrink_to(limits_.prefix_cache_bytes - bytes));
  return true;
}

bool Engine::may_reuse(const Sequence& q) const {
  return q.cache == 0 && q.request.use_prefix_cache && !q.fixed_chunks && !q.overflows(q.tokens.size());
}

/** What of the sequence is computed already: in a stored cache, or in one that is in use and can be cut. */
std::optional<PrefixCache::Hit> Engine::find_reusable(const Sequence& q) {
  const auto& options = q.cache_options;
  // What is quantized later was computed from floats, so only a cache that was converted at the same token serves, and not shortened beyond
  // it.
  const auto serves = [&](int held, int usable) {
    return options.kv_bits == 0 || held < options.quantized_from_tokens || usable >= options.quantized_from_tokens;
  };
  if (!may_reuse(q)) return std::nullopt;
  auto best = prefixes_.find(q.tokens, prefix_space(q));
  if (best && !serves(best->entry.tokens, best->usable_tokens)) best.reset();
  for (const auto id : running_) {
    const auto& other = *find(id);
    if (!other.request.use_prefix_cache || prefix_space(other) != prefix_space(q)) continue;
    const auto most = std::min<std::size_t>(other.computed_tokens, q.tokens.size() - 1);
    const auto end = other.tokens.begin() + static_cast<std::ptrdiff_t>(most);
    const int shared = static_cast<int>(std::mismatch(other.tokens.begin(), end, q.tokens.begin()).first - other.tokens.begin());
    if (shared < kLeastSharedTokens || (best && shared <= best->usable_tokens)) continue;
    const auto info = runner_.info(other.cache);
    if (info.trimmable && serves(info.tokens, shared)) best = PrefixCache::Hit{{other.cache, info.tokens, info.bytes, true}, shared};
  }
  return best;
}

/** What outlived an earlier engine joins the stored prefixes, where it spares more than they do. One read a sequence, deferred or not. */
void Engine::load_stored(Sequence& q) {
  if (q.has_read_store || !may_reuse(q)) return;
  const auto space = prefix_space(q);
  const auto found = store_->find(q.tokens, space);
  if (found.usable_tokens == 0) return;
  const auto held = find_reusable(q);
  if ((held && held->usable_tokens >= found.usable_tokens) || !make_room_for_prefix(found.bytes)) return;
  q.has_read_store = true;
  const auto loaded = store_->load(q.tokens, space);
  if (loaded.cache == 0) return;
  const auto info = runner_.info(loaded.cache);
  release(prefixes_.insert(loaded.tokens, {loaded.cache, 0, info.bytes, info.trimmable}, space));
  make_room(0);
}

/** Of the request that came last; false when nobody but q has one. */
bool Engine::give_up_brought_cache(const Sequence& q) {
  for (auto id = waiting_.rbegin(); id != waiting_.rend(); ++id) {
    auto& other = *find(*id);
    if (&other == &q || other.cache == 0 || !other.replaceable) continue;
    drop_cache(other);
    return true;
  }
  return false;
}

/** Whether another one waits with a cache that cannot give way. */
bool Engine::has_holder(const Sequence& q) const {
  return std::ranges::any_of(waiting_, [&](SequenceId id) { return id != q.id && !find(id)->replaceable; });
}

/** Nobody runs, and what those in the queue hold leaves no room for q: the first of them has room of its own, so it comes first. */
bool Engine::let_holder_pass(const Sequence& q) {
  if (!q.replaceable || !has_holder(q)) return false;
  const auto holder = std::ranges::find_if(waiting_, [&](SequenceId id) { return !find(id)->replaceable; });
  const auto id = *holder;
  waiting_.erase(holder);
  waiting_.push_front(id);
  return true;
}

Engine::Admission Engine::admit(Sequence& q) {
  const auto tokens = q.reserved_tokens > 0 ? q.reserved_tokens : tokens_to_reserve(q);  // of a cache that cannot give way: already
  auto bytes =
      q.cache != 0 ? runner_.growth_bytes(q.cache, std::nullopt, tokens, q.cache_options) : runner_.cost_bytes(tokens, q.cache_options);
  if (static_cast<int>(running_.size()) >= limits_.max_sequences) return Admission::deferred;
  if (store_ != nullptr) load_stored(q);
  auto hit = find_reusable(q);
  const auto with_hit = hit ? runner_.growth_bytes(hit->entry.cache, hit->usable_tokens, tokens, q.cache_options) : bytes;
  if (hit && limits_.memory_bytes > 0 && reserved_bytes_ + hit->entry.bytes + with_hit > limits_.memory_bytes) hit.reset();
  if (hit) bytes = with_hit;
  while (!make_room(bytes - q.reserved_bytes)) {
    // With nobody running there is nothing to wait for but what others have brought, which can be computed again.
    if (!running_.empty()) return Admission::deferred;
    if (give_up_brought_cache(q)) continue;
    if (q.cache != 0 && q.replaceable) {
      drop_cache(q);
      bytes = runner_.cost_bytes(tokens, q.cache_options);
      continue;
    }
    if (let_holder_pass(q)) return Admission::overtaken;
    fail(q, Error(Code::out_of_memory, "prompt",
                  fmt::format("a cache for {} tokens needs {:.3f} GB, available are {:.3f} GB", tokens, static_cast<double>(bytes) / 1e9,
                              static_cast<double>(limits_.memory_bytes) / 1e9)));
    return Admission::failed;
  }
  try {
    if (hit) {
      q.cache = runner_.copy(hit->entry.cache, hit->usable_tokens);
      runner_.adapt(q.cache, q.cache_options);
      q.computed_tokens = q.reused_tokens = hit->usable_tokens;
      counters_.reused_tokens += hit->usable_tokens;
    } else if (q.cache == 0) {
      q.cache = runner_.reserve(std::min<int64_t>(tokens, static_cast<int64_t>(q.tokens.size()) + kAnswerTokens), q.cache_options);
    } else {
      runner_.adapt(q.cache, q.cache_options);
    }
  } catch (...) {
    fail(q, current_error());
    return Admission::failed;
  }
  q.reserved_tokens = tokens;
  reserved_bytes_ += bytes - q.reserved_bytes;
  q.reserved_bytes = bytes;
  q.running = true;
  std::erase(waiting_, q.id);
  running_.push_back(q.id);
  return Admission::admitted;
}

/** Others give up what can be computed again, for an answer that is alone or cannot give way itself. False when there is no more of that.
 */
bool Engine::take_room_for(const Sequence& q) {
  if (q.replaceable && running_.size() > 1) return false;
  if (give_up_brought_cache(q)) return true;
  for (auto id = running_.rbegin(); id != running_.rend(); ++id) {
    auto& other = *find(*id);
    if (&other == &q || !other.replaceable) continue;
    preempt(other);
    return true;
  }
  return false;
}

/** More room for an answer without a limit; without it the request gives way, or ends. */
void Engine::extend(Sequence& q) {
  const auto held = static_cast<int64_t>(q.tokens.size());
  do {
    for (const auto more : kMoreTokens) {
      const auto bytes = std::max(q.reserved_bytes, runner_.growth_bytes(q.cache, std::nullopt, held + more, q.cache_options));
      if (!make_room(bytes - q.reserved_bytes)) continue;
      reserved_bytes_ += bytes - q.reserved_bytes;
      q.reserved_bytes = bytes;
      q.reserved_tokens = held + more;
      return;
    }
  } while (take_room_for(q));
  if (q.replaceable && (running_.size() > 1 || has_holder(q))) return preempt(q);  // the others will end one day
  const auto needed = runner_.growth_bytes(q.cache, std::nullopt, held + 1, q.cache_options);
  auto what = fmt::format("a cache for {} tokens needs {:.3f} GB, available are {:.3f} GB", held + 1, static_cast<double>(needed) / 1e9,
                          static_cast<double>(limits_.memory_bytes - reserved_bytes_ + q.reserved_bytes) / 1e9);
  if (!q.replaceable) what += fmt::format(", and it cannot be computed again later: {}", q.why_not_replaceable());
  fail(q, Error(Code::out_of_memory, "answer", what));
}

/** Back to the head of the queue; what was computed is computed again. */
void Engine::preempt(Sequence& q) {
  drop_cache(q);
  q.next_boundary = 0;
  q.running = false;
  std::erase(running_, q.id);
  waiting_.push_front(q.id);
}

}  // namespace mlxlm::engine
