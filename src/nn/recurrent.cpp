// Short convolutions, the Mamba-2 scan and the gated delta rule. Reference: mlx_lm/models/nemotron_h.py, ssm.py, gated_delta.py
#include <mlx/ops.h>

#include "nn/nn.h"

namespace mlxlm::nn {
namespace {

mx::array softplus(const mx::array& x) {
  return mx::logaddexp(x, mx::array(0.f, x.dtype()));
}

/** sum of x over (j, i] for each pair i >= j: [.., L] -> [.., L, L]. */
mx::array segment_sums(const mx::array& x) {
  const int length = x.shape(-1);
  return mx::cumsum(mx::tril(mx::repeat(mx::expand_dims(x, -1), length, -1), -1), -2);
}

struct Chunk {
  mx::array dtx, dt_a, b, c;  // [B,s,H,P], [B,s,H], [B,s,G,N], [B,s,G,N]
};

/** One chunk in its attention form; `state` [B,H,P,N] is read and replaced. */
mx::array scan_chunk(const Chunk& chunk, int heads, std::optional<mx::array>& state) {
  const int batch = chunk.dtx.shape(0), steps = chunk.dtx.shape(1), groups = chunk.b.shape(2), width = chunk.b.shape(3);
  const int repeats = heads / groups;
  const auto bt = mx::transpose(chunk.b, {0, 2, 3, 1});                                 // [B,G,N,s]
  const auto cb = mx::repeat(mx::matmul(mx::swapaxes(chunk.c, 1, 2), bt), repeats, 1);  // [B,H,s,s]
  const auto decay = mx::exp(segment_sums(mx::swapaxes(chunk.dt_a, 1, 2)));             // [B,H,s,s]
  auto y = mx::swapaxes(mx::matmul(mx::tril(mx::multiply(cb, decay), 0), mx::swapaxes(chunk.dtx, 1, 2)), 1, 2);
  const auto last = mx::transpose(mx::slice(decay, {0, 0, steps - 1, 0}, {batch, heads, steps, steps}), {0, 3, 1, 2});
  const auto decayed = mx::swapaxes(mx::swapaxes(mx::multiply(chunk.dtx, last), 1, 2), 2, 3);  // [B,H,P,s]
  auto next = mx::matmul(decayed, mx::swapaxes(mx::repeat(bt, repeats, 1), 2, 3));             // [B,H,P,N]
  if (state) {
    const auto grown = mx::exp(mx::cumsum(chunk.dt_a, 1));  // [B,s,H]
    const auto end = mx::reshape(mx::slice(grown, {0, steps - 1, 0}, {batch, steps, heads}), {batch, heads, 1, 1});
    next = mx::add(next, mx::multiply(end, *state));
    const auto c = mx::reshape(chunk.c, {batch, steps, groups, 1, width, 1});
    const auto before = mx::matmul(mx::reshape(*state, {batch, 1, groups, repeats, state->shape(2), width}), c);
    y = mx::add(y, mx::multiply(mx::expand_dims(grown, -1), mx::reshape(before, {batch, steps, heads, state->shape(2)})));
  }
  state = next;
  return y;
}

mx::array part(const mx::array& a, int from, int to) {
  mx::Shape start(a.ndim(), 0), stop = a.shape();
  start[1] = from;
  stop[1] = to;
  return mx::slice(a, start, stop);
}

}  // namespace

std::vector<mx::array> short_conv(const mx::array& x, const std::optional<mx::array>& tail, const mx::array& weight,
                                  const std::optional<mx::array>& bias) {
  const int batch = x.shape(0), length = x.shape(1), channels = x.shape(2), taps = weight.shape(1);
  const auto before = tail ? *tail : mx::zeros({batch, taps - 1, channels}, x.dtype());
  const auto padded = mx::concatenate({before, x}, 1);
  auto y = mx::multiply(mx::slice(padded, {0, 0, 0}, {batch, length, channels}),
                        mx::reshape(mx::slice(weight, {0, 0, 0}, {channels, 1, 1}), {channels}));
  for (int t = 1; t < taps; ++t) {
    const auto tap = mx::reshape(mx::slice(weight, {0, t, 0}, {channels, t + 1, 1}), {channels});
    y = mx::add(y, mx::multiply(mx::slice(padded, {0, t, 0}, {batch, t + length, channels}), tap));
  }
  if (bias) y = mx::add(y, *bias);
  return {y, part(padded, length, length + taps - 1)};
}

mx::array delta_decay(const mx::array& a, const mx::array& a_log, const mx::array& dt_bias) {
  const auto rate = mx::exp(mx::astype(a_log, mx::float32));
  return mx::exp(mx::negative(mx::multiply(rate, softplus(mx::add(a, dt_bias)))));
}

std::vector<mx::array> gated_delta_by_ops(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& decay,
                                          const mx::array& beta, const std::optional<mx::array>& state) {
  const int batch = q.shape(0), length = q.shape(1), groups = q.shape(2), width = q.shape(3), heads = v.shape(2), dims = v.shape(3);
  auto held = state ? *state : mx::zeros({batch, heads, dims, width}, mx::float32);
  const auto token = [](const mx::array& a, int t, mx::Shape shape) { return mx::reshape(part(a, t, t + 1), std::move(shape)); };
  const auto row = [&](const mx::array& a, int t) { return mx::repeat(token(a, t, {batch, groups, 1, width}), heads / groups, 1); };
  std::vector<mx::array> ys;
  for (int t = 0; t < length; ++t) {
    const auto key = row(k, t), query = row(q, t);
    held = mx::multiply(held, token(decay, t, {batch, heads, 1, 1}));
    const auto seen = mx::sum(mx::multiply(held, key), -1, true);
    const auto add = mx::multiply(mx::subtract(token(v, t, {batch, heads, dims, 1}), seen), token(beta, t, {batch, heads, 1, 1}));
    held = mx::add(held, mx::multiply(key, add));
    ys.push_back(mx::astype(mx::sum(mx::multiply(held, query), -1), v.dtype()));
  }
  return {mx::stack(ys, 1), held};
}

std::vector<mx::array> gated_delta(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& decay,
                                   const mx::array& beta, const std::optional<mx::array>& state) {
  if (!kernels::cpu::active()) return gated_delta_by_ops(q, k, v, decay, beta, state);
  const auto f32 = [](const mx::array& a) { return mx::contiguous(mx::astype(a, mx::float32)); };
  const auto before = state ? std::optional(f32(*state)) : std::nullopt;
  const auto made = kernels::cpu::gated_delta(f32(q), f32(k), f32(v), f32(decay), f32(beta), before);
  return {mx::astype(made[0], v.dtype()), made[1]};
}

std::vector<mx::array> ssm_scan(const mx::array& x, const mx::array& a_log, const mx::array& b, const mx::array& c, const mx::array& d,
                                const mx::array& dt, const mx::array& dt_bias, const std::optional<mx::array>& state, float dt_min,
                                float dt_max) {
  const int batch = x.shape(0), length = x.shape(1), heads = x.shape(2);
  const int chunk_tokens = length <= stepwise_tokens ? 1 : 256;
  auto step = softplus(mx::add(dt, dt_bias));
  step = mx::clip(step, mx::array(dt_min, step.dtype()), mx::array(dt_max, step.dtype()));
  const auto a = mx::astype(mx::negative(mx::exp(a_log)), step.dtype());
  const auto dt_a = mx::multiply(step, mx::reshape(a, {1, 1, heads}));
  const auto dtx = mx::multiply(mx::reshape(step, {batch, length, heads, 1}), x);
  std::optional<mx::array> held = state;
  std::vector<mx::array> ys;
  for (int from = 0; from < length; from += chunk_tokens) {
    const int to = std::min(length, from + chunk_tokens);
    ys.push_back(
        mx::astype(scan_chunk({part(dtx, from, to), part(dt_a, from, to), part(b, from, to), part(c, from, to)}, heads, held), x.dtype()));
  }
  auto y = ys.size() == 1 ? ys[0] : mx::concatenate(ys, 1);
  y = mx::add(y, mx::multiply(x, mx::reshape(d, {1, 1, heads, 1})));
  return {y, *held};
}

}  // namespace mlxlm::nn
