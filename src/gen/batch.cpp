// Translates between the reference's batch calls and the engine's requests and events.
#include "gen/batch.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include <fmt/format.h>
#include <mlx/device.h>
#include <mlx/memory.h>

#include "base/error.h"
#include "cache/layer_shape.h"
#include "cache/prompt_file.h"
#include "gen/memory.h"
#include "gen/shared_prefix.h"
#include "plan/plan.h"

namespace mlxlm::gen {
namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

BatchGenerator::Stats stats_of(const engine::Counters& c, double start_s) {
  return {.prompt_tokens = c.prompt_tokens,
          .generation_tokens = c.generated_tokens,
          .steps = c.steps,
          .generation_steps = c.decode_steps,
          .decode_tokens = c.decode_tokens,
          .drafted_tokens = c.drafted_tokens,
          .accepted_tokens = c.accepted_tokens,
          .prompt_s = c.prompt_s,
          .decode_s = c.decode_s,
          .wall_s = now_s() - start_s,
          .peak_memory_gb = peak_memory_gb(),
          .reused_tokens = c.reused_tokens};
}

void set(engine::Request& r, const cache::Quantization& q) {
  r.kv_bits = q.bits;
  r.kv_group_size = q.group_size;
  r.quantized_kv_start = q.start_tokens;
}

/** What caches were made with, where they forget more than the model asks for; 0 = they do not. */
int max_kv_size_of(const cache::Caches& caches, const arch::Model& model) {
  const auto layout = plan::cache_layout(model);
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const auto* attention = dynamic_cast<const cache::AttentionCache*>(caches[i].get());
    const int size = attention != nullptr ? attention->max_size() : 0;
    if (size > 0 && (layout[i].kind != plan::CacheKind::rotating || size < layout[i].window_tokens)) return size;
  }
  return 0;
}

/** Caches from elsewhere go on as what they are. */
void give(engine::Request& r, cache::Caches caches, const arch::Model& model, ModelRunner& runner) {
  cache::check_prompt_quantization(caches, r.kv_bits, r.kv_bits > 0 ? r.kv_group_size : 0);
  cache::check_fits(caches, model);
  r.max_kv_size_tokens = max_kv_size_of(caches, model);
  r.cache = runner.adopt(std::move(caches));
}

}  // namespace

engine::Limits default_limits(int max_sequences) {
  engine::Limits limits{.max_sequences = max_sequences};
  if (const auto free = available_bytes()) limits.memory_bytes = std::max<int64_t>(1, *free / 10 * 9);
  return limits;
}

BatchGenerator::BatchGenerator(model::CausalModel& model, BatchOptions options, bool keep_caches)
    : model_(model),
      options_(std::move(options)),
      keep_caches_(keep_caches),
      runner_(model_, options_.limits, options_.draft_model),
      engine_(runner_, options_.limits),
      start_s_(now_s()) {
  if (options_.tokenizer != nullptr) texts_.emplace(*options_.tokenizer);
}

std::vector<BatchGenerator::Uid> BatchGenerator::insert(const std::vector<std::vector<int>>& prompts, const std::vector<int>& max_tokens) {
  if (!max_tokens.empty() && max_tokens.size() != prompts.size()) {
    throw Error(Code::bad_request, "max_tokens",
                fmt::format("got {} values, wanted one for each of {} prompts", max_tokens.size(), prompts.size()));
  }
  std::vector<Insert> inserts;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    Insert one{.segments = {prompts[i]}};
    if (!max_tokens.empty()) one.max_tokens = max_tokens[i];
    inserts.push_back(std::move(one));
  }
  return insert_segments(std::move(inserts));
}

std::vector<BatchGenerator::Uid> BatchGenerator::insert_segments(std::vector<Insert> inserts) {
  std::vector<Uid> uids;
  try {
    for (auto& one : inserts) uids.push_back(submit(std::move(one)));
  } catch (...) {
    remove(uids);
    throw;
  }
  return uids;
}

BatchGenerator::Uid BatchGenerator::submit(Insert one) {
  engine::Request r{.max_tokens = one.max_tokens.value_or(options_.max_tokens),
                    .stop = one.stop_tokens.value_or(options_.stop_tokens),
                    .sampling = one.sampling.value_or(options_.sampling),
                    .mask = std::move(one.mask),
                    .max_kv_size_tokens = one.max_kv_size_tokens.value_or(options_.max_kv_size_tokens),
                    .drafts = one.drafts.value_or(options_.drafts),
                    .cache_tokens = std::move(one.all_tokens),
                    .keep_cache = keep_caches_};
  set(r, one.kv_quantization.value_or(options_.kv_quantization));
  const int held = cache::prompt_tokens(one.caches);
  Open open{.held_tokens = held};
  for (const auto& segment : one.segments) {
    r.tokens.insert(r.tokens.end(), segment.begin(), segment.end());
    if (!segment.empty()) open.boundaries.push_back(held + static_cast<int>(r.tokens.size()));
  }
  if (!open.boundaries.empty()) open.boundaries.pop_back();  // the end of the prompt is no boundary
  r.boundaries = open.boundaries;
  if (!one.caches.empty()) give(r, std::move(one.caches), model_.description(), runner_);
  const auto uid = engine_.submit(std::move(r));
  open_.emplace(uid, std::move(open));
  if (texts_) texts_->begin(uid, one.stop);
  return uid;
}

std::pair<std::vector<BatchGenerator::PromptResponse>, std::vector<BatchGenerator::Response>> BatchGenerator::next() {
  Taken taken;
  for (auto& event : engine_.step().events) take(event, taken);
  for (auto& event : engine_.take_events()) take(event, taken);  // of those that a text ended just now
  return {std::move(taken.prompts), std::move(taken.responses)};
}

void BatchGenerator::take(engine::Event& e, Taken& taken) {
  // Behind a stop text nothing counts, but the last event has the caches.
  if (const auto at = taken.stopped.find(e.id); at != taken.stopped.end()) return give_caches(e, taken.responses[at->second]);
  const auto found = open_.find(e.id);
  if (found == open_.end()) return runner_.free(e.cache);
  auto& open = found->second;
  const bool badly = e.finish == engine::Finish::failed || e.finish == engine::Finish::cancelled;
  if (open.in_prompt && !badly && (!e.chosen || e.processed_tokens == e.prompt_tokens)) {
    const bool done = e.chosen.has_value();
    taken.prompts.push_back({e.id, std::max(0, e.processed_tokens - open.held_tokens), e.prompt_tokens - open.held_tokens,
                             done || std::ranges::count(open.boundaries, e.processed_tokens) > 0, done});
  }
  if (!e.chosen && e.finish == engine::Finish::none) return;
  open.in_prompt = false;
  Response r{.uid = e.id, .from_draft = e.from_draft, .finish = e.finish, .error = e.error};
  if (texts_) {
    auto [text, stopped] = texts_->take(e);
    r.text = std::move(text);
    if (stopped && !badly && r.finish != engine::Finish::stop) {
      engine_.end(e.id, engine::Finish::stop);
      r.finish = engine::Finish::stop;
      taken.stopped.emplace(e.id, taken.responses.size());
    }
  }
  r.chosen = std::move(e.chosen);
  give_caches(e, r);
  if (r.finish != engine::Finish::none) open_.erase(e.id);
  taken.responses.push_back(std::move(r));
}

void BatchGenerator::give_caches(engine::Event& e, Response& response) {
  if (e.cache == 0) return;
  try {
    response.caches = runner_.take(e.cache);
  } catch (...) {
    response.error = engine::current_error();
    return;
  }
  response.all_tokens = std::move(e.cache_tokens);
}

std::vector<BatchGenerator::Response> BatchGenerator::next_generated() {
  while (true) {
    auto [prompts, responses] = next();
    if (!responses.empty() || !engine_.has_work()) return std::move(responses);
  }
}

std::map<BatchGenerator::Uid, std::pair<cache::Caches, std::vector<int>>> BatchGenerator::extract_cache(const std::vector<Uid>& uids) {
  std::map<Uid, std::pair<cache::Caches, std::vector<int>>> found;
  for (const auto uid : uids) {
    if (!open_.contains(uid)) continue;
    auto& [caches, tokens] = found[uid];
    auto held = engine_.cache_of(uid);
    if (!held) continue;
    caches = cache::copy(runner_.caches(held->first));
    tokens = std::move(held->second);
  }
  return found;
}

std::map<BatchGenerator::Uid, std::pair<cache::Caches, std::vector<int>>> BatchGenerator::remove(const std::vector<Uid>& uids,
                                                                                                 bool return_prompt_caches) {
  auto found = return_prompt_caches ? extract_cache(uids) : decltype(extract_cache(uids)){};
  for (const auto uid : uids) {
    engine_.cancel(uid);
    open_.erase(uid);
    if (texts_) texts_->end(uid);
  }
  // Their last events are nobody's concern; those of others stay.
  engine_.drop_events([&](const engine::Event& e) {
    const bool theirs = std::ranges::count(uids, e.id) > 0;
    if (theirs && e.cache != 0) runner_.free(e.cache);
    return theirs;
  });
  return found;
}

int64_t BatchGenerator::prompt_cache_bytes() const {
  int64_t bytes = 0;
  for (const auto& q : engine_.snapshot().sequences) bytes += q.held.bytes;
  return bytes;
}

BatchGenerator::Stats BatchGenerator::stats() const {
  return stats_of(engine_.counters(), start_s_);
}

namespace {

engine::Limits limits_of(const BatchRun& run) {
  constexpr int64_t without_folder = int64_t{1} << 30;  // where no memory limit is known
  auto limits = run.limits;
  if (limits.prefix_cache_bytes > 0) return limits;
  const auto most = run.prefixes.folder.empty() ? limits.memory_bytes > 0 ? limits.memory_bytes : without_folder : run.prefixes.bytes;
  limits.prefix_cache_bytes = limits.memory_bytes > 0 ? std::min(most, limits.memory_bytes / 4) : most;
  return limits;
}

/** Where each prompt leaves a copy of its cache: for others of the batch, and in a folder also for itself, where an end cannot be cut. */
std::vector<std::vector<int>> boundaries_of(const arch::Model& model, const std::vector<BatchItem>& items, bool folder) {
  constexpr int least_tokens = 16;
  std::vector<std::span<const int>> prompts;
  for (const auto& item : items) {  // who brings a cache stores nothing
    const bool brings = item.caches != nullptr && !item.caches->empty();
    prompts.push_back(brings ? std::span<const int>() : std::span<const int>(item.prompt));
  }
  auto boundaries = shared_prefixes(prompts, least_tokens);
  const bool forgets = std::ranges::any_of(plan::cache_layout(model), [](const auto& layer) {
    return layer.kind != plan::CacheKind::none && layer.kind != plan::CacheKind::full;
  });
  for (std::size_t i = 0; folder && forgets && i < items.size(); ++i) {
    const int last = static_cast<int>(items[i].prompt.size()) - 1;
    if (last >= least_tokens && (boundaries[i].empty() || boundaries[i].back() < last)) boundaries[i].push_back(last);
  }
  return boundaries;
}

class Batch {
 public:
  Batch(model::CausalModel& model, const text::Tokenizer& tokenizer, const std::vector<BatchItem>& items, const BatchRun& run)
      : model_(model),
        tokenizer_(tokenizer),
        texts_(tokenizer),
        items_(items),
        run_(run),
        boundaries_(boundaries_of(model.description(), items, !run.prefixes.folder.empty())),
        answers_(items.size()),
        runner_(model, run.limits, run.draft_model),
        engine_(runner_, limits_of(run)) {
    runner_.stop_when(run.cancel);
    if (run.prefixes.folder.empty()) return;
    store_ = std::make_unique<PrefixFiles>(run.prefixes, model, runner_);
    engine_.set_store(store_.get());
  }

  std::vector<BatchAnswer> run(BatchGenerator::Stats* stats) {
    const double start = now_s();
    const auto read = [&] { return stats_of(engine_.counters(), start); };
    submit_some();
    while (engine_.has_work()) {
      if (run_.cancel && run_.cancel->load(std::memory_order_relaxed)) cancel_all();
      for (const auto& event : engine_.step().events) take(event);
      if (run_.on_step) run_.on_step(read());
      submit_some();
    }
    for (const auto& event : engine_.take_events()) take(event);
    if (stats) *stats = read();
    return std::move(answers_);
  }

 private:
  /** Copies of caches are made for those only that come next. */
  void submit_some() {
    while (next_ < items_.size() && (items_[next_].caches == nullptr || takes_now(*items_[next_].caches)) && submit(next_)) ++next_;
  }

  bool takes_now(const cache::Caches& caches) const {
    if (!engine_.has_work()) return true;
    if (open_.size() >= refused_beside_) return false;  // nothing has ended since
    const auto memory = engine_.memory();
    return engine_.waiting() < run_.limits.max_sequences &&
           (memory.limit_bytes == 0 || memory.reserved_bytes + static_cast<int64_t>(cache::total_bytes(caches)) <= memory.limit_bytes);
  }

  /** False: not yet, for want of memory that others have. */
  bool submit(std::size_t i) {
    const auto& item = items_[i];
    auto& answer = answers_[i];
    answer.prompt_tokens = static_cast<int>(item.prompt.size());
    engine::Request r{.tokens = item.prompt,
                      .max_tokens = item.max_tokens,
                      .sampling = item.sampling,
                      .max_kv_size_tokens = item.max_kv_size_tokens,
                      .drafts = item.drafts,
                      .store_at_end = !run_.prefixes.folder.empty(),  // no prompt of the batch begins with an answer of it
                      .boundaries = boundaries_[i],
                      .keep_cache = run_.keep_caches};
    set(r, item.kv_quantization);
    if (!item.ignore_eos) {
      for (const int eos : tokenizer_.eos_token_ids()) r.stop.push_back({eos});
    }
    try {
      if (item.caches != nullptr && !item.caches->empty()) give(r, cache::copy(*item.caches), model_.description(), runner_);
      const auto id = engine_.submit(std::move(r));
      open_.emplace(id, i);
      index_.emplace(id, i);
      texts_.begin(id, item.stop);
      refused_beside_ = std::numeric_limits<std::size_t>::max();
    } catch (...) {
      const auto error = engine::current_error();
      if (error.code() == Code::out_of_memory && item.caches != nullptr && engine_.has_work()) {
        refused_beside_ = open_.size();
        return false;
      }
      answer.error = error;
      if (run_.on_answer) run_.on_answer(i, answer);
    }
    return true;
  }

  void cancel_all() {
    for (const auto& [id, index] : open_) engine_.cancel(id);
    while (next_ < items_.size()) end(next_++, Finish::cancelled);
  }

  void end(std::size_t i, Finish finish) {
    answers_[i].finish = finish;
    if (run_.on_answer) run_.on_answer(i, answers_[i]);
  }

  void take(const engine::Event& e) {
    if (e.cache != 0) take_caches(e);
    const auto found = open_.find(e.id);
    if (found == open_.end()) return;
    const auto index = found->second;
    auto& answer = answers_[index];
    // A step that was stopped counts for nothing, and so does its failure.
    const bool stopped_step = e.error && e.error->code() == Code::cancelled;
    auto finish = stopped_step ? engine::Finish::cancelled : e.finish;
    if (e.chosen) {
      ++answer.generation_tokens;
      answer.accepted_tokens += e.from_draft;
      if (finish != engine::Finish::stop) {  // the engine stops at the end of text only
        answer.tokens.push_back(e.chosen->token);
        if (items_[index].sampling.want_logprob) answer.logprobs.push_back(e.chosen->logprob);
      }
    }
    const auto [text, stopped] = texts_.take(e);
    answer.text += text;
    if (stopped && finish == engine::Finish::none) {
      engine_.end(e.id, engine::Finish::stop);
      finish = engine::Finish::stop;
    }
    if (run_.on_text && !text.empty() && !run_.on_text(index, text) && finish == engine::Finish::none) {
      engine_.cancel(e.id);
      texts_.end(e.id);
      finish = engine::Finish::cancelled;
    }
    if (finish == engine::Finish::none) return;
    open_.erase(found);
    if (!stopped_step) answer.error = e.error;
    end(index, finish == engine::Finish::failed            ? Finish::none
               : stopped || finish == engine::Finish::stop ? Finish::stop
               : finish == engine::Finish::cancelled       ? Finish::cancelled
                                                           : Finish::length);
  }

  /** Those of an answer that a text or a callback ended come with a later event. */
  void take_caches(const engine::Event& e) {
    try {
      answers_[index_.at(e.id)].caches = runner_.take(e.cache);
    } catch (...) {
      answers_[index_.at(e.id)].error = engine::current_error();
    }
  }

  model::CausalModel& model_;
  const text::Tokenizer& tokenizer_;
  TextEvents texts_;
  const std::vector<BatchItem>& items_;
  const BatchRun& run_;
  std::vector<std::vector<int>> boundaries_;
  std::vector<BatchAnswer> answers_;
  ModelRunner runner_;
  std::unique_ptr<PrefixFiles> store_;
  engine::Engine engine_;                                                 // saves its prefixes when it ends
  std::map<engine::SequenceId, std::size_t> open_, index_;                // of the item; index_: of all that were submitted
  std::size_t next_ = 0;                                                  // item to submit
  std::size_t refused_beside_ = std::numeric_limits<std::size_t>::max();  // so many open answers left no room for it
};

}  // namespace

std::vector<BatchAnswer> batch_generate(model::CausalModel& model, const text::Tokenizer& tokenizer, const std::vector<BatchItem>& items,
                                        const BatchRun& run, BatchGenerator::Stats* stats) {
  return Batch(model, tokenizer, items, run).run(stats);
}

}  // namespace mlxlm::gen
