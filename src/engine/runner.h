// What the engine asks of whoever runs its steps: plain data in, plain data out. No MLX.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"

namespace mlxlm::engine {

using SequenceId = int64_t;  // of a request, from 1
using CacheId = int64_t;     // opaque: only its runner knows what it stands for; 0 = none

/** How a request's tokens are chosen, and what is to be told about them. Ranges are checked by Runner::check. */
struct Sampling {
  float temperature = 0.f;  // 0 = the most likely token
  float top_p = 1.f, min_p = 0.f;
  int min_tokens_to_keep = 1, top_k = 0;
  float xtc_probability = 0.f, xtc_threshold = 0.1f;
  std::vector<int> xtc_special_tokens{};
  std::optional<uint64_t> seed{};  // absent = random
  std::map<int, float> logit_bias{};
  float repetition_penalty = 0.f, presence_penalty = 0.f, frequency_penalty = 0.f;
  int repetition_context_size = 20, presence_context_size = 20, frequency_context_size = 20;
  bool want_logprob = false;   // of the chosen token
  bool want_logprobs = false;  // of the whole vocabulary
  int top_logprobs = 0;        // the most likely tokens, best first
  /** The caller's own, after the penalties: change the logits [V] of the next token in place; `tokens` are all so far. What one throws
   * fails the request. */
  std::vector<std::function<void(std::span<const int> tokens, std::span<float> logits)>> processors{};
  /** The caller's own choice out of log-probabilities [V], in place of temperature and filters. */
  std::function<int(std::span<const float> logprobs)> sampler{};

  bool has_penalties() const { return repetition_penalty != 0.f || presence_penalty != 0.f || frequency_penalty != 0.f; }
  bool needs_history() const { return has_penalties() || !processors.empty(); }
  bool is_callers() const { return sampler || !processors.empty(); }
};

/** Tokens guessed ahead of a decoding sequence, which one step then checks together; both 0 = none. What comes out is the model's own
 * choice, or has its own distribution, whatever was guessed. */
struct Drafts {
  int ngram_tokens = 0;  // most that are guessed at a time out of the sequence so far
  int model_tokens = 0;  // most that the runner's draft model guesses at a time
  static constexpr int most_tokens = 256;
  int most() const { return ngram_tokens > 0 ? ngram_tokens : model_tokens; }
};

/** Throws Error(bad_request). */
void check(const Drafts& drafts);

/** What caches of a sequence are like. */
struct CacheOptions {
  int max_kv_size_tokens = 0;  // 0 = unbounded
  int kv_bits = 0;             // 0 = not quantized
  int kv_group_size = 64;
  int quantized_from_tokens = 0;  // converted once it holds so many; no step crosses this
  bool with_drafts = false;       // tokens may be taken back, for which a copy may be needed
  bool with_draft_model = false;  // which has caches of its own

  bool operator==(const CacheOptions&) const = default;
};

/** Numbers what cannot be mixed: caches of other options are of no use to a prompt. */
uint64_t prefix_space(const CacheOptions& options);

/** Which tokens a request may take next (a grammar). Used on the engine's thread; the work may be done on another one meanwhile. */
class TokenMask {
 public:
  virtual ~TokenMask() = default;
  /** A token became part of the sequence: work on the next mask may begin elsewhere. */
  virtual void accept(int token) = 0;
  /** One bit a token, lowest first: set = allowed; empty = all are. Asked for when the step's logits are under way, so it may wait. It must
   * stay valid until the next call. Throws to fail the request. */
  virtual std::span<const uint32_t> allowed() = 0;
};

/** What one sequence does in a step. Prefill, chunks of it, decode and verification of drafts differ only in the counts. */
struct PlannedRow {
  SequenceId sequence = 0;
  CacheId cache = 0;
  std::vector<int> tokens{};   // at least one
  std::vector<int> draft{};    // guesses of what follows, computed with the tokens; kept as far as they are right
  int wanted_rows = 0;         // logits to choose from: 0 = a chunk of a prompt, else those of the last token and of each of the draft
  std::vector<int> history{};  // all tokens up to and with `tokens`; only for sequences with penalties or processors that choose a token
};

struct StepPlan {
  int64_t number = 0;
  std::vector<PlannedRow> rows{};
  int tokens() const {
    int count = 0;
    for (const auto& row : rows) count += static_cast<int>(row.tokens.size() + row.draft.size());
    return count;
  }
};

struct TokenLogprob {
  int token = 0;
  float logprob = 0.f;
};

struct ChosenToken {
  int token = 0;
  float logprob = 0.f;  // only when wanted, as the others
  std::vector<TokenLogprob> top{};
  std::vector<float> logprobs{};  // [V]
};

struct RowResult {
  SequenceId sequence = 0;
  std::vector<ChosenToken> chosen{};  // unless failed: none, or the draft as far as it is right and one more
  std::optional<Error> error{};       // this row alone failed; its cache is of no more use
};

/** One result a row, in the plan's order. */
struct StepResult {
  std::vector<RowResult> rows{};
};

struct CacheInfo {
  int tokens = 0;
  bool trimmable = false;  // can forget any number of its last tokens
  int64_t bytes = 0;       // held now
};

/** A decoding sequence that may have a draft. */
struct DraftWanted {
  SequenceId sequence = 0;
  CacheId cache = 0;
  std::span<const int> tokens{};  // all so far
  int most = 0;
};

/** Thread: the engine's. Every function may throw Error or what MLX throws; none may end the process. */
class Runner {
 public:
  virtual ~Runner() = default;

  /** Throws Error(bad_request) when tokens or options cannot be run. */
  virtual void check(std::span<const int> tokens, const Sampling& sampling, const CacheOptions& cache, const Drafts& drafts) const = 0;
  /** The most bytes that a cache of so many tokens takes; it must not shrink as tokens grow. */
  virtual int64_t cost_bytes(int64_t tokens, const CacheOptions& options) const = 0;
  /** The most bytes that this cache, or a copy of its first `copied` tokens, takes until it holds `tokens`: memory that it shares with
   * others stays as large as it is, however little of that is of use. */
  virtual int64_t growth_bytes(CacheId cache, std::optional<int> copied, int64_t tokens, const CacheOptions& options) const = 0;

  /** Whether this cache may be lost: its tokens, computed again in any chunks, give the same. Not so where it is quantized or has a limit.
   */
  virtual bool is_replaceable(CacheId cache) const = 0;
  /** Whether what is computed into caches with these options depends, if only by rounding, on the chunks that a prompt comes in, even where
   * nothing is forgotten. */
  virtual bool chunks_show(const CacheOptions& /*options*/) const { return false; }

  /** An empty cache that will soon hold so many tokens, and perhaps more. */
  virtual CacheId reserve(int64_t tokens, const CacheOptions& options) = 0;
  /** A cache from elsewhere is to have these options. */
  virtual void adapt(CacheId cache, const CacheOptions& options) = 0;
  /** Another cache that holds the first `tokens` of this one (all, unless it is trimmable): for reuse and for snapshots. Whether memory is
   * shared is the runner's affair. */
  virtual CacheId copy(CacheId cache, int tokens) = 0;
  /** Forgets all but the first `tokens`; only of a trimmable cache. */
  virtual void trim(CacheId cache, int tokens) = 0;
  virtual void free(CacheId cache) noexcept = 0;
  virtual CacheInfo info(CacheId cache) const = 0;

  /** A sequence comes into being, with a random state of its own; until end(). */
  virtual void begin(SequenceId sequence, const Sampling& sampling, std::shared_ptr<TokenMask> mask, const Drafts& drafts) = 0;
  virtual void end(SequenceId sequence) noexcept = 0;

  /** A draft for each, at most as long as wanted, or none. A failure of drafts is none. */
  virtual std::vector<std::vector<int>> draft(const std::vector<DraftWanted>& wanted) {
    return std::vector<std::vector<int>>(wanted.size());
  }
  /** After a row with a draft, whose cache holds all of it: only the first `tokens` stay. Comes once, before the next step. */
  virtual void keep(CacheId /*cache*/, int /*tokens*/) {}

  /** Runs all rows. When it throws, no token was chosen, every random state is as before, and the caches of the plan are of no more use. */
  virtual StepResult run(const StepPlan& plan) = 0;
};

}  // namespace mlxlm::engine
