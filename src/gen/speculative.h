// Tokens guessed ahead, by a smaller model or out of the text so far, and caches that can go back when a guess was wrong.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "model/causal_model.h"
#include "sample/sample.h"
#include "text/tokenizer.h"

namespace mlxlm::gen {

namespace mx = mlx::core;

/** Runs what the caches wait for, so that no graph hangs on them. */
void evaluate_state(const cache::Caches& caches);

/** Throws Error(bad_request) when the tokens of the two are not the same, which drafts need. */
void check_same_vocabulary(const text::Tokenizer& target, const text::Tokenizer& draft);

/** The caches of a sequence as they are before a call that may have to count for nothing. */
class Undo {
 public:
  /** `tokens` are about to come; unless `wanted`, nothing is kept. */
  Undo(cache::Caches& caches, int tokens, bool wanted);
  void back();

 private:
  cache::Caches& caches_;
  std::vector<int> offsets_{};
  std::vector<cache::CachePtr> copies_{};  // of those that cannot rewind
};

/** A model and the caches of one sequence, from which the latest tokens can be taken back: where a cache cannot forget (recurrent states,
 * full windows) a copy from before takes its place, and the tokens that stay run again as the beginning of the next call. */
class Trail {
 public:
  Trail(model::CausalModel& model, cache::Caches& caches);
  /** Whether `tokens` tokens in one call give each what it would get alone. */
  bool one_call_agrees(int tokens) const;
  /** From here on back_to() works, over `tokens` tokens that come in one call or in several. */
  void mark(int tokens, bool one_call);
  /** Logits [wanted_rows, V] of the last rows. */
  mx::array run(const std::vector<int>& tokens, int wanted_rows);
  /** For a caller that runs the model itself, at once: the tokens of that call, which end with `tokens`. */
  std::vector<int> take_call(const std::vector<int>& tokens);
  /** Tokens that were kept and run again with the next call. */
  int pending() const { return static_cast<int>(pending_.size()); }
  /** Keeps the first `count` tokens that ran since the mark, at least one when they came in one call; takes the mark away. */
  void back_to(int count);
  /** Runs what must run again, so that the caches hold all tokens that were kept. */
  void settle();
  model::CausalModel& model() const { return model_; }

 private:
  model::CausalModel& model_;
  cache::Caches& caches_;
  int exact_context_;  // tokens; in a longer one a rotation depends on the length of the call
  int exact_call_;     // tokens; longer ones are computed in another form
  bool marked_ = false;
  std::vector<cache::CachePtr> copies_;  // of the caches that cannot rewind, as they were at the mark
  std::vector<int> since_;               // tokens that ran since the mark
  std::vector<int> pending_;             // kept, but not in the caches
  int redone_ = 0;                       // of since_: were pending at the mark
};

struct Draft {
  std::vector<int> tokens;
  std::optional<mx::array> probabilities{};  // [k, V] that each was drawn from; none = not drawn, or with the target's random numbers
};

/** Thread: the one that owns MLX. */
class Drafter {
 public:
  virtual ~Drafter() = default;
  /** What may be done ahead of the first draft; ends early when `cancel` (or null) is set. */
  virtual void read(const std::vector<int>& /*history*/, const std::atomic<bool>* /*cancel*/) {}
  /** Tokens that may follow `history` (prompt and answer so far), at most `most` (1 or more), or none. */
  virtual Draft propose(const std::vector<int>& history, int most) = 0;
  /** No more drafts come; what was guessed and not taken is forgotten. */
  virtual void finish() {}
};

/** Finds where the text so far ended as it ends now, the longest and then the latest such place, and drafts what came next there.
 *  Drafts grow while they are accepted, shrink when they are not, and pause when they are all wrong. Reference: prompt lookup decoding
 * (Saxena 2023) */
class NgramDrafter final : public Drafter {
 public:
  Draft propose(const std::vector<int>& history, int most) override;

 private:
  void index(const std::vector<int>& history);
  std::optional<int> match(const std::vector<int>& history) const;
  void judge_last(const std::vector<int>& history);

  std::unordered_map<uint64_t, int> latest_;  // pair of tokens -> where its second one stands
  std::vector<int> earlier_;                  // [position] -> the one before with the same pair, or -1
  std::vector<int> last_;                     // the last draft,
  std::size_t last_at_ = 0;                   // and the length of the history it was for
  int length_ = 4;                            // of the next draft
  int misses_ = 0, rest_ = 0;                 // drafts in a row of which nothing was right; calls to come without one
};

/** What a draft model has read: the next call over a text that begins alike goes on from there. */
struct DraftMemory {
  cache::Caches caches{};
  std::vector<int> held{};  // tokens in the caches
};

/** Runs a smaller model ahead. Draws with the request's sampler and processors, so that its choices are the target's as often as can be. */
class ModelDrafter final : public Drafter {
 public:
  /** `vocab` is the target's: models that share a tokenizer pad it differently. `memory` may hold what an earlier drafter has read. Throws
   * Error(bad_request) when its caches cannot be of this model, or hold another number of tokens; it stays as it is then. */
  ModelDrafter(model::CausalModel& model, int vocab, int max_kv_size_tokens, int prefill_step_tokens, sample::Sampler& sampler,
               const sample::ProcessorOptions& processors, DraftMemory* memory = nullptr);
  /** A memory that did not come to finish() is emptied. */
  ~ModelDrafter() override;
  void read(const std::vector<int>& history, const std::atomic<bool>* cancel) override;
  Draft propose(const std::vector<int>& history, int most) override;
  void finish() override;

  struct Wanted {
    ModelDrafter* drafter;
    const std::vector<int>* history;
    int most;
  };
  /** As propose() for each, with one call of the model a token for all. All drafters are of one model. */
  static std::vector<Draft> propose_together(const std::vector<Wanted>& wanted);

 private:
  struct Drawing;
  std::vector<int> rejoin(const std::vector<int>& history);
  void draw(const mx::array& logits, Drawing& drawing);
  void keep_common(const std::vector<int>& history);
  void catch_up(const std::vector<int>& unread, std::size_t left, const std::atomic<bool>* cancel);
  mx::array scores(mx::array logits, const std::vector<int>& history) const;
  std::vector<int> own_tokens(const std::vector<int>& tokens) const;

  model::CausalModel& model_;
  int vocab_, prefill_step_tokens_;
  sample::Sampler& sampler_;
  const sample::ProcessorOptions& processors_;
  int max_kv_size_tokens_;
  DraftMemory own_memory_;
  DraftMemory& memory_;
  cache::Caches& caches_;
  Trail trail_;
  std::vector<int>& held_;       // tokens in the caches
  std::size_t held_surely_ = 0;  // of them: no draft
  bool finished_ = false;
};

}  // namespace mlxlm::gen
