// Many requests, one model: each step is scheduled as plain data, run by a Runner, and committed wholly or not at all. No MLX.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/invariants.h"
#include "engine/pacer.h"
#include "engine/prefix_cache.h"
#include "engine/prefix_store.h"
#include "engine/runner.h"

namespace mlxlm::engine {

struct Request {
  std::vector<int> tokens{};             // the prompt; at least one
  int max_tokens = 256;                  // -1 = until a stop
  std::vector<std::vector<int>> stop{};  // sequences of tokens that end the answer; texts are the concern of who reads the events
  Sampling sampling{};
  std::shared_ptr<TokenMask> mask{};
  int max_kv_size_tokens =
      0;  // 0 = unbounded. What a limited cache forgets depends on the chunks that a longer prompt comes in,
          // so such a prompt runs in chunks of limited_chunk_tokens, its last token alone, whatever the budget, and is not reused
  int kv_bits = 0, kv_group_size = 64;  // 0 = caches are not quantized; else as alone: converted at the end of the first chunk (of
  int quantized_kv_start = 0;           // limited_chunk_tokens, the last token of the prompt alone) or step where they hold so many tokens
  Drafts drafts{};                      // not with a mask, which cannot go back
  bool use_prefix_cache = true;         // reuse what is stored or held by another request, and store what was computed
  bool store_at_end = true;             // of this: also what it holds when it ends, and not at its boundaries alone
  std::vector<int> boundaries{};        // prompt positions where a step must end and a copy of the cache is stored for reuse, ascending;
                                        // prompts that begin as this one does up to there wait for the copy
  CacheId cache = 0;                    // continue from this one; the request owns it from now on. Where memory does not suffice to hold it
                                        // while the request waits, and where it is lost (a failed step of others, a lack of memory), its
                                        // tokens are computed again. That is not possible where they are not known, and where the chunks
                                        // show that they came in (it is quantized or has a limit): such a cache has room from the
                                        // beginning, or is refused, and where it is lost the request fails
  // The tokens that it holds; fewer than that = the first ones are not known: penalties and drafts do not see them, nothing is stored for
  // reuse.
  std::vector<int> cache_tokens{};
  bool keep_cache = false;  // hand the cache over at the end, see Event
};

enum class Finish { none, stop, length, cancelled, failed };

/** What happened to a request. The last one has `finish` set; after it the id is unknown. */
struct Event {
  SequenceId id = 0;
  std::optional<ChosenToken> chosen{};
  int processed_tokens = 0, prompt_tokens = 0;  // how far the prompt is; without a token: progress
  int reused_tokens = 0;                        // of the prompt, computed before
  bool from_draft = false;                      // `chosen` was guessed, and right
  Finish finish = Finish::none;
  std::optional<Error> error{};     // for Finish::failed
  CacheId cache = 0;                // with keep_cache, on the last event: now the receiver's to free
  std::vector<int> cache_tokens{};  // what it holds, as far as that is known
};

enum class Outcome {
  no_work,  // nobody waits
  ran,
  capacity_deferred,  // somebody waits, and nothing could be run
  request_failed,     // ran, and at least one request ended in an error
  engine_failed,      // the step as a whole failed; its requests are replayed one by one to find the one at fault
};

struct StepReport {
  Outcome outcome = Outcome::no_work;
  std::vector<Event> events{};
  int decode_rows = 0, draft_tokens = 0, prompt_tokens = 0, generated_tokens = 0;
  double seconds = 0;
};

struct Limits {
  int max_sequences = 32;           // running at once
  int prefill_tokens = 512;         // prompt tokens of a step that nobody's decoding waits for
  int least_prefill_tokens = 4;     // prompt tokens of a step beside decoding, however slow they are
  double pace = 2.0;                // a step with prompt tokens is to take so many times one without; see bench/engine.cpp
  int step_tokens = 0;              // all tokens of a step with decoding rows; 0 = as `pace` says
  int draft_tokens = 64;            // of all sequences in a step
  int limited_chunk_tokens = 2048;  // see Request::max_kv_size_tokens
  int max_context_tokens = 0;       // prompt and answer; 0 = no limit
  int64_t memory_bytes = 0;         // for caches, those stored for prefixes included; 0 = no limit
  int64_t prefix_cache_bytes = 0;   // 0 = nothing is stored; requests that run at once share all the same
};

/** Running totals. */
struct Counters {
  int64_t steps = 0, decode_steps = 0, prompt_tokens = 0, reused_tokens = 0, generated_tokens = 0, failed_steps = 0;
  int64_t decode_tokens = 0;                        // of generated_tokens: without the first of each answer, which comes with its prompt
  int64_t drafted_tokens = 0, accepted_tokens = 0;  // guesses, and those that are among generated_tokens
  double prompt_s = 0, decode_s = 0;                // of steps; what prompts and decoding share is divided by tokens
};

/** Bytes of caches. */
struct MemoryReport {
  int64_t held_bytes = 0;      // by requests
  int64_t reserved_bytes = 0;  // for requests that run, what they hold included, and for caches that waiting ones brought
  int64_t stored_bytes = 0;    // for prefixes
  int64_t stored_budget_bytes = 0;
  int64_t unwritten_bytes = 0;  // for prefixes on their way to a store
  int64_t limit_bytes = 0;      // of reserved, stored and unwritten; 0 = none
  struct Row {
    SequenceId id = 0;
    bool running = false;
    int tokens = 0;  // held
    int64_t held_bytes = 0, reserved_bytes = 0;
  };
  std::vector<Row> requests{};
};

/** Thread: one. Between steps everything may be called. */
class Engine {
 public:
  /** `clock` in seconds, for tests. */
  explicit Engine(Runner& runner, Limits limits = {}, std::function<double()> clock = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /** Throws Error(bad_request); Error(out_of_memory) with both figures when the request can never fit, or brings a cache that cannot be
   * computed again and does not fit now. A cache given is freed then. */
  SequenceId submit(Request request);
  /** Ends a request wherever it is; its last event comes with the next step. False when it is not known (any more). */
  bool cancel(SequenceId id) { return end(id, Finish::cancelled); }
  bool end(SequenceId id, Finish reason);

  /** schedule, run, commit. Throws nothing of what the runner throws. */
  StepReport step();

  /** The parts of step(): exactly one of commit and fail follows a plan that has rows. */
  StepPlan schedule();
  void commit(const StepPlan& plan, const StepResult& result);
  void fail(const StepPlan& plan, const Error& error);
  std::vector<Event> take_events();
  /** Forgets events that have not been taken. */
  void drop_events(const std::function<bool(const Event&)>& which) { std::erase_if(events_, which); }

  bool has_work() const { return !waiting_.empty() || !running_.empty(); }
  int waiting() const { return static_cast<int>(waiting_.size()); }
  int running() const { return static_cast<int>(running_.size()); }
  const Counters& counters() const { return counters_; }
  const Limits& limits() const { return limits_; }
  /** The cache of a request and the tokens that it holds; the engine keeps it. Nothing while it has none. */
  std::optional<std::pair<CacheId, std::vector<int>>> cache_of(SequenceId id) const;
  Snapshot snapshot() const;
  MemoryReport memory() const;
  /** Gives up stored prefixes until at most so many bytes are held. */
  void shrink_prefix_cache(int64_t bytes) { release(prefixes_.shrink_to(bytes)); }
  const PrefixCache& prefixes() const { return prefixes_; }
  /** Prefixes are looked for there, too. One of a boundary is saved when its copy is made, where memory allows; the copy is left out where
   * PrefixCache::covers() says that it is needless. What is held when the engine ends is saved then. It must outlive the engine, or be
   * taken back (null). Nothing without prefix_cache_bytes. */
  void set_store(PrefixStore* store) { store_ = limits_.prefix_cache_bytes > 0 ? store : nullptr; }

 private:
  struct Sequence;

  Sequence* find(SequenceId id) const;
  void validate(const Request& request) const;
  int64_t tokens_to_reserve(const Sequence& q) const;
  CacheOptions cache_options(const Request& request) const;
  uint64_t prefix_space(const Sequence& q) const;
  int most_drafts(const Sequence& q) const;
  void plan_decode(StepPlan& plan);
  void plan_drafts(StepPlan& plan);
  void plan_prompts(StepPlan& plan, int decode_rows);
  bool plan_suspect(StepPlan& plan);
  int prompt_budget(int decode_rows, int held_tokens) const;
  int chunk_of(const Sequence& q, int budget) const;
  int add_row(StepPlan& plan, Sequence& q, int budget) const;
  enum class Admission { admitted, deferred, overtaken, failed };
  bool may_reuse(const Sequence& q) const;
  bool is_about_to_be_stored(const Sequence& q);
  std::optional<PrefixCache::Hit> find_reusable(const Sequence& q);
  void load_stored(Sequence& q);
  int64_t least_bytes(const Sequence& q, int64_t tokens) const;
  void check_memory(const Sequence& q);
  void hold_brought_cache(Sequence& q);
  Admission admit(Sequence& q);
  bool give_up_brought_cache(const Sequence& q);
  bool has_holder(const Sequence& q) const;
  bool let_holder_pass(const Sequence& q);
  bool take_room_for(const Sequence& q);
  bool make_room(int64_t bytes);
  bool make_room_for_prefix(int64_t bytes);
  int64_t unwritten_bytes() const;
  bool has_room_to_save(int64_t bytes) const;
  void extend(Sequence& q);
  void preempt(Sequence& q);
  void check_result(const StepPlan& plan, const StepResult& result) const;
  void commit_row(Sequence& q, const PlannedRow& row, const RowResult& result);
  void commit_tokens(Sequence& q, const PlannedRow& row, const RowResult& result);
  Finish finish_of(const Sequence& q) const;
  void store_at_boundary(Sequence& q);
  void retire(Sequence& q, Event last);
  void fail(Sequence& q, const Error& error);
  void drop_cache(Sequence& q);
  void release(const std::vector<CacheId>& caches);
  Event event(const Sequence& q) const;

  Runner& runner_;
  Limits limits_;
  std::function<double()> clock_;
  Pacer pacer_;
  PrefixCache prefixes_;
  PrefixStore* store_ = nullptr;
  std::map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  std::deque<SequenceId> waiting_;
  std::vector<SequenceId> running_;  // in order of admission
  std::vector<Event> events_;
  Counters counters_;
  SequenceId last_id_ = 0;
  int64_t reserved_bytes_ = 0, step_ = 0;
  int shared_steps_ = 0;  // in a row, of decoding and prompts
  bool in_step_ = false;
};

/** The Error that stands for what was thrown. Call inside a catch block. */
Error current_error();

}  // namespace mlxlm::engine
