// The gated delta rule over heads, for the fused executor and as an MLX primitive.
#include <algorithm>

#include "kernels/cpu/eager.h"
#include "kernels/cpu/kernel.h"

namespace mlxlm::kernels::cpu {

void eager_delta(int heads, int dims, const std::function<DeltaHead(int head)>& head_of) {
  constexpr int rows = 32;  // of a state, which then stay in the nearest cache over all tokens
  const int tiles = (dims + rows - 1) / rows;
  in_parallel(heads * tiles, [&](int task) {
    DeltaHead s = head_of(task / tiles);
    const int row = task % tiles * rows;
    const int64_t at = int64_t(row) * s.width;
    s.dims = std::min(rows, dims - row);
    s.v += row;
    s.y += row;
    s.state += at;
    if (s.from != nullptr) s.from += at;
    isa().delta(s);
  });
}

std::vector<mx::array> gated_delta(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& decay,
                                   const mx::array& beta, const std::optional<mx::array>& state) {
  const int batch = q.shape(0), tokens = q.shape(1), groups = q.shape(2), width = q.shape(3), heads = v.shape(2), dims = v.shape(3);
  const mx::Shape state_shape{batch, heads, dims, width}, step_shape{batch, tokens, heads};
  const bool fits = k.shape() == q.shape() && v.shape() == mx::Shape{batch, tokens, heads, dims} && heads % groups == 0 &&
                    decay.shape() == step_shape && beta.shape() == step_shape && (!state || state->shape() == state_shape);
  if (!fits) throw Error(Code::internal, "gated_delta", "does not fit");
  std::vector<mx::array> inputs{q, k, v, decay, beta};
  if (state) inputs.push_back(*state);
  return make_kernels("GatedDelta", {v.shape(), state_shape}, {mx::float32, mx::float32}, std::move(inputs),
                      [=](const auto& in, auto& out) {
                        eager_delta(batch * heads, dims, [&](int task) {
                          const int64_t b = task / heads, h = task % heads, g = h / (heads / groups), first = b * tokens;
                          const int64_t held = (b * heads + h) * dims * width;
                          DeltaHead s;
                          s.q = in[0].template data<float>() + (first * groups + g) * width;
                          s.k = in[1].template data<float>() + (first * groups + g) * width;
                          s.v = in[2].template data<float>() + (first * heads + h) * dims;
                          s.decay = in[3].template data<float>() + first * heads + h;
                          s.beta = in[4].template data<float>() + first * heads + h;
                          s.qk_stride = int64_t(groups) * width;
                          s.v_stride = s.y_stride = int64_t(heads) * dims;
                          s.step_stride = heads;
                          s.from = in.size() > 5 ? in[5].template data<float>() + held : nullptr;
                          s.state = out[1].template data<float>() + held;
                          s.y = out[0].template data<float>() + (first * heads + h) * dims;
                          s.tokens = tokens;
                          s.width = width;
                          return s;
                        });
                      });
}

}  // namespace mlxlm::kernels::cpu
