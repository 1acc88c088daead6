// Many prompts at once: the reference's BatchGenerator over the engine, and batch_generate with text. Reference: mlx_lm/generate.py
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "gen/generate.h"
#include "gen/prefix_files.h"
#include "gen/runner.h"
#include "text/tokenizer.h"

namespace mlxlm::gen {

/** Limits of an engine as a command wants them: memory for caches is what the machine has left. */
engine::Limits default_limits(int max_sequences = 32);

struct BatchOptions {
  int max_tokens = 128;
  std::vector<std::vector<int>> stop_tokens{};
  engine::Sampling sampling{};
  int max_kv_size_tokens = 0;
  cache::Quantization kv_quantization{};
  engine::Drafts drafts{};
  model::CausalModel* draft_model = nullptr;  // for drafts.model_tokens; with the tokens of the model (check_same_vocabulary)
  engine::Limits limits = default_limits();
};

/** Sequences of tokens join and leave at any step. Thread: the one that owns MLX. */
class BatchGenerator {
 public:
  using Uid = engine::SequenceId;

  /** What to insert; what is absent is as in BatchOptions. */
  struct Insert {
    std::vector<std::vector<int>> segments{};  // of the prompt: a step ends at each; empty ones are dropped
    std::optional<int> max_tokens{};
    cache::Caches caches{};  // continue from these; they hold exactly all_tokens
    std::vector<int> all_tokens{};
    std::optional<engine::Sampling> sampling{};
    std::optional<std::vector<std::vector<int>>> stop_tokens{};
    std::shared_ptr<engine::TokenMask> mask{};
    std::optional<cache::Quantization> kv_quantization{};
    std::optional<engine::Drafts> drafts{};
  };
  struct PromptResponse {
    Uid uid = 0;
    int processed_tokens = 0, total_tokens = 0;
    bool end_of_segment = false, end_of_prompt = false;
  };
  struct Response {
    Uid uid = 0;
    std::optional<engine::ChosenToken> chosen{};  // absent when the sequence ended without one
    bool from_draft = false;                      // guessed, and right; one step then brings several responses of a sequence
    engine::Finish finish = engine::Finish::none;
    std::optional<Error> error{};
    cache::Caches caches{};         // when finished, and wanted by keep_caches
    std::vector<int> all_tokens{};  // what they hold
  };
  struct Stats {
    int64_t prompt_tokens = 0, generation_tokens = 0, steps = 0;
    int64_t drafted_tokens = 0, accepted_tokens = 0;
    double prompt_s = 0, decode_s = 0, wall_s = 0;  // steps that carry prompt tokens, others, since the beginning
    double peak_memory_gb = 0;
    int64_t reused_tokens = 0;  // of prompts: computed before
    double prompt_tps() const { return prompt_s > 0 ? static_cast<double>(prompt_tokens) / prompt_s : 0; }
    double generation_tps() const { return wall_s > 0 ? static_cast<double>(generation_tokens) / wall_s : 0; }
  };

  explicit BatchGenerator(model::CausalModel& model, BatchOptions options = {}, bool keep_caches = false);

  /** Throws Error(bad_request), Error(out_of_memory): then nothing was inserted. */
  std::vector<Uid> insert(const std::vector<std::vector<int>>& prompts, const std::vector<int>& max_tokens = {});
  std::vector<Uid> insert_segments(std::vector<Insert> inserts);
  /** One step. Both are empty when no sequence is left. */
  std::pair<std::vector<PromptResponse>, std::vector<Response>> next();
  /** Steps until a token comes; empty when no sequence is left. */
  std::vector<Response> next_generated();

  /** Copies of the caches, and the tokens that they hold; unknown ids and those without a cache are left out. */
  std::map<Uid, std::pair<cache::Caches, std::vector<int>>> extract_cache(const std::vector<Uid>& uids);
  std::map<Uid, std::pair<cache::Caches, std::vector<int>>> remove(const std::vector<Uid>& uids, bool return_prompt_caches = false);
  int64_t prompt_cache_bytes() const;
  /** Running totals; take two and subtract for a window. */
  Stats stats() const;
  /** What caches take now, request by request. */
  engine::MemoryReport memory() const { return engine_.memory(); }
  engine::Engine& engine() { return engine_; }
  bool has_work() const { return engine_.has_work(); }

 private:
  model::CausalModel& model_;
  BatchOptions options_;
  bool keep_caches_;
  ModelRunner runner_;
  engine::Engine engine_;
  std::map<Uid, std::vector<int>> boundaries_;  // of prompts that are not done
  double start_s_;
};

/** One prompt of batch_generate. */
struct BatchItem {
  std::vector<int> prompt{};
  int max_tokens = 128;
  engine::Sampling sampling{};
  std::vector<std::string> stop{};
  int max_kv_size_tokens = 0;
  cache::Quantization kv_quantization{};
  engine::Drafts drafts{};
  bool ignore_eos = false;
};

struct BatchAnswer {
  std::string text{};
  std::vector<int> tokens{};      // without the one that ended it
  std::vector<float> logprobs{};  // of `tokens`, when wanted
  Finish finish = Finish::none;   // none: failed, see error
  std::optional<Error> error{};
  int prompt_tokens = 0, generation_tokens = 0;  // generation: the token that ended it counts
  int accepted_tokens = 0;                       // of these: guesses
};

struct BatchRun {
  engine::Limits limits = default_limits();
  std::function<void(std::size_t index, const BatchAnswer&)> on_answer{};  // as each ends
  /** More text of an answer, as it comes; what it returns, false ends this one with Finish::cancelled. */
  std::function<bool(std::size_t index, const std::string& text)> on_text{};
  model::CausalModel* draft_model = nullptr;
  std::function<void(const BatchGenerator::Stats&)> on_step{};
  const std::atomic<bool>* cancel = nullptr;
  /** Prefixes that outlive the run. Its engine's prefix_cache_bytes, for these and for what prompts have in common, default to those of the
   * folder or, without one, to a quarter of memory_bytes. */
  PrefixFolder prefixes{};
};

/** Answers in order of the items. A bad item fails alone. When cancelled, what is not done ends with Finish::cancelled and its text so far.
 */
std::vector<BatchAnswer> batch_generate(model::CausalModel& model, const text::Tokenizer& tokenizer, const std::vector<BatchItem>& items,
                                        const BatchRun& run = {}, BatchGenerator::Stats* stats = nullptr);

}  // namespace mlxlm::gen
