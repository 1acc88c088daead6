// Linear maps: packed for our kernels on the CPU, MLX's own elsewhere.
#include <utility>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "nn/nn.h"

namespace mlxlm::nn {
namespace {

namespace cpu = kernels::cpu;

bool same_kind(const Linear::Weights& a, const Linear::Weights& b) {
  if (a.quantize_input != b.quantize_input) return false;
  if (a.quant.has_value() != b.quant.has_value() || a.bias.has_value() != b.bias.has_value()) return false;
  if (!a.quant) return a.weight.dtype() == b.weight.dtype();
  return a.quant->mode == b.quant->mode && a.quant->bits == b.quant->bits && a.quant->group_size == b.quant->group_size;
}

cpu::PackedMatrixPtr pack(const std::vector<Linear::Weights>& parts) {
  std::vector<mx::array> weights, scales, biases;
  for (const auto& part : parts) {
    weights.push_back(part.weight);
    if (part.scales) scales.push_back(*part.scales);
    if (part.biases) biases.push_back(*part.biases);
  }
  const auto& quant = parts[0].quant;
  if (!quant) return cpu::pack_dense(weights);
  if (quant->mode == "affine") return cpu::pack_affine(weights, scales, biases, quant->bits, quant->group_size);
  return cpu::pack_float(weights, scales, quant->mode, quant->bits, quant->group_size);
}

mx::array dequantized(const Linear::Weights& w) {
  if (!w.quant) return w.weight;
  return mx::dequantize(w.weight, *w.scales, w.biases, w.quant->group_size, w.quant->bits, w.quant->mode);
}

/** x in the format of the weights, and back. Reference: mlx.nn.QQLinear */
mx::array rounded(const mx::array& x, const plan::Quant& quant) {
  const auto parts = mx::quantize(mx::reshape(x, {-1, x.shape(-1)}), quant.group_size, quant.bits, quant.mode);
  const auto y = mx::dequantize(parts[0], parts[1], std::nullopt, quant.group_size, quant.bits, quant.mode, std::nullopt, x.dtype());
  return mx::reshape(y, x.shape());
}

mx::array rows_of(const mx::array& x) {
  return mx::reshape(x, {-1, x.shape(-1)});
}

mx::array apply_part(const mx::array& x, const Linear::Weights& w) {
  auto y = w.quant ? mx::quantized_matmul(x, w.weight, *w.scales, w.biases, true, w.quant->group_size, w.quant->bits, w.quant->mode)
                   : mx::matmul(x, mx::transpose(w.weight));
  return w.bias ? mx::add(y, *w.bias) : y;
}

}  // namespace

Linear::Linear(std::vector<Weights> parts) : parts_(std::move(parts)) {
  if (parts_.empty()) throw Error(Code::internal, "Linear", "no weights");
  for (const auto& part : parts_) out_dims_ += part.weight.shape(-2);
  if (parts_[0].quantize_input) input_quant_ = parts_[0].quant;
  bool adapters = false;
  for (const auto& part : parts_) adapters = adapters || part.adapter;
  if (adapters && parts_.size() == 1) {
    adapt(std::move(parts_[0]));
    parts_.clear();
    return;
  }
  if (!adapters && !cpu::active()) return;
  bool fusable = !adapters;
  for (const auto& part : parts_) fusable = fusable && same_kind(part, parts_[0]);
  if (!fusable) {
    for (auto& part : parts_) split_.push_back(std::make_shared<Linear>(std::vector<Weights>{part}));
    parts_.clear();
    return;
  }
  packed_ = pack(parts_);
  if (parts_[0].bias) {
    std::vector<mx::array> biases;
    for (const auto& part : parts_) biases.push_back(*part.bias);
    bias_ = biases.size() == 1 ? biases[0] : mx::concatenate(biases);
    mx::eval(*bias_);
  }
  parts_.clear();
}

/** Reference: mlx_lm/tuner/lora.py LoRALinear, dora.py DoRALinear */
void Linear::adapt(Weights part) {
  const LowRank adapter = *std::exchange(part.adapter, std::nullopt);
  const auto bias = std::exchange(part.bias, std::nullopt);
  adapter_scale_ = adapter.scale;
  if (adapter.m) {
    const auto delta =
        mx::matmul(mx::multiply(mx::transpose(adapter.b), mx::array(adapter.scale, adapter.b.dtype())), mx::transpose(adapter.a));
    const auto sum = mx::astype(mx::add(dequantized(part), delta), mx::float32);
    stretch_ = mx::divide(*adapter.m, mx::sqrt(mx::sum(mx::square(sum), 1)));
    mx::eval(*stretch_);
  }
  if (bias) {
    bias_ = mx::contiguous(*bias);
    mx::eval(*bias_);
  }
  const auto factor = [](const mx::array& matrix) {
    auto rows = mx::contiguous(mx::astype(mx::transpose(matrix), mx::float32));
    mx::eval(rows);
    return std::make_shared<Linear>(std::vector<Weights>{{.weight = rows}});
  };
  into_rank_ = factor(adapter.a);
  from_rank_ = factor(adapter.b);
  base_ = std::make_shared<Linear>(std::vector<Weights>{std::move(part)});
}

mx::array Linear::adapted(const mx::array& x) const {
  const auto added = mx::multiply((*from_rank_)((*into_rank_)(mx::astype(x, mx::float32))), mx::array(adapter_scale_));
  auto y = mx::add((*base_)(x), mx::astype(added, x.dtype()));
  if (stretch_) y = mx::multiply(y, mx::astype(*stretch_, x.dtype()));
  return bias_ ? mx::add(y, mx::astype(*bias_, x.dtype())) : y;
}

mx::array Linear::operator()(const mx::array& input) const {
  const auto x = input_quant_ ? rounded(input, *input_quant_) : input;
  if (base_) return adapted(x);
  if (packed_) return cpu::matmul(x, packed_, bias_, output_layer_);
  std::vector<mx::array> outputs;
  if (!split_.empty()) {
    for (const auto& part : split_) outputs.push_back((*part)(x));
    return mx::concatenate(outputs, -1);
  }
  // MLX runs a quantized matmul of [B, 1, K] once a row: leading axes are flattened (docs/performance.md).
  const auto flat = rows_of(x);
  for (const auto& part : parts_) outputs.push_back(apply_part(flat, part));
  auto shape = x.shape();
  shape.back() = out_dims_;
  return mx::reshape(outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, -1), shape);
}

mx::array Linear::gather(const mx::array& x, const mx::array& indices, bool per_expert_input) const {
  if (packed_) return cpu::gather_matmul(x, packed_, indices, per_expert_input);
  std::vector<mx::array> outputs;
  if (!split_.empty()) {
    for (const auto& part : split_) outputs.push_back(part->gather(x, indices, per_expert_input));
    return mx::concatenate(outputs, -1);
  }
  const auto input = per_expert_input ? mx::expand_dims(x, -2) : mx::expand_dims(x, {-2, -3});  // [T, k|1, 1, in]
  for (const auto& w : parts_) {
    auto y = w.quant ? mx::gather_qmm(input, w.weight, *w.scales, w.biases, std::nullopt, indices, true, w.quant->group_size, w.quant->bits,
                                      w.quant->mode)
                     : mx::gather_mm(input, mx::swapaxes(w.weight, -1, -2), std::nullopt, indices);
    outputs.push_back(mx::squeeze(y, -2));
  }
  return outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, -1);
}

mx::array Linear::embed(const mx::array& tokens, mx::Dtype dtype) const {
  if (packed_) return cpu::take_rows(packed_, tokens, dtype);
  const auto& w = parts_.at(0);
  if (!w.quant) return mx::astype(mx::take(w.weight, tokens, 0), dtype);
  std::optional<mx::array> biases;
  if (w.biases) biases = mx::take(*w.biases, tokens, 0);
  return mx::dequantize(mx::take(w.weight, tokens, 0), mx::take(*w.scales, tokens, 0), biases, w.quant->group_size, w.quant->bits,
                        w.quant->mode, std::nullopt, dtype);
}

cpu::EagerMap Linear::eager() const {
  cpu::EagerMap map;
  map.out_dims = out_dims_;
  map.output_layer = output_layer_;
  if (input_quant_) return map;
  for (const auto& part : split_) {
    auto one = part->eager();
    if (one.parts.empty()) return {{}, out_dims_};
    map.parts.insert(map.parts.end(), one.parts.begin(), one.parts.end());
  }
  if (!packed_) return map;
  std::vector<float> bias;
  if (bias_) {
    auto values = mx::contiguous(mx::astype(*bias_, mx::float32));
    mx::eval(values);
    bias.assign(values.data<float>(), values.data<float>() + values.size());
  }
  map.parts.push_back({packed_, std::move(bias)});
  return map;
}

int64_t Linear::bytes() const {
  int64_t total = packed_ ? cpu::packed_bytes(*packed_) : 0;
  for (const auto& part : split_) total += part->bytes();
  for (const auto& part : {base_, into_rank_, from_rank_}) total += part ? part->bytes() : 0;
  for (const auto& part : parts_) {
    total += static_cast<int64_t>(part.weight.nbytes()) + (part.scales ? static_cast<int64_t>(part.scales->nbytes()) : 0) +
             (part.biases ? static_cast<int64_t>(part.biases->nbytes()) : 0);
  }
  return total;
}

mx::array HeadMaps::operator()(const mx::array& x, bool transpose) const {
  if (!weight_) {
    weight_ = mx::astype(dequantized(source_), dtype_);
    mx::eval(*weight_);
  }
  return mx::matmul(x, transpose ? mx::swapaxes(*weight_, -1, -2) : *weight_);
}

}  // namespace mlxlm::nn
