// Steps of attention and feed-forward layers as one CPU primitive: activations stay float32 from the embedding to the logits.
#include "model/fused_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include <mlx/allocator.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "kernels/cpu/eager.h"
#include "kernels/cpu/kernel.h"
#include "kernels/cpu/rows.h"

namespace mlxlm::model {
namespace {

namespace cpu = kernels::cpu;

constexpr int chunk_tokens = 512;  // rows that go through all layers together

struct FusedNorm {
  std::vector<float> weight;  // empty = none
  float eps = 0.f;
  void operator()(const float* x, int dims, float* out) const {
    cpu::isa().rms_norm(x, weight.empty() ? nullptr : weight.data(), eps, dims, out);
  }
};

struct FusedAttention {
  int layer = 0;  // whose cache it uses
  int heads = 0, kv_heads = 0, head_dim = 0, window = 0, rotation = -1;
  float scale = 1.f, softcap = 0.f;
  bool norm_full_width = false;
  std::optional<FusedNorm> q_norm{}, k_norm{};
  cpu::EagerMap qkv{}, o{};
};

struct FusedFeedForward {
  bool gated = true;
  arch::Act act = arch::Act::silu;
  int hidden = 0;
  cpu::EagerMap up{}, down{};  // gated: up holds gate and up
};

using FusedOp = std::variant<FusedAttention, FusedFeedForward>;

struct FusedStep {
  std::optional<FusedNorm> pre{}, post{};
  std::vector<FusedOp> ops{};
  float scale = 1.f;
};

struct Rotary {
  arch::Rope rope;
  std::vector<float> frequencies;
};

/** Where a sequence's keys and values of one layer lie during a step. */
struct Memory {
  cache::WritePlan plan;
  int window = 0;  // of a rotating cache, for several tokens at once
};

struct Sequence {
  int tokens, wanted_rows, offset;
  std::vector<std::optional<Memory>> layers;
};

/** Tokens [first, first + count) of a sequence in a chunk. */
struct Piece {
  int sequence, first, count;
};

/** Everything that does not change between steps, and scratch memory. */
class Program {
 public:
  std::vector<FusedStep> steps;
  std::vector<Rotary> rotations;
  FusedNorm final_norm;
  cpu::EagerMap head;
  cpu::PackedMatrixPtr embedding;
  float embed_scale = 1.f, logit_scale = 1.f, logit_softcap = 0.f;
  int width = 0, vocab = 0;
  mx::Dtype dtype = mx::float32;

  void run(const int* tokens, const std::vector<Sequence>& sequences, mx::array& logits);

 private:
  struct Chunk {
    std::vector<Piece> pieces;
    int tokens = 0;
  };
  void run_chunk(const int* tokens, const std::vector<Sequence>& sequences, const Chunk& chunk, mx::array& logits, int& next_row);
  void rotate_tables(const std::vector<Sequence>& sequences, const Chunk& chunk);
  void attention(const FusedAttention& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y);
  void finish_qkv(const FusedAttention& op, const Sequence& s, const Piece& piece, int l, int row, float* qkv);
  void feed_forward(const FusedFeedForward& op, const FusedStep& step, int rows, float* y);
  void write_logits(const std::vector<Sequence>& sequences, const Chunk& chunk, mx::array& logits, int& next_row);
  void input_row(const FusedStep& step, int row, float* to) const {
    const float* x = x_ + int64_t(row) * width;
    if (step.pre) return (*step.pre)(x, width, to);
    std::memcpy(to, x, width * sizeof(float));
  }
  bool exact() const { return dtype == mx::float32; }

  float* x_ = nullptr;
  cpu::FloatBuffer x_buffer_, qkv_, mixed_, y_, more_, hidden_, logits_;
  std::vector<std::vector<float>> cosines_, sines_;  // one a rotation, [row][pairs]
};

template <class Body>
void for_rows(int rows, int64_t width, Body&& body) {
  const int chunks = rows * width < 16384 ? 1 : std::min(rows, 32);
  cpu::in_parallel(chunks, [&](int chunk) {
    for (int row = int(int64_t(rows) * chunk / chunks); row < int(int64_t(rows) * (chunk + 1) / chunks); ++row) body(row);
  });
}

void copy_rows(const mx::array& from, mx::array& to, const std::vector<cache::WritePlan::Copy>& copies) {
  const int64_t row_bytes = from.shape(3) * static_cast<int64_t>(mx::size_of(from.dtype()));
  for (int h = 0; h < from.shape(1); ++h) {
    const auto* source = from.data<uint8_t>() + h * from.shape(2) * row_bytes;
    auto* target = to.data<uint8_t>() + h * to.shape(2) * row_bytes;
    for (const auto& c : copies) std::memcpy(target + c.to * row_bytes, source + c.from * row_bytes, c.rows * row_bytes);
  }
}

void Program::run(const int* tokens, const std::vector<Sequence>& sequences, mx::array& logits) {
  for (const auto& s : sequences) {
    for (const auto& memory : s.layers) {
      if (!memory || memory->plan.copies.empty()) continue;
      auto plan = memory->plan;
      copy_rows(*plan.old_keys, plan.keys, plan.copies);
      copy_rows(*plan.old_values, plan.values, plan.copies);
    }
  }
  int row = 0, at = 0;
  Chunk chunk;
  const auto flush = [&] {
    if (chunk.tokens == 0) return;
    run_chunk(tokens + at, sequences, chunk, logits, row);
    at += chunk.tokens;
    chunk = {};
  };
  for (int s = 0; s < static_cast<int>(sequences.size()); ++s) {
    for (int first = 0; first < sequences[s].tokens;) {
      const int count = std::min(sequences[s].tokens - first, chunk_tokens - chunk.tokens);
      chunk.pieces.push_back({s, first, count});
      chunk.tokens += count;
      first += count;
      if (chunk.tokens == chunk_tokens) flush();
    }
  }
  flush();
}

void Program::rotate_tables(const std::vector<Sequence>& sequences, const Chunk& chunk) {
  cosines_.resize(rotations.size());
  sines_.resize(rotations.size());
  for (std::size_t i = 0; i < rotations.size(); ++i) {
    const auto& frequencies = rotations[i].frequencies;
    const std::size_t pairs = frequencies.size();
    cosines_[i].resize(chunk.tokens * pairs);
    sines_[i].resize(chunk.tokens * pairs);
    std::size_t at = 0;
    for (const auto& piece : chunk.pieces) {
      for (int l = 0; l < piece.count; ++l) {
        const double position = sequences[piece.sequence].offset + piece.first + l;
        for (std::size_t p = 0; p < pairs; ++p, ++at) {
          const double angle = position * frequencies[p];
          cosines_[i][at] = static_cast<float>(std::cos(angle));
          sines_[i][at] = static_cast<float>(std::sin(angle));
        }
      }
    }
  }
}

void Program::run_chunk(const int* tokens, const std::vector<Sequence>& sequences, const Chunk& chunk, mx::array& logits, int& next_row) {
  const int rows = chunk.tokens;
  x_ = x_buffer_.get(int64_t(rows) * width);
  for_rows(rows, width, [&](int row) {
    float* x = x_ + int64_t(row) * width;
    cpu::eager_embedding(*embedding, tokens[row], x);
    if (embed_scale != 1.f) {
      for (int i = 0; i < width; ++i) x[i] *= embed_scale;
    }
  });
  rotate_tables(sequences, chunk);
  float *y = y_.get(int64_t(rows) * width), *more = nullptr;
  for (const auto& step : steps) {
    for (std::size_t i = 0; i < step.ops.size(); ++i) {
      if (i > 0) more = more_.get(int64_t(rows) * width);
      float* out = i == 0 ? y : more;
      if (const auto* a = std::get_if<FusedAttention>(&step.ops[i])) attention(*a, step, sequences, chunk, out);
      else feed_forward(std::get<FusedFeedForward>(step.ops[i]), step, rows, out);
      if (i > 0) cpu::isa().add_scaled(y, more, 1.f, int64_t(rows) * width);
    }
    for_rows(rows, width, [&](int row) {
      float *x = x_ + int64_t(row) * width, *from = y + int64_t(row) * width;
      if (step.post) (*step.post)(from, width, from);
      cpu::isa().add_scaled(x, from, step.scale, width);
    });
  }
  write_logits(sequences, chunk, logits, next_row);
}

/** Norms and rotation of a token's heads; its key and value go to the cache. */
void Program::finish_qkv(const FusedAttention& op, const Sequence& s, const Piece& piece, int l, int row, float* qkv) {
  const int q = op.heads * op.head_dim, kv = op.kv_heads * op.head_dim;
  const auto normalize = [&](const std::optional<FusedNorm>& norm, float* at, int heads) {
    if (!norm) return;
    if (op.norm_full_width) return (*norm)(at, heads * op.head_dim, at);
    for (int h = 0; h < heads; ++h) (*norm)(at + h * op.head_dim, op.head_dim, at + h * op.head_dim);
  };
  normalize(op.q_norm, qkv, op.heads);
  normalize(op.k_norm, qkv + q, op.kv_heads);
  if (op.rotation >= 0) {
    const auto& r = rotations[op.rotation];
    const int pairs = static_cast<int>(r.frequencies.size());
    const float *cosines = cosines_[op.rotation].data() + int64_t(row) * pairs, *sines = sines_[op.rotation].data() + int64_t(row) * pairs;
    cpu::isa().rope(qkv, op.heads + op.kv_heads, op.head_dim, cosines, sines, pairs, r.rope.traditional, r.rope.input_scale);
  }
  const auto& plan = s.layers[op.layer]->plan;
  const auto storage = cpu::storage_of(plan.keys.dtype());
  const int64_t row_bytes = op.head_dim * static_cast<int64_t>(mx::size_of(plan.keys.dtype())), capacity = plan.keys.shape(2);
  for (int h = 0; h < op.kv_heads; ++h) {
    const int64_t at = (h * capacity + plan.write_at + piece.first + l) * row_bytes;
    cpu::isa().store(qkv + q + h * op.head_dim, storage, const_cast<uint8_t*>(plan.keys.data<uint8_t>()) + at, op.head_dim);
    cpu::isa().store(qkv + q + kv + h * op.head_dim, storage, const_cast<uint8_t*>(plan.values.data<uint8_t>()) + at, op.head_dim);
  }
}

void Program::attention(const FusedAttention& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk, float* y) {
  const int rows = chunk.tokens, q = op.heads * op.head_dim, wide = q + 2 * op.kv_heads * op.head_dim;
  float *qkv = qkv_.get(int64_t(rows) * wide), *mixed = mixed_.get(int64_t(rows) * q);
  cpu::eager_map(op.qkv, rows, [&](int row, float* to) { input_row(step, row, to); }, exact(), qkv, wide);
  std::vector<const Piece*> piece_of(rows);
  std::vector<int> first_row(chunk.pieces.size());
  std::vector<cpu::EagerAttention> parts;
  int at = 0;
  for (std::size_t p = 0; p < chunk.pieces.size(); ++p) {
    const auto& piece = chunk.pieces[p];
    const auto& memory = *sequences[piece.sequence].layers[op.layer];
    const int tokens = sequences[piece.sequence].tokens;
    std::fill(piece_of.begin() + at, piece_of.begin() + at + piece.count, &piece);
    first_row[p] = at;
    // One new token sees all that a rotating cache holds; of several, each sees the window before it.
    parts.push_back({qkv + int64_t(at) * wide, mixed + int64_t(at) * q, wide, q, piece.count, memory.plan.keys.data<void>(),
                     memory.plan.values.data<void>(), memory.plan.keys.shape(2), memory.plan.visible_rows - tokens + piece.first + 1,
                     memory.window});
    at += piece.count;
  }
  for_rows(rows, wide, [&](int row) {
    const Piece& piece = *piece_of[row];
    const int l = row - first_row[&piece - chunk.pieces.data()];
    finish_qkv(op, sequences[piece.sequence], piece, l, row, qkv + int64_t(row) * wide);
  });
  const auto storage = cpu::storage_of(sequences[chunk.pieces[0].sequence].layers[op.layer]->plan.keys.dtype());
  cpu::eager_attention(parts, {op.heads, op.kv_heads, op.head_dim, op.head_dim, op.scale, op.softcap, storage});
  cpu::eager_map(op.o, rows, [&](int row, float* to) { std::memcpy(to, mixed + int64_t(row) * q, q * sizeof(float)); }, exact(), y, width);
}

void act_row(arch::Act act, const float* gate, const float* up, float* out, int n) {
  switch (act) {
    case arch::Act::silu: return cpu::isa().silu_mul(gate, up, out, n);
    case arch::Act::gelu_tanh: return cpu::isa().gelu_tanh_mul(gate, up, out, n);
    case arch::Act::gelu:
      for (int i = 0; i < n; ++i) out[i] = 0.5f * gate[i] * (1.f + std::erf(gate[i] * 0.70710678f)) * (up == nullptr ? 1.f : up[i]);
      return;
    case arch::Act::relu2:
      for (int i = 0; i < n; ++i) {
        const float positive = std::max(gate[i], 0.f);
        out[i] = positive * positive * (up == nullptr ? 1.f : up[i]);
      }
  }
}

void Program::feed_forward(const FusedFeedForward& op, const FusedStep& step, int rows, float* y) {
  const int wide = op.gated ? 2 * op.hidden : op.hidden;
  float* hidden = hidden_.get(int64_t(rows) * wide);
  cpu::eager_map(op.up, rows, [&](int row, float* to) { input_row(step, row, to); }, exact(), hidden, wide);
  cpu::eager_map(op.down, rows, [&](int row, float* to) {
    const float* from = hidden + int64_t(row) * wide;
    act_row(op.act, from, op.gated ? from + op.hidden : nullptr, to, op.hidden);
  }, exact(), y, width);
}

void Program::write_logits(const std::vector<Sequence>& sequences, const Chunk& chunk, mx::array& logits, int& next_row) {
  std::vector<int> rows;  // of the chunk
  int at = 0;
  for (const auto& piece : chunk.pieces) {
    const auto& s = sequences[piece.sequence];
    for (int l = std::max(0, s.tokens - s.wanted_rows - piece.first); l < piece.count; ++l) rows.push_back(at + l);
    at += piece.count;
  }
  constexpr int rows_at_once = 32;  // logits are wide
  const auto storage = cpu::storage_of(dtype);
  const int64_t item = static_cast<int64_t>(mx::size_of(dtype));
  for (std::size_t first = 0; first < rows.size(); first += rows_at_once) {
    const int count = static_cast<int>(std::min<std::size_t>(rows_at_once, rows.size() - first));
    float* out = logits_.get(int64_t(count) * vocab);
    cpu::eager_map(head, count, [&](int row, float* to) { final_norm(x_ + int64_t(rows[first + row]) * width, width, to); }, exact(), out, vocab);
    constexpr int columns = 8192;
    const int blocks = (vocab + columns - 1) / columns;
    cpu::in_parallel(count * blocks, [&](int task) {
      const int row = task / blocks, from = task % blocks * columns, n = std::min(columns, vocab - from);
      float* l = out + int64_t(row) * vocab + from;
      for (int i = 0; i < n && logit_scale != 1.f; ++i) l[i] *= logit_scale;
      for (int i = 0; i < n && logit_softcap > 0.f; ++i) l[i] = std::tanh(l[i] / logit_softcap) * logit_softcap;
      cpu::isa().store(l, storage, logits.data<uint8_t>() + (int64_t(next_row + row) * vocab + from) * item, n);
    });
    next_row += count;
  }
}

// ---- from a description ----------------------------------------------------------------------------------------------

/** Collects what a description needs; `supported` turns false at the first op without kernels. */
class Fuser {
 public:
  Fuser(const arch::Model& model, const FusedParts& parts) : model_(model), parts_(parts) {}

  std::shared_ptr<Program> build() {
    auto program = std::make_shared<Program>();
    program_ = program.get();
    program->width = model_.width;
    program->vocab = parts_.head->out_dims();
    program->dtype = parts_.dtype;
    program->logit_scale = model_.logit_scale;
    program->logit_softcap = model_.logit_softcap;
    program->embed_scale = model_.embed_scale;
    if (model_.embed_scale != 1.f) program->embed_scale = rounded(model_.embed_scale, model_.embed_scale_bf16 ? mx::bfloat16 : parts_.dtype);
    const auto table = parts_.embed->eager();
    if (table.parts.size() != 1) return nullptr;
    program->embedding = table.parts[0].matrix;
    program->head = parts_.head->eager();
    if (program->head.parts.empty()) return nullptr;
    for (std::size_t i = 0; i < model_.layers.size(); ++i) {
      for (const auto& step : model_.layers[i]) program->steps.push_back(fuse_step(step, static_cast<int>(i)));
    }
    program->final_norm = norm(model_.final_norm, model_.root + ".");
    return supported_ ? program : nullptr;
  }

 private:
  static float rounded(float value, mx::Dtype dtype) { return mx::astype(mx::astype(mx::array(value), dtype), mx::float32).item<float>(); }

  FusedNorm norm(const arch::Norm& spec, const std::string& at) {
    FusedNorm made{.weight = {}, .eps = spec.eps};
    if (spec.kind != arch::NormKind::rms) supported_ = false;
    if (!supported_ || spec.weightless) return made;
    auto weight = mx::contiguous(mx::astype(parts_.made.norms.at(at + spec.at), mx::float32));
    mx::eval(weight);
    made.weight.assign(weight.data<float>(), weight.data<float>() + weight.size());
    if (spec.plus_one) {
      for (auto& w : made.weight) w += 1.f;
    }
    return made;
  }

  /** A map with an adapter has no parts. */
  cpu::EagerMap map(const std::string& path) {
    auto map = parts_.made.maps.at(path)->eager();
    if (map.parts.empty()) supported_ = false;
    return map;
  }

  int rotation(const std::optional<arch::Rope>& rope) {
    if (!rope) return -1;
    if (rope->kind == arch::RopeKind::dynamic_ntk) supported_ = false;  // its frequencies depend on the length of the call
    if (!supported_) return -1;
    auto frequencies = plan::rope_frequencies(*rope);
    for (std::size_t i = 0; i < program_->rotations.size(); ++i) {
      const auto& known = program_->rotations[i];
      if (known.frequencies == frequencies && known.rope.traditional == rope->traditional && known.rope.input_scale == rope->input_scale) {
        return static_cast<int>(i);
      }
    }
    program_->rotations.push_back({*rope, std::move(frequencies)});
    return static_cast<int>(program_->rotations.size()) - 1;
  }

  FusedStep fuse_step(const arch::Step& step, int layer) {
    FusedStep made;
    const std::string at = model_.root + "." + model_.layers_at + "." + std::to_string(layer) + ".";
    if (step.pre) made.pre = norm(*step.pre, at);
    if (step.post) made.post = norm(*step.post, at);
    made.scale = step.scale;
    for (const auto& op : step.ops) {
      if (!supported_) break;
      if (const auto* a = std::get_if<arch::Attention>(&op)) made.ops.push_back(attention(*a, at, layer));
      else if (const auto* g = std::get_if<arch::Glu>(&op)) made.ops.push_back(glu(*g, at));
      else if (const auto* m = std::get_if<arch::Mlp>(&op)) made.ops.push_back(mlp(*m, at));
      else supported_ = false;
    }
    return made;
  }

  FusedAttention attention(const arch::Attention& op, const std::string& layer_at, int layer) {
    const std::string at = layer_at + op.at + ".";
    FusedAttention made;
    made.layer = layer;
    made.heads = op.heads;
    made.kv_heads = op.kv_heads;
    made.head_dim = op.head_dim;
    made.window = op.window.value_or(0);
    made.scale = op.scale != 0.f ? op.scale : 1.f / std::sqrt(float(op.head_dim));
    made.softcap = op.softcap;
    made.norm_full_width = op.norm_full_width;
    made.rotation = rotation(op.rope);
    if (op.q_norm) made.q_norm = norm(*op.q_norm, at);
    if (op.k_norm) made.k_norm = norm(*op.k_norm, at);
    made.qkv = map(at + (op.fused_qkv.empty() ? op.q : op.fused_qkv));
    made.o = map(at + op.o);
    return made;
  }

  FusedFeedForward glu(const arch::Glu& op, const std::string& layer_at) {
    const std::string at = layer_at + op.at + ".";
    return {true, op.act, op.hidden, map(at + (op.fused_gate_up.empty() ? op.gate : op.fused_gate_up)), map(at + op.down)};
  }
  FusedFeedForward mlp(const arch::Mlp& op, const std::string& layer_at) {
    return {false, op.act, op.hidden, map(layer_at + op.at + "." + op.up), map(layer_at + op.at + "." + op.down)};
  }

  const arch::Model& model_;
  const FusedParts& parts_;
  Program* program_ = nullptr;
  bool supported_ = true;
};

class FusedModel final : public CausalModel {
 public:
  FusedModel(std::unique_ptr<CausalModel> graph, std::shared_ptr<Program> program) : graph_(std::move(graph)), program_(std::move(program)) {
    for (const auto& step : program_->steps) {
      for (const auto& op : step.ops) {
        if (const auto* a = std::get_if<FusedAttention>(&op)) attentions_.push_back(a);
      }
    }
  }

  mx::array run(const mx::array& tokens, const std::vector<Segment>& segments) override {
    check_segments(tokens, segments, description());
    if (!served(segments)) return graph_->run(tokens, segments);
    std::vector<Sequence> sequences;
    int rows = 0;
    for (const auto& segment : segments) {
      sequences.push_back(plan(segment));
      rows += segment.wanted_rows;
    }
    auto logits = cpu::make_kernel("Step", {rows, program_->vocab}, program_->dtype, {mx::contiguous(mx::astype(tokens, mx::int32))},
                                   [program = program_, sequences = std::move(sequences)](const auto& in, auto& out) {
                                     program->run(in[0].template data<int>(), sequences, out[0]);
                                   });
    for (const auto& segment : segments) {
      if (segment.caches == nullptr || segment.caches->empty()) continue;
      for (const auto* a : attentions_) static_cast<cache::AttentionCache&>(*(*segment.caches)[a->layer]).set_written(logits);
    }
    return logits;
  }

  const arch::Model& description() const override { return graph_->description(); }
  const char* executor() const override { return "fused"; }
  int64_t weight_bytes() const override { return graph_->weight_bytes(); }

 private:
  bool served(const std::vector<Segment>& segments) const {
    for (const auto& segment : segments) {
      if (segment.caches == nullptr || segment.caches->empty()) continue;
      for (const auto* a : attentions_) {
        const auto* held = dynamic_cast<cache::AttentionCache*>((*segment.caches)[a->layer].get());
        if (held == nullptr || !held->plans_writes()) return false;
      }
    }
    return true;
  }

  Sequence plan(const Segment& segment) const {
    Sequence s{segment.tokens, segment.wanted_rows, 0, std::vector<std::optional<Memory>>(description().layers.size())};
    for (const auto* a : attentions_) {
      const cache::KvShape shape{a->kv_heads, a->head_dim, a->head_dim, program_->dtype};
      if (segment.caches == nullptr || segment.caches->empty()) {
        cache::KvCache none;
        s.layers[a->layer] = {none.plan_write(segment.tokens, shape), a->window};
        continue;
      }
      auto& held = static_cast<cache::AttentionCache&>(*(*segment.caches)[a->layer]);
      s.offset = held.offset();
      const auto* rotating = dynamic_cast<cache::RotatingKvCache*>(&held);
      int window = a->window;
      if (rotating != nullptr) window = segment.tokens == 1 ? 0 : window > 0 ? window : rotating->max_size();
      s.layers[a->layer] = {held.plan_write(segment.tokens, shape), window};
    }
    return s;
  }

  std::unique_ptr<CausalModel> graph_;
  std::shared_ptr<Program> program_;
  std::vector<const FusedAttention*> attentions_;
};

}  // namespace

std::unique_ptr<CausalModel> fuse(std::unique_ptr<CausalModel> graph, FusedParts parts) {
  auto program = Fuser(graph->description(), parts).build();
  if (program == nullptr) return graph;
  return std::make_unique<FusedModel>(std::move(graph), std::move(program));
}

}  // namespace mlxlm::model
