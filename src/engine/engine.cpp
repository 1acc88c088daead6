// Requests in, events out: what happens outside of planning a step.
#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <utility>

#include <fmt/format.h>

#include "engine/sequence.h"

namespace mlxlm::engine {
namespace {

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool ends_with(std::span<const int> tokens, std::span<const int> suffix) {
  return !suffix.empty() && suffix.size() <= tokens.size() && std::ranges::equal(tokens.last(suffix.size()), suffix);
}

}  // namespace

void check(const Drafts& d) {
  const auto within = [](const char* name, int value) {
    if (value < 0 || value > Drafts::most_tokens) {
      throw Error(Code::bad_request, name, fmt::format("got {}, wanted 0 (off) to {}", value, Drafts::most_tokens));
    }
  };
  within("ngram_draft_tokens", d.ngram_tokens);
  within("num_draft_tokens", d.model_tokens);
  if (d.ngram_tokens > 0 && d.model_tokens > 0) {
    throw Error(Code::bad_request, "ngram_draft_tokens", "got both it and a draft model, wanted one of them");
  }
}

Error current_error() {
  try {
    throw;
  } catch (const Error& e) {
    return e;
  } catch (const std::bad_alloc&) {
    return Error(Code::out_of_memory, "step", "memory could not be had");
  } catch (const std::exception& e) {
    return Error(Code::internal, "step", e.what());
  } catch (...) {
    return Error(Code::internal, "step", "an unknown exception");
  }
}

Engine::Engine(Runner& runner, Limits limits, std::function<double()> clock)
    : runner_(runner),
      limits_(limits),
      clock_(clock ? std::move(clock) : steady_seconds),
      pacer_(limits.pace, limits.least_prefill_tokens, limits.prefill_tokens),
      prefixes_(limits.prefix_cache_bytes) {
  const auto at_least = [](const char* name, double value, double least) {
    if (!(value >= least)) throw Error(Code::bad_request, name, fmt::format("got {}, wanted at least {}", value, least));
  };
  at_least("max_sequences", limits.max_sequences, 1);
  at_least("prefill_tokens", limits.prefill_tokens, 1);
  at_least("least_prefill_tokens", limits.least_prefill_tokens, 1);
  at_least("pace", limits.pace, 1);
  at_least("step_tokens", limits.step_tokens, 0);
  at_least("draft_tokens", limits.draft_tokens, 0);
  at_least("limited_chunk_tokens", limits.limited_chunk_tokens, 1);
  at_least("max_context_tokens", limits.max_context_tokens, 0);
  at_least("memory_bytes", static_cast<double>(limits.memory_bytes), 0);
  at_least("prefix_cache_bytes", static_cast<double>(limits.prefix_cache_bytes), 0);
  if (limits.least_prefill_tokens > limits.prefill_tokens) pacer_ = Pacer(limits.pace, limits.prefill_tokens, limits.prefill_tokens);
}

Engine::~Engine() {
  for (auto& [id, q] : sequences_) {
    if (q->cache != 0) runner_.free(q->cache);
    runner_.end(id);
  }
  for (const auto& held : prefixes_.contents()) {
    if (store_ != nullptr) store_->save(held.entry.cache, held.tokens, held.space);
    release(prefixes_.shrink_to(prefixes_.bytes() - held.entry.bytes));  // this one, the oldest: what is saved is not held twice
  }
  release(prefixes_.shrink_to(0));
}

Engine::Sequence* Engine::find(SequenceId id) const {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : found->second.get();
}

void Engine::validate(const Request& r) const {
  if (r.tokens.empty()) throw Error(Code::bad_request, "prompt", "got no tokens, wanted at least one");
  if (r.max_tokens == 0 || r.max_tokens < -1) {
    throw Error(Code::bad_request, "max_tokens", fmt::format("got {}, wanted at least 1, or -1 for no limit", r.max_tokens));
  }
  if (r.max_kv_size_tokens < 0) {
    throw Error(Code::bad_request, "max_kv_size", fmt::format("got {}, wanted 0 (unbounded) or more", r.max_kv_size_tokens));
  }
  if (r.cache == 0 && !r.cache_tokens.empty()) throw Error(Code::bad_request, "cache", "got tokens of a cache, and no cache");
  if (r.quantized_kv_start < 0) {
    throw Error(Code::bad_request, "quantized_kv_start", fmt::format("got {}, wanted 0 or more", r.quantized_kv_start));
  }
  engine::check(r.drafts);
  const auto cache = cache_options(r);
  runner_.check(r.tokens, r.sampling, cache, r.drafts);
  if (!r.cache_tokens.empty()) runner_.check(r.cache_tokens, r.sampling, cache, r.drafts);
  if (r.cache != 0 && runner_.info(r.cache).tokens != static_cast<int>(r.cache_tokens.size())) {
    throw Error(Code::bad_request, "cache",
                fmt::format("holds {} tokens, {} were named", runner_.info(r.cache).tokens, r.cache_tokens.size()));
  }
  const auto prompt = static_cast<int64_t>(r.tokens.size() + r.cache_tokens.size());
  if (limits_.max_context_tokens > 0 && prompt >= limits_.max_context_tokens) {
    throw Error(Code::bad_request, "prompt",
                fmt::format("got {} tokens, wanted less than {} (the context)", prompt, limits_.max_context_tokens));
  }
}

/** Throws unless the request fits: at all, and a cache that cannot give way while it waits, now. */
void Engine::check_memory(const Sequence& q) {
  if (limits_.memory_bytes == 0) return;
  const auto gb = [](int64_t bytes) { return static_cast<double>(bytes) / 1e9; };
  const auto tokens = static_cast<int64_t>(q.prompt_tokens) + (q.request.max_tokens < 0 ? 1 : q.request.max_tokens);
  const auto needed = least_bytes(q, tokens);
  if (needed > limits_.memory_bytes) {
    throw Error(Code::out_of_memory, "prompt",
                fmt::format("a cache for {} tokens needs {:.3f} GB, wanted at most {:.3f} GB, which all requests share", tokens, gb(needed),
                            gb(limits_.memory_bytes)));
  }
  if (q.replaceable) return;
  const auto bytes = least_bytes(q, tokens_to_reserve(q));
  if (make_room(bytes)) return;
  throw Error(Code::out_of_memory, "cache",
              fmt::format("takes {:.3f} GB, available are {:.3f} GB, and it cannot be computed again later: {}", gb(bytes),
                          gb(limits_.memory_bytes - reserved_bytes_), q.why_not_replaceable()));
}

SequenceId Engine::submit(Request request) {
  auto q = std::make_unique<Sequence>();
  try {
    if (request.cache != 0)
      q->unknown_tokens = std::max(0, runner_.info(request.cache).tokens - static_cast<int>(request.cache_tokens.size()));
    if (q->unknown_tokens > 0) {
      request.cache_tokens.insert(request.cache_tokens.begin(), q->unknown_tokens, 0);
      request.use_prefix_cache = false;
    }
    validate(request);
    q->id = last_id_ + 1;
    q->tokens = request.cache_tokens;
    q->tokens.insert(q->tokens.end(), request.tokens.begin(), request.tokens.end());
    q->prompt_tokens = static_cast<int>(q->tokens.size());
    q->computed_tokens = static_cast<int>(request.cache_tokens.size());
    q->cache = request.cache;
    std::ranges::sort(request.boundaries);
    q->cache_options = cache_options(request);
    q->fixed_chunks = q->cache_options.kv_bits > 0 && runner_.chunks_show(q->cache_options);
    q->request = std::move(request);
    q->replaceable = q->cache == 0 ||
                     (q->unknown_tokens == 0 && q->request.max_kv_size_tokens == 0 && !q->fixed_chunks && runner_.is_replaceable(q->cache));
    check_memory(*q);
    runner_.begin(q->id, q->request.sampling, q->request.mask, q->request.drafts);
  } catch (...) {
    const auto given = q->cache != 0 ? q->cache : request.cache;
    if (given != 0) runner_.free(given);
    throw;
  }
  const auto id = ++last_id_;
  hold_brought_cache(*q);
  waiting_.push_back(id);
  sequences_.emplace(id, std::move(q));
  return id;
}

/** A cache takes its memory from the moment it is brought. One that cannot be computed again cannot give way either, so it has room to
 * grow. */
void Engine::hold_brought_cache(Sequence& q) {
  if (q.cache == 0) return;
  const auto tokens = q.replaceable ? 0 : tokens_to_reserve(q);
  const auto bytes = q.replaceable ? runner_.info(q.cache).bytes : least_bytes(q, tokens);
  if (!make_room(bytes)) return drop_cache(q);
  q.reserved_tokens = tokens;
  q.reserved_bytes = bytes;
  reserved_bytes_ += bytes;
}

Event Engine::event(const Sequence& q) const {
  Event e;
  e.id = q.id;
  e.prompt_tokens = q.prompt_tokens;
  e.processed_tokens = std::min(q.computed_tokens, q.prompt_tokens);
  e.reused_tokens = q.reused_tokens;
  return e;
}

bool Engine::end(SequenceId id, Finish reason) {
  auto* q = find(id);
  if (q == nullptr || q->ended != Finish::none) return false;
  if (q->in_step) {
    q->ended = reason;  // its cache is being written
    return true;
  }
  auto last = event(*q);
  last.finish = reason;
  retire(*q, std::move(last));
  return true;
}

void Engine::fail(Sequence& q, const Error& error) {
  auto last = event(q);
  last.finish = Finish::failed;
  last.error = error;
  retire(q, std::move(last));
}

void Engine::release(const std::vector<CacheId>& caches) {
  for (const auto cache : caches) runner_.free(cache);
}

void Engine::drop_cache(Sequence& q) {
  if (q.cache != 0) runner_.free(q.cache);
  q.cache = 0;
  q.computed_tokens = 0;
  reserved_bytes_ -= q.reserved_bytes;
  q.reserved_bytes = q.reserved_tokens = 0;
}

/** The request ends here: its cache is handed over, stored or freed, and `last` tells. Destroys q. */
void Engine::retire(Sequence& q, Event last) {
  if (q.cache != 0 && last.finish != Finish::failed) {
    std::vector<int> held(q.tokens.begin() + q.unknown_tokens, q.tokens.begin() + q.computed_tokens);
    if (q.request.keep_cache) {
      last.cache = std::exchange(q.cache, 0);
      last.cache_tokens = std::move(held);
    } else if (q.request.use_prefix_cache && q.request.store_at_end && limits_.prefix_cache_bytes > 0 && q.running && !q.fixed_chunks &&
               !q.overflows(held.size())) {
      const auto info = runner_.info(q.cache);
      const auto cache = std::exchange(q.cache, 0);
      reserved_bytes_ -= q.reserved_bytes;
      q.reserved_bytes = 0;
      release(prefixes_.insert(held, {cache, 0, info.bytes, info.trimmable}, prefix_space(q)));
    }
  }
  drop_cache(q);
  runner_.end(q.id);
  std::erase(running_, q.id);
  std::erase(waiting_, q.id);
  events_.push_back(std::move(last));
  sequences_.erase(q.id);
}

void Engine::check_result(const StepPlan& plan, const StepResult& result) const {
  const auto wrong = [](const std::string& what) { throw Error(Code::internal, "step", what); };
  if (result.rows.size() != plan.rows.size()) wrong(fmt::format("got {} results, wanted {}", result.rows.size(), plan.rows.size()));
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    const auto& got = result.rows[i];
    const auto& row = plan.rows[i];
    if (got.sequence != row.sequence) wrong(fmt::format("got a result of sequence {}, wanted one of {}", got.sequence, row.sequence));
    if (got.error) continue;
    const int count = static_cast<int>(got.chosen.size());
    if (row.draft.empty() ? count != row.wanted_rows : count < 1 || count > row.wanted_rows) {
      wrong(fmt::format("sequence {}: got {} tokens, wanted {}", row.sequence, count, row.wanted_rows));
    }
    for (int k = 0; k + 1 < count; ++k) {
      if (got.chosen[k].token != row.draft[k])
        wrong(fmt::format("sequence {}: got token {} for {} of its draft", row.sequence, got.chosen[k].token, row.draft[k]));
    }
    for (const auto& chosen : got.chosen) {
      if (chosen.token < 0) wrong(fmt::format("sequence {}: got token {}", row.sequence, chosen.token));
    }
  }
}

void Engine::commit(const StepPlan& plan, const StepResult& result) {
  try {
    check_result(plan, result);
  } catch (const Error& error) {
    fail(plan, error);
    return;
  }
  in_step_ = false;
  ++counters_.steps;
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    if (auto* q = find(plan.rows[i].sequence)) commit_row(*q, plan.rows[i], result.rows[i]);
  }
}

void Engine::commit_row(Sequence& q, const PlannedRow& row, const RowResult& result) {
  q.in_step = false;
  if (result.error) return fail(q, *result.error);
  const bool in_prompt = q.computed_tokens < q.prompt_tokens;
  q.computed_tokens += static_cast<int>(row.tokens.size());
  if (q.computed_tokens >= q.suspect_until_tokens) q.suspect_until_tokens = 0;
  if (in_prompt) counters_.prompt_tokens += static_cast<int64_t>(row.tokens.size());
  if (q.ended == Finish::none && row.wanted_rows > 0) return commit_tokens(q, row, result);
  if (q.ended != Finish::none) {
    try {
      if (!row.draft.empty()) runner_.keep(q.cache, q.computed_tokens);
    } catch (...) {
      drop_cache(q);
    }
    auto last = event(q);
    last.finish = q.ended;
    return retire(q, std::move(last));
  }
  store_at_boundary(q);
  events_.push_back(event(q));
}

/** Why the answer ends with its last token, if it does. */
Finish Engine::finish_of(const Sequence& q) const {
  const auto answer = std::span<const int>(q.tokens).subspan(q.prompt_tokens);
  if (std::ranges::any_of(q.request.stop, [&](const auto& s) { return ends_with(answer, s); })) return Finish::stop;
  const bool full = limits_.max_context_tokens > 0 && static_cast<int>(q.tokens.size()) >= limits_.max_context_tokens;
  return full || q.generated_tokens() == q.request.max_tokens ? Finish::length : Finish::none;
}

/** The draft as far as it was right, and one token more; what comes after an end counts for nothing. */
void Engine::commit_tokens(Sequence& q, const PlannedRow& row, const RowResult& result) {
  if (row.draft.empty()) store_at_boundary(q);
  std::vector<Event> told;
  for (std::size_t i = 0; i < result.chosen.size(); ++i) {
    const bool from_draft = i + 1 < result.chosen.size();
    q.tokens.push_back(result.chosen[i].token);
    q.computed_tokens += from_draft;
    ++counters_.generated_tokens;
    counters_.accepted_tokens += from_draft;
    auto& e = told.emplace_back(event(q));
    e.chosen = result.chosen[i];
    e.from_draft = from_draft;
    e.finish = finish_of(q);
    if (e.finish != Finish::none) break;
  }
  auto last = std::move(told.back());
  told.pop_back();
  for (auto& e : told) events_.push_back(std::move(e));
  try {
    if (!row.draft.empty()) runner_.keep(q.cache, q.computed_tokens);
    if (last.finish == Finish::none && q.request.mask) q.request.mask->accept(last.chosen->token);
  } catch (...) {
    return fail(q, current_error());
  }
  if (last.finish != Finish::none) return retire(q, std::move(last));
  events_.push_back(std::move(last));
}

/** A copy for later prompts, where the caller said that one pays. */
void Engine::store_at_boundary(Sequence& q) {
  const auto& at = q.request.boundaries;
  bool here = false;
  while (q.next_boundary < at.size() && at[q.next_boundary] <= q.computed_tokens) here |= at[q.next_boundary++] == q.computed_tokens;
  if (!here || !q.request.use_prefix_cache || limits_.prefix_cache_bytes == 0 || q.fixed_chunks || q.overflows(q.computed_tokens)) return;
  const auto key = std::span<const int>(q.tokens).first(q.computed_tokens);
  if (prefixes_.covers(key, prefix_space(q))) return;
  const auto info = runner_.info(q.cache);
  if (!make_room_for_prefix(info.bytes)) return;
  CacheId copied = 0;
  try {
    copied = runner_.copy(q.cache, info.tokens);
    const auto held = runner_.info(copied);
    if (make_room_for_prefix(held.bytes)) {  // what a copy cannot share comes on top
      // Else it is saved when the engine ends, if it is still there.
      if (store_ != nullptr && has_room_to_save(held.bytes)) store_->save(copied, key, prefix_space(q));
      release(prefixes_.insert(key, {copied, 0, held.bytes, held.trimmable}, prefix_space(q)));
      make_room(0);
      return;
    }
  } catch (...) {
    // A copy for others is never worth an answer.
  }
  if (copied != 0) runner_.free(copied);
}

/** Nothing of the step counts. Its requests start over from their tokens, each alone, so that only the one at fault ends. */
void Engine::fail(const StepPlan& plan, const Error& error) {
  in_step_ = false;
  ++counters_.failed_steps;
  const bool alone = plan.rows.size() == 1;
  std::vector<Sequence*> replayed;
  for (const auto& row : plan.rows) {
    auto* q = find(row.sequence);
    if (q == nullptr) continue;
    q->in_step = false;
    const int reached = q->computed_tokens + static_cast<int>(row.tokens.size());
    drop_cache(*q);
    if (q->ended != Finish::none) {
      auto last = event(*q);
      last.finish = q->ended;
      retire(*q, std::move(last));
    } else if (alone) {
      fail(*q, error);
    } else if (!q->replaceable) {
      fail(*q, Error(error.code(), "cache",
                     fmt::format("was lost in a step that failed, and cannot be computed again: {}; the step: {}", q->why_not_replaceable(),
                                 error.what())));
    } else {
      q->suspect_until_tokens = std::max(q->suspect_until_tokens, reached);
      replayed.push_back(q);
    }
  }
  for (auto q = replayed.rbegin(); q != replayed.rend(); ++q) preempt(**q);
}

std::vector<Event> Engine::take_events() {
  return std::exchange(events_, {});
}

StepReport Engine::step() {
  StepReport report;
  const double start = clock_();
  const auto plan = schedule();
  const auto generated = counters_.generated_tokens, failed_steps = counters_.failed_steps;
  int first_tokens = 0;
  double held_tokens = 0;  // before each of the prompts' tokens, all together
  for (const auto& row : plan.rows) {
    const auto* q = find(row.sequence);
    if (q->decoding()) {
      ++report.decode_rows;
      report.draft_tokens += static_cast<int>(row.draft.size());
    } else {
      report.prompt_tokens += static_cast<int>(row.tokens.size());
      held_tokens += static_cast<double>(row.tokens.size()) * (q->computed_tokens + 0.5 * static_cast<double>(row.tokens.size()));
      first_tokens += row.wanted_rows;
    }
  }
  if (!plan.rows.empty()) {
    try {
      commit(plan, runner_.run(plan));
    } catch (...) {
      if (!in_step_) throw;  // a bug of ours in commit, not a failed run
      fail(plan, current_error());
    }
  }
  report.seconds = clock_() - start;
  report.generated_tokens = static_cast<int>(counters_.generated_tokens - generated);
  report.events = take_events();
  const bool ended_badly = std::ranges::any_of(report.events, [](const Event& e) { return e.finish == Finish::failed; });
  if (counters_.failed_steps > failed_steps && plan.rows.size() > 1) {
    report.outcome = Outcome::engine_failed;
  } else if (ended_badly) {
    report.outcome = Outcome::request_failed;
  } else if (!plan.rows.empty()) {
    report.outcome = Outcome::ran;
  } else {
    report.outcome = has_work() ? Outcome::capacity_deferred : Outcome::no_work;
  }
  if (!plan.rows.empty() && counters_.failed_steps == failed_steps) {
    pacer_.observe(report.decode_rows + report.draft_tokens, report.prompt_tokens, held_tokens / std::max(1, report.prompt_tokens),
                   report.seconds);
    const double decode_s = report.seconds * (plan.tokens() - report.prompt_tokens) / plan.tokens();
    counters_.decode_s += decode_s;
    counters_.prompt_s += report.seconds - decode_s;
    counters_.decode_tokens += std::max(0, report.generated_tokens - first_tokens);
    counters_.decode_steps += report.decode_rows > 0;
  }
  return report;
}

std::optional<std::pair<CacheId, std::vector<int>>> Engine::cache_of(SequenceId id) const {
  const auto* q = find(id);
  if (q == nullptr || q->cache == 0) return std::nullopt;
  return std::pair(q->cache, std::vector<int>(q->tokens.begin() + q->unknown_tokens, q->tokens.begin() + q->computed_tokens));
}

MemoryReport Engine::memory() const {
  MemoryReport report{.reserved_bytes = reserved_bytes_,
                      .stored_bytes = prefixes_.bytes(),
                      .stored_budget_bytes = prefixes_.budget_bytes(),
                      .unwritten_bytes = unwritten_bytes(),
                      .limit_bytes = limits_.memory_bytes};
  for (const auto& [id, q] : sequences_) {
    const auto held = q->cache != 0 ? runner_.info(q->cache) : CacheInfo{};
    report.held_bytes += held.bytes;
    report.requests.push_back({id, q->running, held.tokens, held.bytes, q->reserved_bytes});
  }
  return report;
}

Snapshot Engine::snapshot() const {
  Snapshot s;
  for (const auto& [id, q] : sequences_) {
    s.sequences.push_back({.id = id,
                           .running = q->running,
                           .prompt_tokens = q->prompt_tokens,
                           .tokens = static_cast<int>(q->tokens.size()),
                           .computed_tokens = q->computed_tokens,
                           .generated_tokens = q->generated_tokens(),
                           .max_tokens = q->request.max_tokens,
                           .cache = q->cache,
                           .held = q->cache != 0 ? runner_.info(q->cache) : CacheInfo{},
                           .reserved_bytes = q->reserved_bytes,
                           .reserved_tokens = q->reserved_tokens});
  }
  s.waiting.assign(waiting_.begin(), waiting_.end());
  s.running = running_;
  for (const auto& e : prefixes_.entries()) {
    s.stored.push_back({.cache = e.cache, .tokens = e.tokens, .held = runner_.info(e.cache), .bytes = e.bytes});
  }
  s.reserved_bytes = reserved_bytes_;
  s.stored_bytes = prefixes_.bytes();
  s.stored_budget_bytes = prefixes_.budget_bytes();
  s.unwritten_bytes = unwritten_bytes();
  s.memory_bytes = limits_.memory_bytes;
  s.max_sequences = limits_.max_sequences;
  return s;
}

}  // namespace mlxlm::engine
