// A callable language model: description + weights.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <mlx/array.h>

#include "arch/model.h"
#include "cache/cache.h"
#include "plan/plan.h"
#include "weights/adapter.h"
#include "weights/weights.h"

namespace mlxlm::model {

namespace mx = mlx::core;

enum class Rows { all, last };

/** What one sequence does in a step. A batch is a list of these: each has caches of its own, so sequences of any length and with any kind
 * of cache run together, prefill beside decode, without padding. */
struct Segment {
  int tokens = 1;
  int wanted_rows = 1;              // logits of its last so many tokens; 0 = none (a chunk of a prompt)
  cache::Caches* caches = nullptr;  // null or empty: nothing is remembered
};

/** Thread: the one that owns MLX. */
class CausalModel {
 public:
  virtual ~CausalModel() = default;
  /** tokens int32 [T], the segments one after the other -> logits [R, V] of all wanted rows in the same order, in the model's dtype.
   * Advances each cache by its segment's tokens. On the CPU, a sequence's logits are the same bits whatever runs beside it. */
  virtual mx::array run(const mx::array& tokens, const std::vector<Segment>& segments) = 0;
  /** One sequence: tokens [1,L] int32 -> logits [1,L,V], or [1,1,V] for Rows::last. */
  mx::array forward(const mx::array& tokens, cache::Caches& caches, Rows rows = Rows::all);
  virtual const arch::Model& description() const = 0;
  /** "graph" or "fused". */
  virtual const char* executor() const = 0;
  /** Bytes of all parameters as they lie in memory. */
  virtual int64_t weight_bytes() const = 0;
  /** Bytes of a number among the keys and values that it keeps. */
  virtual int cache_value_bytes() const { return 2; }

 protected:
  const std::atomic<bool>* stop() const { return stop_; }

 private:
  friend class StopScope;
  const std::atomic<bool>* stop_ = nullptr;
};

/** While it lives, calls of run() on the CPU look at the flag (null = none) between two ops, also when they are evaluated later. A call
 * that finds it set ends at once: its logits are zeros, and what its caches got is worthless. The graph executor waits for each op. */
class StopScope {
 public:
  StopScope(CausalModel& model, const std::atomic<bool>* flag) : model_(model), before_(model.stop_) { model.stop_ = flag; }
  ~StopScope() { model_.stop_ = before_; }
  StopScope(const StopScope&) = delete;
  StopScope& operator=(const StopScope&) = delete;

 private:
  CausalModel& model_;
  const std::atomic<bool>* before_;
};

/** Throws Error(internal) when a caller's segments contradict each other, the tokens or the number of caches that a sequence has. */
void check_segments(const mx::array& tokens, const std::vector<Segment>& segments, int caches);

/** How a description runs: `best` is the fused executor where it has kernels for every op (docs/architecture.md), else the graph. */
enum class Executor { best, graph };

struct BuildOptions {
  Executor executor = Executor::best;
  weights::LowRanks adapters{};
  /** Inputs of quantized linear maps are rounded to the format of the weights, mxfp8 or nvfp4. */
  bool quantize_activations = false;
};

/** A callable model. Consumes the tensors. Throws Error(bad_weights), Error(unsupported) for activations in another format than those. */
std::unique_ptr<CausalModel> make_model(arch::Model description, weights::Tensors tensors, const std::map<std::string, plan::Quant>& quant,
                                        const BuildOptions& options = {});

struct Loaded {
  std::unique_ptr<CausalModel> model;
  json config;                                // config.json merged with generation_config.json
  std::shared_ptr<const json> gguf_metadata;  // null unless a GGUF file
  std::filesystem::path path;
};

/** config.json merged with generation_config.json (its eos_token_id wins) and hoisted quantization. Reference: mlx_lm/utils.py load_config
 */
json load_config(const std::filesystem::path& folder);

struct LoadOptions {
  Executor executor = Executor::best;
  std::filesystem::path adapter{};  // folder of a trained adapter; empty = none
  bool quantize_activations = false;
  /** Called when the config is known and before weights are read, so that others can begin. */
  std::function<void(const json& config, const std::shared_ptr<const json>& gguf_metadata)> on_config{};
};
/** A folder with config.json and model*.safetensors, or a .gguf file. Throws every Error of the rooms below. */
Loaded load(const std::filesystem::path& path, const LoadOptions& options = {});

}  // namespace mlxlm::model
