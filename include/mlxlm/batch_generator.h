// The public C++ API, continued: sequences that join and leave a running batch.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "mlxlm/mlxlm.h"

namespace mlxlm {

/** Changes the logits [V] of a sequence's next token in place, after the penalties of its GenerateOptions; `tokens`: prompt and answer so
 * far. Called in next(), in the order given. What it throws ends that sequence alone, as Response::error. */
using LogitsProcessor = std::function<void(std::span<const int> tokens, std::span<float> logits)>;

/** Chooses a token out of log-probabilities [V] (-inf = forbidden), in place of the temperature and filters of GenerateOptions. Called in
 * next(), once for each token that is chosen; again for the same one only where a step failed. What it throws ends that sequence alone. */
using TokenSampler = std::function<int(std::span<const float> logprobs)>;

/** Which tokens may come after the answer so far: one bit each, lowest first, (V + 31) / 32 words; empty = all. Called on another thread
 * while the model runs, never twice at a time for a sequence. What it throws ends that sequence alone. Sequences with one get no drafts. */
using TokenMask = std::function<std::vector<uint32_t>(std::span<const int> answer)>;

/** Log-probabilities that responses carry. */
struct WantedLogprobs {
  bool chosen = false;  // of the token
  bool all = false;     // of the vocabulary
  int top = 0;          // of the most likely tokens, best first
};

/** Work and time, as running totals; the difference of two readings is a window. Times in seconds; prompt_s, decode_s and overhead_s() add
 * up to wall_s. A step that prompts and decoding share is divided between them by tokens.
 * Reference: mlx_lm/generate_utils.py BatchStats */
struct BatchStats {
  int64_t prompt_tokens = 0;                        // computed
  int64_t generation_tokens = 0;                    // all that were chosen
  int64_t decode_tokens = 0;                        // of these: without the first of each answer, which comes with its prompt
  int64_t steps = 0;                                // calls of the model
  int64_t generation_steps = 0;                     // of these: with decoding sequences
  int64_t drafted_tokens = 0, accepted_tokens = 0;  // guesses, and those that were right
  double prompt_s = 0, decode_s = 0;
  double wall_s = 0;          // since the beginning
  double peak_memory_gb = 0;  // 1e9 bytes, so far; of the process, on a GPU of MLX's allocator

  double generation_s() const { return wall_s - prompt_s; }
  double overhead_s() const { return wall_s - prompt_s - decode_s; }
  double prompt_tps() const { return rate(prompt_tokens, prompt_s); }
  double decode_tps() const { return rate(decode_tokens, decode_s); }
  double generation_tps() const { return rate(generation_tokens, generation_s()); }
  /** What came between two readings. */
  BatchStats since(const BatchStats& start) const;

 private:
  static double rate(int64_t tokens, double s) { return s > 0 ? static_cast<double>(tokens) / s : 0; }
};

/** Bytes in memory. */
struct MemoryReport {
  int64_t weight_bytes = 0;    // of the model
  int64_t held_bytes = 0;      // by the caches of sequences
  int64_t reserved_bytes = 0;  // for sequences that run, what they hold included, and caches that waiting ones brought
  int64_t stored_bytes = 0;    // by prefixes for later prompts
  int64_t stored_budget_bytes = 0;
  int64_t limit_bytes = 0;  // of reserved and stored; 0 = none
  struct Sequence {
    int64_t uid = 0;
    bool running = false;  // else it waits
    int tokens = 0;        // held
    int64_t held_bytes = 0, reserved_bytes = 0;
  };
  std::vector<Sequence> sequences{};
};

struct BatchGeneratorOptions {
  /** What a sequence asks for when nothing else is said at insert(). Its draft_model is the only one that there may be; no prompt_cache. A
   * seed is that of each sequence alone, not of all together. */
  GenerateOptions each{.max_tokens = 128};
  std::vector<LogitsProcessor> logits_processors{};
  TokenSampler sampler{};  // null = as GenerateOptions say
  WantedLogprobs logprobs{};
  std::optional<std::vector<std::vector<int>>> stop_tokens{};  // token sequences that end an answer; absent = the model's end tokens
  int max_sequences = 32;                                      // running at a time; more wait
  int prefill_step_size = 512;                                 // prompt tokens of a step; fewer beside decoding, so that it goes on
  std::optional<int64_t> memory_bytes{};                       // for caches; absent = what the machine has left, 0 = no limit
  int64_t prefix_cache_bytes = 0;  // for what ended sequences and ends of segments computed; needs keep_caches = false
  bool keep_caches = true;         // hand the cache of a sequence over with its last response; memory_bytes does not count it then
};

/** Lists that go with the prompts of an insert: each is empty (as BatchGeneratorOptions say), or has an entry a prompt.
 * all_tokens are those that the cache holds. Where they are missing, penalties, processors and drafts do not see them. A sequence whose
 * cache was lost with a step that failed is computed again; without all_tokens, and over a cache that is quantized or has a limit, it
 * fails, too. */
struct InsertLists {
  std::vector<int> max_tokens{};             // before the one of `options`
  std::vector<const PromptCache*> caches{};  // continue from a copy of it; null = from nothing. The size of given caches stays theirs
  std::vector<std::vector<int>> all_tokens{};
  std::vector<TokenSampler> samplers{};                           // null = the generator's
  std::vector<std::vector<LogitsProcessor>> logits_processors{};  // in place of the generator's
  std::vector<std::vector<std::vector<int>>> stop_sequences{};    // of tokens, in place of the generator's
  std::vector<GenerateOptions> options{};                         // in place of BatchGeneratorOptions::each
  std::vector<TokenMask> masks{};                                 // null = none
  std::vector<WantedLogprobs> logprobs{};
};

/** Answers many prompts at a time. Sequences may be inserted and removed between any two steps; each gets the tokens that generate() gives
 * it alone, whatever runs beside it. A failure ends its sequence and no other. Movable. Thread: that of the model, which must outlive it.
 * Beside the reference: prompts are computed in the steps of decoding and not between them, so there is no size of a prefill batch;
 * samplers and processors are seeded sequence by sequence; every kind of cache batches, also quantized. Reference: mlx_lm/generate.py
 * BatchGenerator */
class BatchGenerator {
 public:
  using Uid = int64_t;

  /** How far a prompt is. */
  struct PromptResponse {
    Uid uid = 0;
    int processed_tokens = 0, total_tokens = 0;
    bool end_of_segment = false, end_of_prompt = false;
  };
  /** A token, or the end of a sequence, or both. A step brings several of a sequence where drafts were right. */
  struct Response {
    Uid uid = 0;
    int token = -1;                                     // -1 = it ended without one
    float logprob = 0;                                  // as wanted, and so are the next two
    std::vector<float> logprobs{};                      // [V]
    std::vector<std::pair<int, float>> top_logprobs{};  // token and its log-probability
    std::string text{};                         // new text of the answer: without end tokens and stop texts, and never half a code point
    bool from_draft = false;                    // guessed, and right
    std::string finish_reason{};                // "" = it goes on; "stop", "length"; "error"
    std::string error{};                        // one line
    std::optional<PromptCache> prompt_cache{};  // with the last response, and keep_caches
    std::vector<int> all_tokens{};              // exactly those that it holds (but for what an inserted cache held without telling)
  };
  struct Step {
    std::vector<PromptResponse> prompts{};
    std::vector<Response> responses{};
  };
  struct Extracted {
    PromptCache cache{};
    std::vector<int> tokens{};  // as Response::all_tokens
  };

  /** Throws Error(bad_request): options out of range; a draft model with other tokens. */
  explicit BatchGenerator(Model& model, BatchGeneratorOptions options = {});
  BatchGenerator(BatchGenerator&&) noexcept;
  BatchGenerator& operator=(BatchGenerator&&) noexcept;
  ~BatchGenerator();

  /** Prompts of tokens, see Model::encode. Ids in their order. Throws Error(bad_request): a list of another length, an empty prompt, a
   * token that does not exist, options out of range, a cache of another model; Error(out_of_memory): a sequence that can never fit, or
   * a cache that cannot be held now, nor computed again (see InsertLists), with both figures. Nothing is inserted then. */
  std::vector<Uid> insert(const std::vector<std::vector<int>>& prompts, const InsertLists& lists = {});
  /** Prompts in segments: a step ends at the end of each, where extract_cache() then finds the cache; not at ends that lie in reused
   * tokens, or in a prompt beyond its max_kv_size or with a quantized window. Empty segments are dropped. */
  std::vector<Uid> insert_segments(const std::vector<std::vector<std::vector<int>>>& segments, const InsertLists& lists = {});

  /** One step. Both lists may be empty while a sequence waits for memory; has_work() tells whether there is more to do. */
  Step next();
  /** Steps until a token comes, or the end of a sequence; empty = nothing is left. */
  std::vector<Response> next_generated();
  bool has_work() const;

  /** Copies of what sequences hold, in memory that is shared where it can be; ids that are not known (any more) are left out. */
  std::map<Uid, Extracted> extract_cache(const std::vector<Uid>& uids);
  /** Ends sequences wherever they are, without a response. */
  std::map<Uid, Extracted> remove(const std::vector<Uid>& uids, bool return_prompt_caches = false);

  int64_t prompt_cache_bytes() const;
  BatchStats stats() const;
  MemoryReport memory() const;
  /** Ends all sequences and frees what they and stored prefixes hold. insert() throws from then on; stats() stay. */
  void close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mlxlm
