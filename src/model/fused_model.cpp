// The fused executor: attention and its caches, and the model around the program.
#include "model/fused_model.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include <mlx/allocator.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "kernels/cpu/kernel.h"
#include "kernels/cpu/rows.h"
#include "model/chunked_calls.h"
#include "model/fused_program.h"

namespace mlxlm::model {
namespace fused {

namespace {

void copy_rows(const mx::array& from, mx::array& to, const std::vector<cache::WritePlan::Copy>& copies) {
  const int64_t row_bytes = from.shape(3) * static_cast<int64_t>(mx::size_of(from.dtype()));
  for (int h = 0; h < from.shape(1); ++h) {
    const auto* source = from.data<uint8_t>() + h * from.shape(2) * row_bytes;
    auto* target = to.data<uint8_t>() + h * to.shape(2) * row_bytes;
    for (const auto& c : copies) std::memcpy(target + c.to * row_bytes, source + c.from * row_bytes, c.rows * row_bytes);
  }
}

}  // namespace

void Program::run(const std::vector<mx::array>& in, const std::vector<Sequence>& sequences, std::vector<mx::array>& out,
                  const std::atomic<bool>* stop) {
  const int* tokens = in[0].data<int>();
  auto& logits = out[0];
  in_ = &in;
  out_ = &out;
  stop_ = stop;
  for (const auto& s : sequences) {
    for (const auto& memory : s.memories) {
      if (memory && memory->quantized && !memory->quantized->copies.empty()) {
        const auto& q = *memory->quantized;
        for (std::size_t i = 0; i < q.planes.size(); ++i) {
          auto plane = q.planes[i];
          copy_rows(q.old_planes[i], plane, q.copies);
        }
      }
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
    if (!stopped()) run_chunk(tokens + at, sequences, chunk, logits, row);
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
  if (!stopped()) return;
  for (auto& o : out) std::memset(o.data<uint8_t>(), 0, o.nbytes());
}

/** A row of queries with their gates, keys and values becomes one of queries, keys, values and gates. */
static void part_gates(const FusedAttention& op, float* row) {
  const int64_t q = op.heads * op.head_dim, kv = op.kv_heads * op.head_dim, bytes = op.head_dim * sizeof(float);
  float* both = cpu::scratch(5, 2 * q);
  std::memcpy(both, row, 2 * q * sizeof(float));
  std::memmove(row + q, row + 2 * q, 2 * kv * sizeof(float));
  for (int64_t h = 0; h < op.heads; ++h) {
    std::memcpy(row + h * op.head_dim, both + 2 * h * op.head_dim, bytes);
    std::memcpy(row + q + 2 * kv + h * op.head_dim, both + (2 * h + 1) * op.head_dim, bytes);
  }
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
  if (op.temperature != 0.f) {
    const float scale = arch::query_scale(op.temperature, op.temperature_tokens, s.offset + piece.first + l);
    for (int i = 0; i < q; ++i) qkv[i] *= scale;
  }
  const auto& plan = s.memories[op.cache]->plan;
  if (s.memories[op.cache]->quantized)
    return store_quantized(op, *s.memories[op.cache], plan.write_at + piece.first + l, qkv + q, qkv + q + kv);
  const auto storage = cpu::storage_of(plan.keys.dtype());
  const int64_t row_bytes = op.head_dim * static_cast<int64_t>(mx::size_of(plan.keys.dtype())), capacity = plan.keys.shape(2);
  for (int h = 0; h < op.kv_heads; ++h) {
    const int64_t at = (h * capacity + plan.write_at + piece.first + l) * row_bytes;
    cpu::isa().store(qkv + q + h * op.head_dim, storage, const_cast<uint8_t*>(plan.keys.data<uint8_t>()) + at, op.head_dim);
    cpu::isa().store(qkv + q + kv + h * op.head_dim, storage, const_cast<uint8_t*>(plan.values.data<uint8_t>()) + at, op.head_dim);
  }
}

/** The first row of the first head; the others follow it. */
static cpu::QuantizedSpan plane_span(const cache::QuantizedPlan& plan, int first) {
  const auto &packed = plan.planes[first], &scales = plan.planes[first + 1], &biases = plan.planes[first + 2];
  return {packed.data<uint8_t>(), scales.data<void>(), biases.data<void>(), cpu::storage_of(scales.dtype()),  int64_t(packed.shape(3)) * 4,
          scales.shape(3),        plan.bits,           plan.group_size,     scales.shape(3) * plan.group_size};
}

/** A token's keys and values of all heads, quantized on the way. */
void Program::store_quantized(const FusedAttention& op, const Memory& memory, int64_t row, const float* k, const float* v) {
  const auto& plan = *memory.quantized;
  for (const int first : {0, 3}) {
    const auto span = plane_span(plan, first);
    const int64_t item = span.storage == cpu::Storage::f32 ? 4 : 2, capacity = plan.planes[0].shape(2);
    const float* from = first == 0 ? k : v;
    for (int h = 0; h < op.kv_heads; ++h) {
      const int64_t at = h * capacity + row, scale_at = at * span.scale_stride * item;
      const auto in_plane = [&](const void* plane) { return const_cast<uint8_t*>(static_cast<const uint8_t*>(plane)) + scale_at; };
      cpu::quantize_row(from + h * op.head_dim, op.head_dim, span.bits, span.group, span.storage,
                        const_cast<uint8_t*>(span.packed) + at * span.packed_stride, in_plane(span.scales), in_plane(span.biases));
    }
  }
}

void Program::attention(const FusedAttention& op, const FusedStep& step, const std::vector<Sequence>& sequences, const Chunk& chunk,
                        float* y) {
  const int rows = chunk.tokens, q = op.heads * op.head_dim, kv = op.kv_heads * op.head_dim, wide = (op.gated ? 2 * q : q) + 2 * kv;
  float *qkv = qkv_.get(int64_t(rows) * wide), *mixed = mixed_.get(int64_t(rows) * q);
  cpu::eager_map(op.qkv, rows, [&](int row, float* to) { input_row(step, row, to); }, exact(), qkv, wide);
  std::vector<const Piece*> piece_of(rows);
  std::vector<int> first_row(chunk.pieces.size());
  std::vector<cpu::EagerAttention> parts;
  std::vector<cpu::QuantizedSpan> spans;  // pointed at
  spans.reserve(2 * chunk.pieces.size());
  int at = 0;
  for (std::size_t p = 0; p < chunk.pieces.size(); ++p) {
    const auto& piece = chunk.pieces[p];
    const auto& memory = *sequences[piece.sequence].memories[op.cache];
    const int tokens = sequences[piece.sequence].tokens;
    std::fill(piece_of.begin() + at, piece_of.begin() + at + piece.count, &piece);
    first_row[p] = at;
    // One new token sees all that a rotating cache holds; of several, each sees the window before it.
    cpu::EagerAttention part{qkv + int64_t(at) * wide, mixed + int64_t(at) * q, wide, q, piece.count};
    if (memory.quantized) {
      spans.push_back(plane_span(*memory.quantized, 0));
      spans.push_back(plane_span(*memory.quantized, 3));
      part.quantized_keys = &spans[spans.size() - 2];
      part.quantized_values = &spans.back();
      part.capacity = memory.quantized->planes[0].shape(2);
    } else {
      part.keys = memory.plan.keys.data<void>();
      part.values = memory.plan.values.data<void>();
      part.capacity = memory.plan.keys.shape(2);
      for (const auto& shared : memory.plan.shared) {
        part.shared.push_back({shared->keys.data<void>(), shared->values.data<void>(), shared->keys.shape(2), shared->rows});
      }
    }
    part.visible = memory.plan.visible_rows - tokens + piece.first + 1;
    part.window = memory.window;
    parts.push_back(part);
    at += piece.count;
  }
  for_rows(rows, wide, [&](int row) {
    const Piece& piece = *piece_of[row];
    const int l = row - first_row[&piece - chunk.pieces.data()];
    if (op.gated) part_gates(op, qkv + int64_t(row) * wide);
    finish_qkv(op, sequences[piece.sequence], piece, l, row, qkv + int64_t(row) * wide);
  });
  const auto storage = cpu::storage_of(dtype);
  cpu::eager_attention(parts, {op.heads, op.kv_heads, op.head_dim, op.head_dim, op.scale, op.softcap, storage});
  const auto heads = [&](int row, float* to) {
    if (op.gated) return cpu::isa().sigmoid_mul(qkv + int64_t(row) * wide + q + 2 * kv, mixed + int64_t(row) * q, to, q);
    std::memcpy(to, mixed + int64_t(row) * q, q * sizeof(float));
  };
  cpu::eager_map(op.o, rows, heads, exact(), y, width);
}

}  // namespace fused

namespace {

using namespace fused;

static_assert(cache::shared_block_rows % cpu::attention_block == 0);

class FusedModel final : public CausalModel {
 public:
  FusedModel(std::unique_ptr<CausalModel> graph, std::shared_ptr<Program> program)
      : graph_(std::move(graph)), program_(std::move(program)), chunks_(graph_->description()) {
    for (const auto& step : program_->steps) {
      for (const auto& op : step.ops) {
        if (const auto* a = std::get_if<FusedAttention>(&op)) attentions_.push_back(a);
        if (const auto* l = std::get_if<FusedLatent>(&op)) attentions_.push_back(&l->memory);
        if (const auto* m = std::get_if<FusedMamba>(&op)) states_.push_back(&m->memory);
        if (const auto* c = std::get_if<FusedShortConv>(&op)) states_.push_back(&c->memory);
        if (const auto* d = std::get_if<FusedGatedDelta>(&op)) states_.push_back(&d->memory);
      }
    }
  }

  mx::array run(const mx::array& tokens, const std::vector<Segment>& segments) override {
    check_segments(tokens, segments, program_->caches);
    const StopScope scope(*graph_, stop());
    if (chunks_.cross(segments)) return chunks_.run(*this, tokens, segments);
    if (!served(segments)) return apart(tokens, segments);
    std::vector<Sequence> sequences;
    Outputs outputs{{mx::contiguous(mx::astype(tokens, mx::int32))}, {{0, program_->vocab}}, {program_->dtype}};
    for (const auto& segment : segments) {
      sequences.push_back(plan(segment));
      plan_states(segment, sequences.back(), outputs);
      outputs.shapes[0][0] += segment.wanted_rows;
    }
    const auto made = cpu::make_kernels(
        "Step", outputs.shapes, outputs.dtypes, outputs.inputs,
        [program = program_, sequences, stop = stop()](const auto& in, auto& out) { program->run(in, sequences, out, stop); });
    const auto& logits = made[0];
    for (std::size_t i = 0; i < segments.size(); ++i) set_states(segments[i], sequences[i], made);
    for (const auto& segment : segments) {
      if (segment.caches == nullptr || segment.caches->empty()) continue;
      for (const auto* a : attentions_) static_cast<cache::AttentionCache&>(*(*segment.caches)[a->cache]).inner().set_written(logits);
    }
    return logits;
  }

  const arch::Model& description() const override { return graph_->description(); }
  const char* executor() const override { return "fused"; }
  int64_t weight_bytes() const override { return graph_->weight_bytes(); }
  int cache_value_bytes() const override { return graph_->cache_value_bytes(); }

 private:
  /** What a step reads and makes beside what lies in attention's caches. */
  struct Outputs {
    std::vector<mx::array> inputs;
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
  };

  static cache::RecurrentCache* recurrent_cache(const Segment& segment, const FusedState& state) {
    if (segment.caches == nullptr || segment.caches->empty()) return nullptr;
    auto* held = dynamic_cast<cache::RecurrentCache*>((*segment.caches)[state.cache].get());
    if (held == nullptr || held->slots() != static_cast<int>(state.shapes.size()))
      throw Error(Code::internal, "recurrent layer", "got the cache of another kind of layer");
    return held;
  }

  /** As the kernels read it: what a step made is that already, and must not wait for its evaluation. */
  static mx::array state_rows(const mx::array& a) {
    const bool own = a.dtype() == mx::float32 &&
                     (a.is_available() ? a.flags().row_contiguous : a.has_primitive() && std::string_view(a.primitive().name()) == "Step");
    return own ? a : mx::contiguous(mx::astype(a, mx::float32));
  }

  void plan_states(const Segment& segment, Sequence& s, Outputs& outputs) const {
    if (states_.empty()) return;
    s.recurrent.resize(program_->caches);
    for (const auto* state : states_) {
      const auto* held = recurrent_cache(segment, *state);
      const int slots = static_cast<int>(state->shapes.size());
      auto& place = s.recurrent[state->cache];
      place.out = static_cast<int>(outputs.shapes.size());
      bool filled = held != nullptr;
      for (int i = 0; i < slots && filled; ++i) filled = held->slot(i).has_value();
      if (filled) place.in = static_cast<int>(outputs.inputs.size());
      for (int i = 0; i < slots; ++i) {
        if (filled) {
          if (held->slot(i)->shape() != state->shapes[i]) throw Error(Code::internal, "recurrent layer", "got a state of another shape");
          outputs.inputs.push_back(state_rows(*held->slot(i)));
        }
        outputs.shapes.push_back(state->shapes[i]);
        outputs.dtypes.push_back(mx::float32);
      }
    }
  }

  void set_states(const Segment& segment, const Sequence& s, const std::vector<mx::array>& made) const {
    for (const auto* state : states_) {
      auto* held = recurrent_cache(segment, *state);
      if (held == nullptr) continue;
      for (int i = 0; i < held->slots(); ++i) held->set_slot(i, made[s.recurrent[state->cache].out + i]);
      held->advance(segment.tokens);
    }
  }

  /** The sequences that the kernels cannot serve on the graph, the others without them, in two calls: nobody's tokens depend on what runs
   * beside. Logits in the order of the segments. */
  mx::array apart(const mx::array& tokens, const std::vector<Segment>& segments) {
    std::vector<Segment> parts[2];  // 0 = graph, 1 = fused
    std::vector<mx::array> part_tokens[2];
    std::vector<int> part_of;
    int at = 0, rows[2] = {0, 0};
    for (const auto& segment : segments) {
      const int part = served({segment});
      parts[part].push_back(segment);
      part_tokens[part].push_back(mx::slice(tokens, {at}, {at + segment.tokens}));
      part_of.push_back(part);
      rows[part] += segment.wanted_rows;
      at += segment.tokens;
    }
    if (parts[1].empty()) return graph_->run(tokens, segments);
    const auto logits =
        mx::concatenate({graph_->run(mx::concatenate(part_tokens[0]), parts[0]), run(mx::concatenate(part_tokens[1]), parts[1])}, 0);
    std::vector<int> order;
    int next[2] = {0, rows[0]};
    for (std::size_t i = 0; i < segments.size(); ++i) {
      for (int row = 0; row < segments[i].wanted_rows; ++row) order.push_back(next[part_of[i]]++);
    }
    return mx::take(logits, mx::array(order.data(), {static_cast<int>(order.size())}, mx::int32), 0);
  }

  bool served(const std::vector<Segment>& segments) const {
    for (const auto& segment : segments) {
      if (segment.caches == nullptr || segment.caches->empty()) continue;
      for (const auto* a : attentions_) {
        auto* held = dynamic_cast<cache::AttentionCache*>((*segment.caches)[a->cache].get());
        const bool planned = held != nullptr && (held->inner().plans_writes() ||
                                                 (!a->latent && dynamic_cast<const cache::QuantizedKvCache*>(&held->inner()) != nullptr));
        if (!planned) return false;
      }
    }
    return true;
  }

  Sequence plan(const Segment& segment) const {
    Sequence s{segment.tokens, segment.wanted_rows, 0, std::vector<std::optional<Memory>>(program_->caches), {}};
    for (const auto* a : attentions_) {
      const cache::KvShape shape{a->kv_heads, a->head_dim, a->value_dim, program_->dtype};
      if (segment.caches == nullptr || segment.caches->empty()) {
        cache::KvCache none;
        s.memories[a->cache] = {none.plan_write(segment.tokens, shape), a->window, {}};
        continue;
      }
      auto& whole = static_cast<cache::AttentionCache&>(*(*segment.caches)[a->cache]);
      s.offset = whole.offset();
      whole.make_room(segment.tokens);
      auto& held = whole.inner();
      if (auto* quantized = dynamic_cast<cache::QuantizedKvCache*>(&held)) {
        const auto planned = quantized->plan_quantized(segment.tokens, shape);
        cache::WritePlan where{planned.planes[1], planned.planes[1]};
        where.write_at = planned.write_at;
        where.visible_rows = planned.visible_rows;
        s.memories[a->cache] = {std::move(where), a->window, planned};
        continue;
      }
      // Latents are read as one array.
      if (auto* full = dynamic_cast<cache::KvCache*>(&held); full != nullptr && a->latent) full->unshare();
      const auto* rotating = dynamic_cast<cache::RotatingKvCache*>(&held);
      int window = a->window;
      if (rotating != nullptr) window = segment.tokens == 1 ? 0 : window > 0 ? window : rotating->max_size();
      s.memories[a->cache] = {held.plan_write(segment.tokens, shape), window, {}};
    }
    return s;
  }

  std::unique_ptr<CausalModel> graph_;
  std::shared_ptr<Program> program_;
  std::vector<const FusedAttention*> attentions_;
  std::vector<const FusedState*> states_;
  ChunkedCalls chunks_;
};

}  // namespace

std::unique_ptr<CausalModel> fuse(std::unique_ptr<CausalModel> graph, FusedParts parts) {
  auto program = make_program(graph->description(), parts);
  if (program == nullptr) return graph;
  return std::make_unique<FusedModel>(std::move(graph), std::move(program));
}

}  // namespace mlxlm::model
