// Translates between the reference's batch calls and the engine's requests and events.
#include "gen/batch.h"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>
#include <mlx/device.h>
#include <mlx/memory.h>

#include "base/error.h"
#include "gen/memory.h"
#include "gen/shared_prefix.h"
#include "plan/plan.h"
#include "text/stop_matcher.h"

namespace mlxlm::gen {
namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double peak_gb() {
  const auto allocated = static_cast<int64_t>(mx::get_peak_memory());
  return static_cast<double>(mx::default_device() == mx::Device::gpu ? allocated : std::max(allocated, peak_resident_bytes())) / 1e9;
}

BatchGenerator::Stats stats_of(const engine::Counters& c, double start_s) {
  return {c.prompt_tokens, c.generated_tokens, c.steps,           c.drafted_tokens, c.accepted_tokens,
          c.prompt_s,      c.decode_s,         now_s() - start_s, peak_gb(),        c.reused_tokens};
}

void set(engine::Request& r, const cache::Quantization& q) {
  r.kv_bits = q.bits;
  r.kv_group_size = q.group_size;
  r.quantized_kv_start = q.start_tokens;
}

cache::Caches copies(const cache::Caches& caches) {
  cache::Caches made;
  for (const auto& c : caches) made.push_back(c ? c->copy() : nullptr);
  return made;
}

}  // namespace

engine::Limits default_limits(int max_sequences) {
  engine::Limits limits{.max_sequences = max_sequences};
  // On a GPU free memory of the host says nothing.
  if (mx::default_device() == mx::Device::gpu) return limits;
  if (const auto free = available_bytes()) limits.memory_bytes = std::max<int64_t>(1, *free / 10 * 9);
  return limits;
}

BatchGenerator::BatchGenerator(model::CausalModel& model, BatchOptions options, bool keep_caches)
    : model_(model),
      options_(std::move(options)),
      keep_caches_(keep_caches),
      runner_(model_, options_.limits, options_.draft_model),
      engine_(runner_, options_.limits),
      start_s_(now_s()) {}

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
    for (auto& one : inserts) {
      engine::Request r{.max_tokens = one.max_tokens.value_or(options_.max_tokens),
                        .stop = one.stop_tokens.value_or(options_.stop_tokens),
                        .sampling = one.sampling.value_or(options_.sampling),
                        .mask = std::move(one.mask),
                        .max_kv_size_tokens = options_.max_kv_size_tokens,
                        .drafts = one.drafts.value_or(options_.drafts),
                        .cache_tokens = std::move(one.all_tokens),
                        .keep_cache = keep_caches_};
      set(r, one.kv_quantization.value_or(options_.kv_quantization));
      std::vector<int> ends;
      for (const auto& segment : one.segments) {
        r.tokens.insert(r.tokens.end(), segment.begin(), segment.end());
        if (!segment.empty()) ends.push_back(static_cast<int>(r.tokens.size() + r.cache_tokens.size()));
      }
      if (!ends.empty()) ends.pop_back();  // the end of the prompt is no boundary
      r.boundaries = ends;
      if (!one.caches.empty()) r.cache = runner_.adopt(std::move(one.caches));
      uids.push_back(engine_.submit(std::move(r)));
      boundaries_[uids.back()] = std::move(ends);
    }
  } catch (...) {
    remove(uids);
    throw;
  }
  return uids;
}

std::pair<std::vector<BatchGenerator::PromptResponse>, std::vector<BatchGenerator::Response>> BatchGenerator::next() {
  std::vector<PromptResponse> prompts;
  std::vector<Response> responses;
  for (auto& e : engine_.step().events) {
    const auto at = boundaries_.find(e.id);
    if (at != boundaries_.end() && (!e.chosen || e.processed_tokens == e.prompt_tokens) && e.finish != engine::Finish::failed &&
        e.finish != engine::Finish::cancelled) {
      const bool done = e.chosen.has_value();
      prompts.push_back({e.id, e.processed_tokens, e.prompt_tokens, done || std::ranges::count(at->second, e.processed_tokens) > 0, done});
    }
    if (e.chosen || e.finish != engine::Finish::none) {
      boundaries_.erase(e.id);
      Response r{.uid = e.id, .chosen = std::move(e.chosen), .from_draft = e.from_draft, .finish = e.finish, .error = std::move(e.error)};
      if (e.cache != 0) {
        r.caches = runner_.take(e.cache);
        r.all_tokens = std::move(e.cache_tokens);
      }
      responses.push_back(std::move(r));
    }
  }
  return {std::move(prompts), std::move(responses)};
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
    auto held = engine_.cache_of(uid);
    if (held) found.emplace(uid, std::pair(copies(runner_.caches(held->first)), std::move(held->second)));
  }
  return found;
}

std::map<BatchGenerator::Uid, std::pair<cache::Caches, std::vector<int>>> BatchGenerator::remove(const std::vector<Uid>& uids,
                                                                                                 bool return_prompt_caches) {
  auto found = return_prompt_caches ? extract_cache(uids) : decltype(extract_cache(uids)){};
  for (const auto uid : uids) {
    engine_.cancel(uid);
    boundaries_.erase(uid);
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

/** The text of one answer as its tokens come; ends it at a stop text. */
class AnswerText {
 public:
  AnswerText(const text::Tokenizer& tokenizer, const std::vector<std::string>& stop)
      : detokenizer_(tokenizer.make_detokenizer()), stops_(stop) {}
  /** True when a stop text was met. */
  bool add(int token, std::string& text) {
    detokenizer_->add_token(token);
    text += stops_.feed(detokenizer_->take_segment());
    return stops_.stopped();
  }
  /** True when what was held back had a stop text in it. */
  bool finish(std::string& text) {
    detokenizer_->finalize();
    text += stops_.feed(detokenizer_->take_segment());
    text += stops_.flush();
    return stops_.stopped();
  }

 private:
  std::unique_ptr<text::Detokenizer> detokenizer_;
  text::StopMatcher stops_;
};

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
  for (const auto& item : items) prompts.emplace_back(item.prompt);
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
      : tokenizer_(tokenizer),
        items_(items),
        run_(run),
        boundaries_(boundaries_of(model.description(), items, !run.prefixes.folder.empty())),
        answers_(items.size()),
        runner_(model, run.limits, run.draft_model),
        engine_(runner_, limits_of(run)) {
    if (run.prefixes.folder.empty()) return;
    store_ = std::make_unique<PrefixFiles>(run.prefixes, model, runner_);
    engine_.set_store(store_.get());
  }

  std::vector<BatchAnswer> run(BatchGenerator::Stats* stats) {
    const double start = now_s();
    const auto read = [&] { return stats_of(engine_.counters(), start); };
    for (std::size_t i = 0; i < items_.size(); ++i) submit(i);
    while (engine_.has_work()) {
      if (run_.cancel && run_.cancel->load(std::memory_order_relaxed)) cancel_all();
      for (const auto& event : engine_.step().events) take(event);
      if (run_.on_step) run_.on_step(read());
    }
    for (const auto& event : engine_.take_events()) take(event);
    if (stats) *stats = read();
    return std::move(answers_);
  }

 private:
  void submit(std::size_t i) {
    const auto& item = items_[i];
    auto& answer = answers_[i];
    answer.prompt_tokens = static_cast<int>(item.prompt.size());
    engine::Request r{.tokens = item.prompt,
                      .max_tokens = item.max_tokens,
                      .sampling = item.sampling,
                      .max_kv_size_tokens = item.max_kv_size_tokens,
                      .drafts = item.drafts,
                      .store_at_end = !run_.prefixes.folder.empty(),  // no prompt of the batch begins with an answer of it
                      .boundaries = boundaries_[i]};
    set(r, item.kv_quantization);
    if (!item.ignore_eos) {
      for (const int eos : tokenizer_.eos_token_ids()) r.stop.push_back({eos});
    }
    try {
      const auto id = engine_.submit(std::move(r));
      open_.emplace(id, Open{i, AnswerText(tokenizer_, item.stop)});
    } catch (const Error& e) {
      answer.error = e;
      if (run_.on_answer) run_.on_answer(i, answer);
    }
  }

  void cancel_all() {
    for (const auto& [id, open] : open_) engine_.cancel(id);
  }

  void take(const engine::Event& e) {
    const auto found = open_.find(e.id);
    if (found == open_.end()) return;
    auto& [index, text] = found->second;
    auto& answer = answers_[index];
    auto finish = e.finish;
    const auto told = answer.text.size();
    if (e.chosen) {
      ++answer.generation_tokens;
      answer.accepted_tokens += e.from_draft;
      if (finish != engine::Finish::stop) {  // the engine stops at the end of text only
        answer.tokens.push_back(e.chosen->token);
        if (items_[index].sampling.want_logprob) answer.logprobs.push_back(e.chosen->logprob);
        if (text.add(e.chosen->token, answer.text) && finish == engine::Finish::none) {
          engine_.end(e.id, engine::Finish::stop);
          finish = engine::Finish::stop;
        }
      }
    }
    const bool stopped = finish != engine::Finish::none && text.finish(answer.text);
    if (run_.on_text && answer.text.size() > told && !run_.on_text(index, answer.text.substr(told)) && finish == engine::Finish::none) {
      engine_.cancel(e.id);
      finish = engine::Finish::cancelled;
    }
    if (finish == engine::Finish::none) return;
    answer.error = e.error;
    answer.finish = finish == engine::Finish::failed            ? Finish::none
                    : stopped || finish == engine::Finish::stop ? Finish::stop
                    : finish == engine::Finish::cancelled       ? Finish::cancelled
                                                                : Finish::length;
    const auto i = index;
    open_.erase(found);
    if (run_.on_answer) run_.on_answer(i, answers_[i]);
  }

  struct Open {
    std::size_t index;
    AnswerText text;
  };
  const text::Tokenizer& tokenizer_;
  const std::vector<BatchItem>& items_;
  const BatchRun& run_;
  std::vector<std::vector<int>> boundaries_;
  std::vector<BatchAnswer> answers_;
  ModelRunner runner_;
  std::unique_ptr<PrefixFiles> store_;
  engine::Engine engine_;  // saves its prefixes when it ends
  std::map<engine::SequenceId, Open> open_;
};

}  // namespace

std::vector<BatchAnswer> batch_generate(model::CausalModel& model, const text::Tokenizer& tokenizer, const std::vector<BatchItem>& items,
                                        const BatchRun& run, BatchGenerator::Stats* stats) {
  return Batch(model, tokenizer, items, run).run(stats);
}

}  // namespace mlxlm::gen
