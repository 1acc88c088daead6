// A runner without a model: every token follows from the tokens before it and the seed alone, and it fails where it is told to.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <set>

#include "engine/engine.h"

namespace mlxlm::tests {

using namespace engine;

/** The token that a sequence takes after these; what a request gives alone. */
inline int scripted_token(std::span<const int> tokens, const Sampling& sampling) {
  uint64_t hash = 1469598103934665603ull ^ sampling.seed.value_or(0);
  for (const int t : tokens) hash = (hash ^ static_cast<uint64_t>(t + 1)) * 1099511628211ull;
  return static_cast<int>(hash >> 33) % 97;
}

class ScriptedRunner final : public Runner {
 public:
  struct Cache {
    std::vector<int> tokens;
    CacheOptions options{};
    int undecided = 0;  // of a draft: keep() is to come
    int64_t shared_bytes = 0;
    int shared_tokens = 0;
  };

  void check(std::span<const int> tokens, const Sampling& sampling, const CacheOptions& cache, const Drafts& drafts) const override {
    if (cache.kv_bits < 0 || cache.kv_bits > 8) throw Error(Code::bad_request, "kv_bits", "too many");
    if (drafts.model_tokens > 0 && !guess) throw Error(Code::bad_request, "num_draft_tokens", "no draft model");
    for (const int t : tokens) {
      if (t < 0 || t >= 1000) throw Error(Code::bad_request, "prompt", "token out of the vocabulary");
    }
    if (sampling.top_k >= 1000) throw Error(Code::bad_request, "top_k", "too many");
  }
  int64_t cost_bytes(int64_t tokens, const CacheOptions& o) const override {
    return 10 + bytes_per_token * (o.max_kv_size_tokens > 0 ? std::min<int64_t>(tokens, o.max_kv_size_tokens) : tokens);
  }
  int64_t growth_bytes(CacheId cache, std::optional<int> copied, int64_t tokens, const CacheOptions& o) const override {
    const auto& c = caches.at(cache);
    const auto held = info(cache).bytes, alone = cost_bytes(tokens, o);
    const int shared = copied ? tokens_shared_by_copies(c, *copied) : c.shared_tokens;
    if (shared == 0) return std::max(held, alone);
    return std::max(held, (copied ? held : c.shared_bytes) + cost_bytes(tokens - shared, o));
  }
  bool is_replaceable(CacheId cache) const override {
    const auto& c = caches.at(cache);
    const bool quantized = c.options.kv_bits > 0 && static_cast<int>(c.tokens.size()) >= c.options.quantized_from_tokens;
    return c.options.max_kv_size_tokens == 0 && !quantized;
  }
  CacheId reserve(int64_t, const CacheOptions& options) override {
    if (reserve_fails) throw std::bad_alloc();
    caches[++last] = {{}, options};
    return last;
  }
  void adapt(CacheId cache, const CacheOptions& options) override { caches.at(cache).options = options; }
  CacheId copy(CacheId cache, int tokens) override {
    if (copy_fails) throw std::bad_alloc();
    if (before_copy) before_copy(info(cache).bytes);
    auto made = caches.at(cache);
    if (tokens < static_cast<int>(made.tokens.size()) && !info(cache).trimmable) throw std::logic_error("not trimmable");
    made.shared_tokens = tokens_shared_by_copies(made, tokens);
    made.shared_bytes = made.shared_tokens > 0 ? info(cache).bytes : 0;
    made.tokens.resize(tokens);
    caches[++last] = made;
    ++copies;
    return last;
  }
  void trim(CacheId cache, int tokens) override { caches.at(cache).tokens.resize(tokens); }
  void free(CacheId cache) noexcept override {
    if (caches.erase(cache) == 0) ++bad_frees;
  }
  CacheInfo info(CacheId cache) const override {
    const auto& c = caches.at(cache);
    const auto n = static_cast<int>(c.tokens.size());
    const int limit = c.options.max_kv_size_tokens;
    return {n, trimmable && (limit == 0 || n < limit), n == 0 ? 0 : c.shared_bytes + cost_bytes(n - c.shared_tokens, c.options)};
  }
  void begin(SequenceId id, const Sampling& sampling, std::shared_ptr<TokenMask>, const Drafts&) override { samplings[id] = sampling; }
  void end(SequenceId id) noexcept override {
    if (samplings.erase(id) == 0) ++bad_ends;
  }

  std::vector<std::vector<int>> draft(const std::vector<DraftWanted>& wanted) override {
    std::vector<std::vector<int>> drafts;
    for (const auto& w : wanted) {
      if (std::ranges::equal(w.tokens, caches.at(w.cache).tokens)) throw std::logic_error("a draft for a sequence that is not decoding");
      drafts.push_back(guess ? guess(w, samplings.at(w.sequence)) : std::vector<int>{});
    }
    return drafts;
  }
  void keep(CacheId cache, int tokens) override {
    auto& c = caches.at(cache);
    const int least = static_cast<int>(c.tokens.size()) - c.undecided;
    if (c.undecided == 0 || tokens < least || tokens > static_cast<int>(c.tokens.size())) ++bad_keeps;
    c.tokens.resize(tokens);
    c.undecided = 0;
    if (keep_fails) throw std::bad_alloc();
  }

  StepResult run(const StepPlan& plan) override {
    plans.push_back(plan);
    if (before_run) before_run(plan);
    StepResult result;
    std::set<CacheId> used;
    for (const auto& row : plan.rows) {
      if (!used.insert(row.cache).second) throw std::logic_error("a cache twice in a step");
      if (row.tokens.empty()) throw std::logic_error("an empty row");
      if (caches.at(row.cache).undecided > 0) throw std::logic_error("a draft that nobody decided on");
      auto& held = caches.at(row.cache).tokens;
      held.insert(held.end(), row.tokens.begin(), row.tokens.end());
      RowResult r{.sequence = row.sequence};
      if (row_fails && row_fails(row)) {
        r.error = Error(Code::internal, "row", "scripted");
      } else if (row.wanted_rows > 0) {
        if (row.wanted_rows != 1 + static_cast<int>(row.draft.size())) throw std::logic_error("wanted rows that do not fit the draft");
        auto seen = held;
        for (std::size_t i = 0; i <= row.draft.size(); ++i) {
          r.chosen.push_back({.token = scripted_token(seen, samplings.at(row.sequence))});
          if (i == row.draft.size() || r.chosen.back().token != row.draft[i]) break;
          seen.push_back(row.draft[i]);
        }
        held.insert(held.end(), row.draft.begin(), row.draft.end());
        caches.at(row.cache).undecided = static_cast<int>(row.draft.size());
      }
      result.rows.push_back(std::move(r));
    }
    if (step_fails && step_fails(plan)) throw std::runtime_error("scripted failure of a step");
    if (mangle) mangle(result);
    return result;
  }

  /** As in a real cache: whole blocks, and not where something is forgotten. */
  int tokens_shared_by_copies(const Cache& c, int tokens) const {
    return shares && c.options.max_kv_size_tokens == 0 ? tokens / block_tokens * block_tokens : 0;
  }

  static constexpr int block_tokens = 8;
  bool shares = false;  // a copy holds all memory of what it was copied from, and what is added to it comes on top
  int64_t bytes_per_token = 4;
  bool trimmable = true, reserve_fails = false, copy_fails = false, keep_fails = false;
  std::function<std::vector<int>(const DraftWanted&, const Sampling&)> guess;  // the draft model
  std::function<void(const StepPlan&)> before_run;
  std::function<void(int64_t bytes)> before_copy;
  std::function<bool(const PlannedRow&)> row_fails;
  std::function<bool(const StepPlan&)> step_fails;
  std::function<void(StepResult&)> mangle;
  std::map<CacheId, Cache> caches;
  std::map<SequenceId, Sampling> samplings;
  std::vector<StepPlan> plans;
  CacheId last = 0;
  int bad_frees = 0, bad_ends = 0, bad_keeps = 0, copies = 0;
};

/** What a request gives alone, straight from the script. */
inline std::vector<int> alone(const Request& r) {
  auto tokens = r.cache_tokens;
  tokens.insert(tokens.end(), r.tokens.begin(), r.tokens.end());
  std::vector<int> answer;
  while (static_cast<int>(answer.size()) != r.max_tokens) {
    answer.push_back(scripted_token(tokens, r.sampling));
    tokens.push_back(answer.back());
    for (const auto& s : r.stop) {
      if (s.size() <= answer.size() && std::equal(s.rbegin(), s.rend(), answer.rbegin())) return answer;
    }
  }
  return answer;
}

/** An engine over the script, that collects events and checks the invariants after every step. */
struct Bench {
  explicit Bench(Limits limits = {}) : limits(limits) { restart(); }
  void restart() {
    engine.reset();
    engine = std::make_unique<Engine>(runner, limits, [this] { return now += 0.001; });
  }
  SequenceId submit(Request r) { return engine->submit(std::move(r)); }
  StepReport step() {
    auto report = engine->step();
    for (auto& e : report.events) {
      if (e.chosen) answers[e.id].push_back(e.chosen->token);
      if (e.finish != Finish::none) {
        ++ends[e.id];
        last.insert_or_assign(e.id, e);
      }
    }
    check();
    return report;
  }
  void check() {
    const auto snapshot = engine->snapshot();
    for (const auto& violation : check_invariants(snapshot)) violations.push_back(violation);
    std::size_t known = handed_over;
    for (const auto& q : snapshot.sequences) known += q.cache != 0;
    known += snapshot.stored.size();
    if (runner.caches.size() != known) violations.push_back("a cache has leaked");
    if (runner.bad_keeps > 0) violations.push_back("a draft was decided on in a way that cannot be");
    for (const auto& [id, c] : runner.caches) {
      if (c.undecided > 0) violations.push_back("a draft that nobody decided on");
    }
    if (runner.bad_frees + runner.bad_ends > 0) violations.push_back("freed or ended twice");
    if (runner.samplings.size() != snapshot.sequences.size()) violations.push_back("a sequence has leaked");
  }
  /** Until nothing is left to do. */
  int drain(int most = 100000) {
    int steps = 0;
    while (engine->has_work() && steps < most) {
      step();
      ++steps;
    }
    return steps;
  }

  Limits limits;
  ScriptedRunner runner;
  double now = 0;
  std::unique_ptr<Engine> engine;
  std::map<SequenceId, std::vector<int>> answers;
  std::map<SequenceId, int> ends;
  std::map<SequenceId, Event> last;
  std::vector<std::string> violations;
  std::size_t handed_over = 0;
};

inline std::vector<int> prompt_of(int length, int salt = 0) {
  std::vector<int> tokens;
  for (int i = 0; i < length; ++i) tokens.push_back((i * 31 + salt * 17 + i * i % 7) % 900);
  return tokens;
}

}  // namespace mlxlm::tests
