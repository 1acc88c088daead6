// Does a checkpoint fit its description? Quantization: mlx_lm/utils.py infer_quant_config
#include <set>
#include <sstream>

#include <mlx/utils.h>

#include "base/error.h"
#include "base/text_util.h"
#include "weights/names.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

std::string shown(const mx::Shape& shape) {
  std::vector<std::string> parts;
  for (const int dim : shape) parts.push_back(std::to_string(dim));
  return "[" + join(parts) + "]";
}

std::string listed(const std::set<std::string>& names) {
  constexpr std::size_t at_most = 3;
  std::vector<std::string> first;
  for (const auto& name : names) {
    if (first.size() == at_most) break;
    first.push_back(shown_name(name));
  }
  return join(first) + (names.size() > at_most ? " and " + std::to_string(names.size() - at_most) + " more" : "");
}

/** "; nearest to the first that is ...: a, b", or nothing. */
std::string nearest(const std::string& name, const std::set<std::string>& candidates, const std::string& what) {
  std::vector<std::string> near = nearest_names(name, {candidates.begin(), candidates.end()});
  for (auto& one : near) one = shown_name(one);
  return near.empty() ? "" : "; nearest to the first that is " + what + ": " + join(near);
}

std::optional<plan::Quant> from_shapes(int in_dims, const mx::array& weight, const mx::array& scales) {
  if (weight.ndim() == 0 || scales.ndim() == 0 || scales.shape(-1) == 0 || in_dims == 0) return std::nullopt;
  plan::Quant q;
  q.group_size = in_dims / scales.shape(-1);
  q.bits = static_cast<int>(int64_t(weight.shape(-1)) * 32 / in_dims);
  if (scales.dtype() == mx::uint8) {
    if (q.bits == 4 && q.group_size == 16)
      q.mode = "nvfp4";
    else if (q.bits == 4 && q.group_size == 32)
      q.mode = "mxfp4";
    else if (q.bits == 8 && q.group_size == 32)
      q.mode = "mxfp8";
    else
      return std::nullopt;
    return q;
  }
  const bool bits = q.bits >= 2 && q.bits <= 8 && q.bits != 7;
  if (!bits || (q.group_size != 32 && q.group_size != 64 && q.group_size != 128)) return std::nullopt;
  return q;
}

/** How module `path` is quantized, or nullopt. From the config and, for unnamed paths, from the shapes in the checkpoint;
 *  `in_dims` is the unquantized last axis. Reference: mlx_lm/utils.py infer_quant_config */
std::optional<plan::Quant> quant_of(const std::string& path, int in_dims, const Tensors& tensors, const plan::QuantConfig& config) {
  const auto named = config.by_path.find(path);
  if (named != config.by_path.end() && !named->second) return std::nullopt;
  const auto weight = tensors.find(path + ".weight"), scales = tensors.find(path + ".scales");
  if (weight == tensors.end() || scales == tensors.end()) return std::nullopt;
  if (!config.global)
    throw Error(Code::bad_weights, path + ".scales", "got a quantized tensor, but config.json says nothing of quantization");
  if (named != config.by_path.end()) return named->second;
  if (const auto inferred = from_shapes(in_dims, weight->second, scales->second)) return inferred;
  return config.global;
}

class Checker {
 public:
  Checker(const Tensors& tensors, const plan::QuantConfig& config, const std::string& where)
      : tensors_(tensors), config_(config), where_(where) {
    for (const auto& [name, value] : tensors) left_.insert(name);
  }

  void tensor(const plan::Tensor& t) {
    const bool can = t.role == plan::Role::matrix || t.role == plan::Role::stacked || t.role == plan::Role::embedding;
    const auto quant = can ? quant_of(t.path, t.shape.back(), tensors_, config_) : std::nullopt;
    if (!quant) return expect(t.name(), t.shape, Kind::real);
    if (t.shape.back() % quant->group_size != 0) {
      throw Error(Code::bad_weights, where_ + ": " + t.path,
                  "groups of " + std::to_string(quant->group_size) + " do not divide " + std::to_string(t.shape.back()));
    }
    auto packed = t.shape, groups = t.shape;
    packed.back() = static_cast<int>(int64_t(t.shape.back()) * quant->bits / 32);
    groups.back() = t.shape.back() / quant->group_size;
    const bool affine = quant->mode == "affine";
    expect(t.path + ".weight", packed, Kind::codes);
    expect(t.path + ".scales", groups, affine ? Kind::real : Kind::byte);
    if (affine) expect(t.path + ".biases", groups, Kind::real);
    quant_.emplace(t.path, *quant);
  }

  std::map<std::string, plan::Quant> finish() {
    if (!missing_.empty()) {
      throw Error(Code::bad_weights, where_, "missing " + listed(missing_) + nearest(*missing_.begin(), left_, "there"));
    }
    if (!left_.empty()) {
      throw Error(Code::bad_weights, where_,
                  "got tensors that the model does not have: " + listed(left_) + nearest(*left_.begin(), known_, "known"));
    }
    return std::move(quant_);
  }

 private:
  enum class Kind { real, codes, byte };

  void expect_dtype(const std::string& name, mx::Dtype dtype, Kind kind) const {
    const bool real = dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
    const bool fits = kind == Kind::real ? real : dtype == (kind == Kind::codes ? mx::uint32 : mx::uint8);
    if (fits) return;
    const char* wanted = kind == Kind::real    ? "float32, float16 or bfloat16"
                         : kind == Kind::codes ? "uint32 (packed codes)"
                                               : "uint8 (scales)";
    std::ostringstream got;
    got << dtype;
    throw Error(Code::bad_weights, where_ + ": " + name, "dtype " + got.str() + ", wanted " + wanted);
  }

  void expect(const std::string& name, const std::vector<int>& shape, Kind kind) {
    known_.insert(name);
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) {
      missing_.insert(name);
      return;
    }
    left_.erase(name);
    const mx::Shape wanted(shape.begin(), shape.end());
    if (it->second.shape() != wanted) {
      throw Error(Code::bad_weights, where_ + ": " + name, "shape " + shown(it->second.shape()) + ", wanted " + shown(wanted));
    }
    expect_dtype(name, it->second.dtype(), kind);
  }

  const Tensors& tensors_;
  const plan::QuantConfig& config_;
  const std::string& where_;
  std::set<std::string> left_, missing_, known_;
  std::map<std::string, plan::Quant> quant_;
};

}  // namespace

std::map<std::string, plan::Quant> check(const Tensors& tensors, const arch::Model& model, const plan::QuantConfig& config,
                                         const std::string& where) {
  Checker checker(tensors, config, where);
  const bool no_head = model.tied_unless_stored && !tensors.contains(model.head + ".weight");
  for (const auto& t : plan::tensors(model)) {
    if (no_head && t.path == model.head) continue;
    checker.tensor(t);
  }
  return checker.finish();
}

}  // namespace mlxlm::weights
