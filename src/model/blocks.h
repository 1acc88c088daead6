// Ops of a description with their weights: each turns x [1,T,D] into [1,T,D].
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "arch/model.h"
#include "cache/cache.h"
#include "nn/nn.h"
#include "plan/plan.h"
#include "weights/adapter.h"
#include "weights/weights.h"

namespace mlxlm::model {

namespace mx = mlx::core;

/** Hands out the tensors of a checkpoint, each once, so that memory is released as the model is built. */
class Store {
 public:
  Store(weights::Tensors tensors, const std::map<std::string, plan::Quant>& quant, const weights::LowRanks& adapters)
      : tensors_(std::move(tensors)), quant_(quant), adapters_(adapters) {}
  bool has(const std::string& name) const { return tensors_.contains(name); }
  const mx::array& peek(const std::string& name) const { return tensors_.at(name); }
  /** Throws Error(bad_weights) when it is missing. */
  mx::array take(const std::string& name);
  /** As take(), and noted in `made`. */
  mx::array vector(const std::string& name);
  nn::Linear::Weights linear(const std::string& path);
  std::shared_ptr<nn::Linear> map(const std::vector<std::string>& paths);
  /** A map for each head; in `made` as stacked ones. */
  nn::HeadMaps heads(const std::string& path);
  /** Maps and norm weights that were handed out, by the path of their first part: the fused executor shares them. */
  struct Made {
    std::map<std::string, std::shared_ptr<nn::Linear>> maps{};
    std::map<std::string, mx::array> norms{};
    std::map<std::string, mx::array> vectors{};  // other parameters that are no maps, by name
  };
  Made made{};
  /** The dtype of the model's activations. */
  mx::Dtype dtype = mx::float32;
  int64_t bytes = 0;
  /** Modules whose inputs are rounded to the format of their weights. */
  std::set<std::string> quantized_inputs{};

 private:
  weights::Tensors tensors_;
  const std::map<std::string, plan::Quant>& quant_;
  const weights::LowRanks& adapters_;
};

class NormBlock {
 public:
  NormBlock(arch::Norm spec, Store& store, const std::string& path);
  mx::array operator()(const mx::array& x) const { return nn::norm(x, spec_, weight_, bias_); }

 private:
  arch::Norm spec_;
  std::optional<mx::array> weight_, bias_;
};

/** A sequence's tokens in a step, and its cache of the op at hand; null when nothing is remembered. */
struct Part {
  int tokens;
  cache::Cache* cache;
};
using Parts = std::vector<Part>;

class Block {
 public:
  virtual ~Block() = default;
  /** x [1,T,D], the parts' tokens one after the other -> [1,T,D]. */
  virtual mx::array operator()(const mx::array& x, const Parts& parts) = 0;
};

/** A block whose tokens look at each other: matmuls run over all parts at once, what lies between them over each part alone. */
class Mixer : public Block {
 public:
  mx::array operator()(const mx::array& x, const Parts& parts) final;

 protected:
  virtual mx::array before(const mx::array& x) = 0;
  /** projected [1,L,*] of one sequence. Advances the cache. */
  virtual mx::array mix(const mx::array& projected, cache::Cache* cache) = 0;
  virtual mx::array after(const mx::array& mixed) = 0;
};

/** `at` is the layer's path with a dot at the end. */
std::unique_ptr<Block> make_block(const arch::Op& op, Store& store, const std::string& at);

std::unique_ptr<Block> make_attention(const arch::Attention& op, Store& store, const std::string& at);
std::unique_ptr<Block> make_mla(const arch::Mla& op, Store& store, const std::string& at);
std::unique_ptr<Block> make_moe(const arch::Moe& op, Store& store, const std::string& at);
std::unique_ptr<Block> make_short_conv(const arch::ShortConv& op, Store& store, const std::string& at);
std::unique_ptr<Block> make_gated_delta(const arch::GatedDelta& op, Store& store, const std::string& at);
std::unique_ptr<Block> make_mamba2(const arch::Mamba2& op, Store& store, const std::string& at);

/** x [.., D] cut along the last axis at [from, to). */
mx::array columns(const mx::array& x, int from, int to);

/** Frequencies of a rotation, computed once where they do not depend on the length. */
class Rotation {
 public:
  explicit Rotation(std::optional<arch::Rope> rope);
  /** x [B,L,H,E] -> [B,H,L,E]. */
  mx::array operator()(const mx::array& x, int offset) const;

 private:
  std::optional<arch::Rope> rope_;
  std::shared_ptr<const std::vector<float>> frequencies_;
};

}  // namespace mlxlm::model
