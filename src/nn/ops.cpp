// Norms, activations, rotation and attention.
#include <cmath>
#include <limits>
#include <numbers>

#include <mlx/fast.h>
#include <mlx/ops.h>

#include "base/error.h"
#include "nn/nn.h"

namespace mlxlm::nn {
namespace {

namespace cpu = kernels::cpu;

cpu::GluAct cpu_act(arch::Act act) {
  switch (act) {
    case arch::Act::silu:
      return cpu::GluAct::silu;
    case arch::Act::gelu:
      return cpu::GluAct::gelu;
    case arch::Act::gelu_tanh:
      return cpu::GluAct::gelu_tanh;
    case arch::Act::relu2:
      return cpu::GluAct::relu2;
  }
  throw Error(Code::internal, "activation", "unknown");
}

mx::array number(float value, const mx::array& like) {
  return mx::array(value, like.dtype());
}

/** True where query l (aligned at the end) sees key s. */
mx::array visible(int length, int keys, int window) {
  const auto query = mx::expand_dims(mx::arange(keys - length, keys, mx::int32), 1);
  const auto key = mx::expand_dims(mx::arange(0, keys, mx::int32), 0);
  auto mask = mx::less_equal(key, query);
  if (window > 0) mask = mx::logical_and(mask, mx::greater(key, mx::subtract(query, mx::array(window))));
  return mask;
}

/** Plain operations, for what the fused kernel of MLX does not have. */
mx::array attention_by_ops(const mx::array& q, const mx::array& k, const mx::array& v, float scale, int window, float softcap) {
  const int batch = q.shape(0), heads = q.shape(1), length = q.shape(2), kv = k.shape(1), keys = k.shape(2);
  const auto grouped = mx::reshape(mx::multiply(q, number(scale, q)), {batch, kv, heads / kv, length, q.shape(3)});
  auto scores = mx::matmul(grouped, mx::swapaxes(mx::expand_dims(k, 2), -1, -2));
  if (softcap > 0.f) scores = mx::multiply(mx::tanh(mx::divide(scores, number(softcap, scores))), number(softcap, scores));
  if (length > 1 || window > 0) {
    scores = mx::where(visible(length, keys, window), scores, number(-std::numeric_limits<float>::infinity(), scores));
  }
  const auto out = mx::matmul(mx::softmax(scores, -1, true), mx::expand_dims(v, 2));
  return mx::reshape(out, {batch, heads, length, v.shape(3)});
}

}  // namespace

mx::array norm(const mx::array& x, const arch::Norm& spec, const std::optional<mx::array>& weight, const std::optional<mx::array>& bias) {
  if (spec.kind == arch::NormKind::layer) return mx::fast::layer_norm(x, weight, bias, spec.eps);
  if (cpu::active()) return cpu::rms_norm(x, weight, spec.eps, spec.plus_one);
  if (!spec.plus_one || !weight) return mx::fast::rms_norm(x, weight, spec.eps);
  return mx::fast::rms_norm(x, mx::add(*weight, number(1.f, *weight)), spec.eps);
}

mx::array activate(const mx::array& x, arch::Act act) {
  if (cpu::active()) return cpu::activate(x, cpu_act(act));
  switch (act) {
    case arch::Act::silu:
      return mx::multiply(x, mx::sigmoid(x));
    case arch::Act::relu2:
      return mx::square(mx::maximum(x, number(0.f, x)));
    case arch::Act::gelu:
      return mx::multiply(mx::multiply(x, number(0.5f, x)),
                          mx::add(number(1.f, x), mx::erf(mx::multiply(x, number(std::numbers::sqrt2_v<float> / 2, x)))));
    case arch::Act::gelu_tanh: {
      const auto cubic = mx::multiply(number(0.044715f, x), mx::multiply(x, mx::square(x)));
      const auto z = mx::multiply(number(std::sqrt(2.f / std::numbers::pi_v<float>), x), mx::add(x, cubic));
      return mx::multiply(mx::multiply(x, number(0.5f, x)), mx::add(number(1.f, x), mx::tanh(z)));
    }
  }
  throw Error(Code::internal, "activation", "unknown");
}

mx::array glu(const mx::array& gate_up, arch::Act act) {
  if (cpu::active()) return cpu::glu(gate_up, cpu_act(act));
  const auto halves = mx::split(gate_up, 2, -1);
  return mx::multiply(activate(halves[0], act), halves[1]);
}

mx::array rope_heads(const mx::array& x, const arch::Rope* rope, const std::shared_ptr<const std::vector<float>>& frequencies, int offset) {
  if (rope == nullptr) return mx::transpose(x, {0, 2, 1, 3});
  if (cpu::active()) return cpu::rope_heads(x, frequencies, offset, rope->traditional, rope->input_scale);
  auto heads = mx::transpose(x, {0, 2, 1, 3});
  if (rope->input_scale != 1.f) {
    auto factors = std::vector<float>(x.shape(3), 1.f);
    for (int i = 0; i < rope->dims; ++i) factors[i] = rope->input_scale;
    heads = mx::multiply(heads, mx::astype(mx::array(factors.data(), {x.shape(3)}), x.dtype()));
  }
  std::vector<float> periods;
  for (const float f : *frequencies) periods.push_back(1.f / f);
  return mx::fast::rope(heads, rope->dims, rope->traditional, std::nullopt, 1.f, offset,
                        mx::array(periods.data(), {static_cast<int>(periods.size())}));
}

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale, int window, float softcap) {
  const int batch = q.shape(0), heads = q.shape(1), length = q.shape(2);
  if (cpu::active()) {
    const auto out = cpu::attention(q, k, v, {.scale = scale, .causal = true, .window = window, .softcap = softcap});
    return mx::reshape(out, {batch, length, heads * v.shape(3)});
  }
  mx::array out = q;
  if (softcap > 0.f) {
    out = attention_by_ops(q, k, v, scale, window, softcap);
  } else if (window > 0 && k.shape(2) > window) {
    out = mx::fast::scaled_dot_product_attention(q, k, v, scale, "array", visible(length, k.shape(2), window));
  } else {
    out = mx::fast::scaled_dot_product_attention(q, k, v, scale, length > 1 ? "causal" : "");
  }
  return mx::reshape(mx::transpose(out, {0, 2, 1, 3}), {batch, length, heads * v.shape(3)});
}

}  // namespace mlxlm::nn
