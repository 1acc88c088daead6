// Each check says what it found and what it wanted.
#include "engine/invariants.h"

#include <map>
#include <set>

#include <fmt/format.h>

namespace mlxlm::engine {
namespace {

class Check {
 public:
  explicit Check(const Snapshot& s) : s_(s) {}

  std::vector<std::string> run() {
    queues();
    for (const auto& q : s_.sequences) q.running ? running(q) : waiting(q);
    caches();
    totals();
    return std::move(found_);
  }

 private:
  template <typename... A>
  void want(bool holds, fmt::format_string<A...> text, A&&... a) {
    if (!holds) found_.push_back(fmt::format(text, std::forward<A>(a)...));
  }

  void queues() {
    std::map<SequenceId, int> in_waiting, in_running;
    for (const auto id : s_.waiting) ++in_waiting[id];
    for (const auto id : s_.running) ++in_running[id];
    std::set<SequenceId> known;
    for (const auto& q : s_.sequences) {
      want(known.insert(q.id).second, "sequence {}: listed twice", q.id);
      want(in_waiting[q.id] == (q.running ? 0 : 1) && in_running[q.id] == (q.running ? 1 : 0),
           "sequence {}: {} times waiting and {} times running, wanted to be in one queue once", q.id, in_waiting[q.id], in_running[q.id]);
    }
    for (const auto& [id, n] : in_waiting) want(known.contains(id), "sequence {}: waiting but not known", id);
    for (const auto& [id, n] : in_running) want(known.contains(id), "sequence {}: running but not known", id);
    want(static_cast<int>(s_.running.size()) <= s_.max_sequences, "{} sequences running, wanted at most {}", s_.running.size(),
         s_.max_sequences);
  }

  void running(const Snapshot::Sequence& q) {
    want(q.cache != 0, "sequence {}: running without a cache", q.id);
    want(q.computed_tokens >= 0 && q.computed_tokens < q.tokens, "sequence {}: {} of {} tokens computed, wanted at least one left", q.id,
         q.computed_tokens, q.tokens);
    want(q.held.tokens == q.computed_tokens, "sequence {}: its cache holds {} tokens, wanted {}", q.id, q.held.tokens, q.computed_tokens);
    want(q.tokens == q.prompt_tokens + q.generated_tokens, "sequence {}: {} tokens, wanted {} of the prompt and {} generated", q.id,
         q.tokens, q.prompt_tokens, q.generated_tokens);
    want(q.max_tokens < 0 || q.generated_tokens < q.max_tokens, "sequence {}: {} tokens generated, wanted an end at {}", q.id,
         q.generated_tokens, q.max_tokens);
    want(q.held.bytes <= q.reserved_bytes, "sequence {}: holds {} bytes, reserved are {}", q.id, q.held.bytes, q.reserved_bytes);
    want(q.computed_tokens <= q.reserved_tokens, "sequence {}: {} tokens computed, reserved are {}", q.id, q.computed_tokens,
         q.reserved_tokens);
  }

  void waiting(const Snapshot::Sequence& q) {
    want(q.cache != 0 || q.reserved_bytes == 0, "sequence {}: waits with {} bytes reserved and no cache", q.id, q.reserved_bytes);
    want(q.held.bytes <= q.reserved_bytes, "sequence {}: waits with a cache of {} bytes, reserved are {}", q.id, q.held.bytes,
         q.reserved_bytes);
    want(q.computed_tokens == 0 || q.cache != 0, "sequence {}: waits with {} tokens computed and no cache", q.id, q.computed_tokens);
  }

  void caches() {
    std::set<CacheId> seen;
    for (const auto& q : s_.sequences) {
      if (q.cache != 0) want(seen.insert(q.cache).second, "cache {}: in use twice", q.cache);
    }
    for (const auto& e : s_.stored) {
      want(e.cache != 0 && seen.insert(e.cache).second, "cache {}: stored for prefixes and in use elsewhere", e.cache);
      want(e.held.tokens == e.tokens, "cache {}: stored for {} tokens, holds {}", e.cache, e.tokens, e.held.tokens);
      want(e.held.bytes <= e.bytes, "cache {}: counted as {} bytes, holds {}", e.cache, e.bytes, e.held.bytes);
    }
  }

  void totals() {
    int64_t reserved = 0, stored = 0;
    for (const auto& q : s_.sequences) reserved += q.reserved_bytes;
    for (const auto& e : s_.stored) stored += e.bytes;
    want(reserved == s_.reserved_bytes, "{} bytes counted as reserved, sequences have {}", s_.reserved_bytes, reserved);
    want(stored == s_.stored_bytes, "{} bytes counted as stored, entries have {}", s_.stored_bytes, stored);
    want(s_.stored_bytes <= s_.stored_budget_bytes, "{} bytes stored for prefixes, wanted at most {}", s_.stored_bytes,
         s_.stored_budget_bytes);
    want(s_.memory_bytes == 0 || s_.reserved_bytes + s_.stored_bytes + s_.unwritten_bytes <= s_.memory_bytes,
         "{} bytes reserved, {} stored and {} unwritten, wanted at most {}", s_.reserved_bytes, s_.stored_bytes, s_.unwritten_bytes,
         s_.memory_bytes);
  }

  const Snapshot& s_;
  std::vector<std::string> found_;
};

}  // namespace

std::vector<std::string> check_invariants(const Snapshot& snapshot) {
  return Check(snapshot).run();
}

}  // namespace mlxlm::engine
