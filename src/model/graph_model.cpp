// The graph executor: a description and its weights as MLX operations.
#include <cmath>

#include <mlx/device.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "model/blocks.h"
#include "model/causal_model.h"
#include "model/chunked_calls.h"
#include "model/fused_model.h"

namespace mlxlm::model {
namespace {

struct OpBlock {
  std::unique_ptr<Block> block;
  int cache = -1;  // its place in a sequence's caches; -1 = remembers nothing
};

struct StepBlocks {
  std::optional<NormBlock> pre, post;
  std::vector<OpBlock> ops;
  float scale = 1.f;
  bool clip_f16 = false;
};

/** x + y within float16, as the reference adds residuals of Gemma 3. */
mx::array clipped_sum(const mx::array& x, const mx::array& y) {
  if (x.dtype() != mx::float16) return mx::add(x, y);
  const auto sum = mx::add(mx::astype(x, mx::float32), mx::astype(y, mx::float32));
  return mx::astype(mx::clip(sum, mx::array(-65504.f), mx::array(65504.f)), mx::float16);
}

/** Reference: mlx_lm/utils.py load_model, quantize_activations */
std::set<std::string> quantized_inputs(const arch::Model& m, const Store& store, const std::map<std::string, plan::Quant>& quant) {
  std::set<std::string> paths;
  for (const auto& t : plan::tensors(m)) {
    const auto it = quant.find(t.path);
    if (t.role != plan::Role::matrix || t.leaf != "weight" || it == quant.end()) continue;
    if (it->second.mode != "mxfp8" && it->second.mode != "nvfp4") {
      throw Error(Code::unsupported, "quantize_activations", t.path + " is " + it->second.mode + ", wanted mxfp8 or nvfp4 weights");
    }
    if (store.has(t.path + ".bias")) throw Error(Code::unsupported, "quantize_activations", t.path + " has a bias");
    paths.insert(t.path);
  }
  if (paths.empty()) throw Error(Code::unsupported, "quantize_activations", "the model is not quantized, wanted mxfp8 or nvfp4 weights");
  return paths;
}

class GraphModel final : public CausalModel {
 public:
  GraphModel(arch::Model description, weights::Tensors tensors, const std::map<std::string, plan::Quant>& quant,
             const BuildOptions& options)
      : description_(std::move(description)), chunks_(description_) {
    Store store(std::move(tensors), quant, options.adapters);
    if (options.quantize_activations) store.quantized_inputs = quantized_inputs(description_, store, quant);
    const auto& m = description_;
    const std::string embed = m.root + "." + m.embed;
    dtype_ = activation_dtype(store, embed);
    store.dtype = dtype_;
    embed_ = store.map({embed});
    for (std::size_t i = 0; i < m.layers.size(); ++i) {
      const std::string at = m.root + "." + m.layers_at + "." + std::to_string(i) + ".";
      layers_.push_back(make_layer(m.layers[i], store, at, caches_));
    }
    final_norm_.emplace(m.final_norm, store, m.root + "." + m.final_norm.at);
    const bool own_head = !m.tied_head && store.has(m.head + ".weight");
    if (!own_head && !m.tied_head && !m.tied_unless_stored) throw Error(Code::bad_weights, m.head + ".weight", "missing");
    head_ = own_head ? store.map({m.head}) : embed_;
    head_->make_output_layer();
    bytes_ = store.bytes;
    made_ = std::move(store.made);
  }

  mx::array run(const mx::array& tokens, const std::vector<Segment>& segments) override {
    check_segments(tokens, segments, caches_);
    if (chunks_.cross(segments)) return chunks_.run(*this, tokens, segments);
    auto x = mx::expand_dims(embed_->embed(tokens, dtype_), 0);
    if (description_.embed_scale != 1.f) {
      const auto scale = mx::array(description_.embed_scale);
      x = mx::multiply(x, mx::astype(description_.embed_scale_bf16 ? mx::astype(scale, mx::bfloat16) : scale, dtype_));
    }
    const auto* stop = mx::default_device() == mx::Device::cpu ? this->stop() : nullptr;
    for (auto& layer : layers_) {
      for (auto& step : layer) {
        x = run_step(step, x, segments);
        if (stop == nullptr) continue;
        mx::eval(x);
        if (stop->load(std::memory_order_relaxed)) return no_logits(segments);
      }
    }
    x = wanted_rows(mx::squeeze(x, 0), segments);
    auto logits = (*head_)((*final_norm_)(x));
    if (logits.size() == 0) return mx::zeros(logits.shape(), logits.dtype());  // a GPU refuses kernels of no rows
    if (description_.logit_scale != 1.f) logits = mx::multiply(logits, mx::array(description_.logit_scale, logits.dtype()));
    if (const float cap = description_.logit_softcap; cap > 0.f) {
      logits = mx::multiply(mx::tanh(mx::divide(logits, mx::array(cap, logits.dtype()))), mx::array(cap, logits.dtype()));
    }
    return logits;
  }

  const arch::Model& description() const override { return description_; }
  const char* executor() const override { return "graph"; }
  FusedParts take_parts() { return {std::move(made_), dtype_, embed_, head_}; }
  int64_t weight_bytes() const override { return bytes_; }
  int cache_value_bytes() const override { return static_cast<int>(mx::size_of(dtype_)); }

 private:
  /** Of a call that was stopped. */
  mx::array no_logits(const std::vector<Segment>& segments) const {
    int rows = 0;
    for (const auto& segment : segments) rows += segment.wanted_rows;
    return mx::zeros({rows, description_.vocab}, dtype_);
  }

  /** The embedding's own dtype, or that of its scales; float scales of 8-bit floats leave the final norm's. */
  mx::Dtype activation_dtype(const Store& store, const std::string& embed) const {
    const auto dtype_of = [&](const std::string& name) { return store.has(name) ? std::optional(store.peek(name).dtype()) : std::nullopt; };
    for (const auto& name : {embed + ".scales", embed + ".weight", description_.root + "." + description_.final_norm.at + ".weight"}) {
      const auto dtype = dtype_of(name);
      if (dtype && mx::issubdtype(*dtype, mx::floating)) return *dtype;
    }
    return mx::float16;
  }

  /** `caches`: how many the layers before it have. */
  static std::vector<StepBlocks> make_layer(const arch::Layer& layer, Store& store, const std::string& at, int& caches) {
    std::vector<StepBlocks> steps;
    const int first = caches;
    for (const auto& step : layer) {
      StepBlocks made;
      if (step.pre) made.pre.emplace(*step.pre, store, at + step.pre->at);
      for (const auto& op : step.ops) made.ops.push_back({make_block(op, store, at), plan::remembers(op) ? caches++ : -1});
      if (step.post) made.post.emplace(*step.post, store, at + step.post->at);
      made.scale = step.scale;
      made.clip_f16 = step.clip_f16;
      steps.push_back(std::move(made));
    }
    caches = std::max(caches, first + 1);
    return steps;
  }

  /** x [T,D] -> [R,D]. */
  static mx::array wanted_rows(const mx::array& x, const std::vector<Segment>& segments) {
    std::vector<mx::array> kept;
    int end = 0;
    for (const auto& segment : segments) {
      end += segment.tokens;
      if (segment.wanted_rows > 0) kept.push_back(mx::slice(x, {end - segment.wanted_rows, 0}, {end, x.shape(1)}));
    }
    if (kept.empty()) return mx::slice(x, {0, 0}, {0, x.shape(1)});
    return kept.size() == 1 ? kept[0] : mx::concatenate(kept, 0);
  }

  static mx::array run_op(OpBlock& op, const mx::array& x, const std::vector<Segment>& segments) {
    Parts parts;
    for (const auto& segment : segments) {
      const bool held = op.cache >= 0 && segment.caches != nullptr && !segment.caches->empty();
      parts.push_back({segment.tokens, held ? (*segment.caches)[op.cache].get() : nullptr});
    }
    return (*op.block)(x, parts);
  }

  static mx::array run_step(StepBlocks& step, const mx::array& x, const std::vector<Segment>& segments) {
    const auto input = step.pre ? (*step.pre)(x) : x;
    auto y = run_op(step.ops[0], input, segments);
    for (std::size_t i = 1; i < step.ops.size(); ++i) y = mx::add(y, run_op(step.ops[i], input, segments));
    if (step.post) y = (*step.post)(y);
    if (step.scale != 1.f) y = mx::multiply(y, mx::array(step.scale, y.dtype()));
    return step.clip_f16 ? clipped_sum(x, y) : mx::add(x, y);
  }

  arch::Model description_;
  ChunkedCalls chunks_;
  mx::Dtype dtype_ = mx::float32;
  std::shared_ptr<nn::Linear> embed_, head_;
  std::vector<std::vector<StepBlocks>> layers_;
  int caches_ = 0;  // of a sequence
  std::optional<NormBlock> final_norm_;
  Store::Made made_;
  int64_t bytes_ = 0;
};

}  // namespace

void check_segments(const mx::array& tokens, const std::vector<Segment>& segments, int caches) {
  int64_t total = 0;
  for (const auto& s : segments) {
    if (s.tokens < 1 || s.wanted_rows < 0 || s.wanted_rows > s.tokens) throw Error(Code::internal, "run", "a segment's counts do not fit");
    if (s.caches != nullptr && !s.caches->empty() && s.caches->size() != static_cast<std::size_t>(caches)) {
      throw Error(Code::internal, "run", "caches of another model");
    }
    total += s.tokens;
  }
  if (tokens.ndim() != 1 || tokens.shape(0) != total || total == 0)
    throw Error(Code::internal, "run", "the segments do not cover the tokens");
}

mx::array CausalModel::forward(const mx::array& tokens, cache::Caches& caches, Rows rows) {
  if (tokens.ndim() != 2 || tokens.shape(0) != 1) throw Error(Code::internal, "forward", "wanted tokens of one sequence, [1, L]");
  const int length = tokens.shape(1);
  return mx::expand_dims(run(mx::reshape(tokens, {length}), {{length, rows == Rows::all ? length : 1, &caches}}), 0);
}

std::unique_ptr<CausalModel> make_model(arch::Model description, weights::Tensors tensors, const std::map<std::string, plan::Quant>& quant,
                                        const BuildOptions& options) {
  auto graph = std::make_unique<GraphModel>(std::move(description), std::move(tensors), quant, options);
  if (options.executor == Executor::graph || !kernels::cpu::active()) return graph;
  auto parts = graph->take_parts();
  return fuse(std::move(graph), std::move(parts));
}

}  // namespace mlxlm::model
