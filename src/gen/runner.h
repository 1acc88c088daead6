// Runs the engine's steps on a model: all rows in one call of it, then each row's own choice of a token.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>

#include "engine/engine.h"
#include "gen/speculative.h"
#include "model/causal_model.h"
#include "plan/plan.h"
#include "sample/sample.h"

namespace mlxlm::gen {

namespace mx = mlx::core;

sample::SamplerOptions sampler_options(const engine::Sampling& sampling);
sample::ProcessorOptions processor_options(const engine::Sampling& sampling);

/** Thread: the one that owns MLX. */
class ModelRunner final : public engine::Runner {
 public:
  /** Runs one token, to learn what caches of this model take. The limits are the engine's: the longest chunk of one sequence
   *  decides what a window takes. */
  explicit ModelRunner(model::CausalModel& model, const engine::Limits& limits = {}, model::CausalModel* draft_model = nullptr);

  void check(std::span<const int> tokens, const engine::Sampling& sampling, const engine::CacheOptions& cache,
             const engine::Drafts& drafts) const override;
  int64_t cost_bytes(int64_t tokens, const engine::CacheOptions& options) const override;
  int64_t growth_bytes(engine::CacheId cache, std::optional<int> copied, int64_t tokens,
                       const engine::CacheOptions& options) const override;
  bool is_replaceable(engine::CacheId cache) const override;
  bool chunks_show(const engine::CacheOptions& options) const override;
  engine::CacheId reserve(int64_t tokens, const engine::CacheOptions& options) override;
  void adapt(engine::CacheId cache, const engine::CacheOptions& options) override { held(cache).options = options; }
  engine::CacheId copy(engine::CacheId cache, int tokens) override;
  void trim(engine::CacheId cache, int tokens) override;
  void free(engine::CacheId cache) noexcept override;
  engine::CacheInfo info(engine::CacheId cache) const override;
  void begin(engine::SequenceId sequence, const engine::Sampling& sampling, std::shared_ptr<engine::TokenMask> mask,
             const engine::Drafts& drafts) override;
  void end(engine::SequenceId sequence) noexcept override;
  std::vector<std::vector<int>> draft(const std::vector<engine::DraftWanted>& wanted) override;
  void keep(engine::CacheId cache, int tokens) override;
  engine::StepResult run(const engine::StepPlan& plan) override;

  /** Caches from elsewhere get an id, and those of an id leave it. */
  engine::CacheId adopt(cache::Caches caches);
  cache::Caches take(engine::CacheId cache);
  const cache::Caches& caches(engine::CacheId cache);
  const engine::CacheOptions& options(engine::CacheId cache) const { return held(cache).options; }
  /** Caches that live. */
  std::size_t count() const { return held_.size(); }
  /** Bytes of all caches in memory; what several share counts once. */
  int64_t held_bytes() const;
  /** A long step that runs while the flag (null = none) is set throws Error(cancelled), soon on the CPU. */
  void stop_when(const std::atomic<bool>* flag) { stop_ = flag; }
  /** Whether copies share memory; to measure against copies that do not. */
  void share_memory(bool share) { shares_memory_ = share; }

 private:
  struct Held {
    cache::Caches caches;
    int tokens = 0;
    engine::CacheOptions options{};
    std::unique_ptr<Trail> trail{};  // from the first draft on, over `caches`
    bool marked = false;             // has run a draft, and keep() is still to come
  };
  struct Chooser;
  struct Choice;

  int64_t layer_bytes(std::size_t layer, int64_t tokens, int64_t limit_tokens, const engine::CacheOptions& options) const;
  int64_t draft_bytes(int64_t tokens, const engine::CacheOptions& options) const;
  Held& held(engine::CacheId cache);
  const Held& held(engine::CacheId cache) const;
  Trail& trail(Held& h);
  static void settle(Held& h);
  static bool quantize(Held& h);
  mx::array logits_of(const engine::StepPlan& plan);
  std::map<std::size_t, Choice> choose(const engine::StepPlan& plan, const mx::array& logits, engine::StepResult& result);
  Choice choose_one(const engine::PlannedRow& row, Chooser& chooser, mx::array logits);
  static engine::ChosenToken read(const Choice& choice, int row, int token, const engine::Sampling& sampling);
  static void read(const engine::PlannedRow& row, const Choice& choice, Chooser& chooser, engine::RowResult& result);
  mx::array masked(const mx::array& logits, engine::TokenMask& mask) const;

  model::CausalModel& model_;
  model::CausalModel* draft_model_;
  int chunk_tokens_, limited_chunk_tokens_;
  std::vector<plan::LayerCache> layout_;
  std::vector<int64_t> layer_value_bytes_, layer_fixed_bytes_;
  int draft_value_bytes_ = 0;
  std::vector<std::optional<cache::KvShape>> layer_shapes_;  // of layers that keep everything, where memory can be had ahead
  std::map<engine::CacheId, Held> held_;
  bool shares_memory_ = true;
  const std::atomic<bool>* stop_ = nullptr;
  std::map<engine::SequenceId, std::shared_ptr<Chooser>> choosers_;
  engine::CacheId last_id_ = 0;
};

}  // namespace mlxlm::gen
