// An MLX primitive around a function.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <mlx/array.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/primitives.h>
#include <mlx/utils.h>

#include "base/error.h"
#include "kernels/cpu/memory.h"

namespace mlxlm::kernels::cpu {

namespace mx = mlx::core;

/** What runs on the stream's thread; the arrays are valid for the call. */
using Body = std::function<void(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs)>;

class FunctionPrimitive final : public mx::Primitive {
 public:
  /** `share_first`: the output is the first input's memory, written in place. */
  FunctionPrimitive(mx::Stream stream, const char* name, Body body, bool share_first = false)
      : Primitive(stream), name_(name), body_(std::move(body)), share_first_(share_first) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    if (share_first_) {
      outputs[0].copy_shared_buffer(inputs[0]);
    } else {
      for (auto& out : outputs) out.set_data(allocate(out.nbytes()));
    }
    std::vector<mx::array> in, out;
    for (const auto& a : inputs) in.push_back(mx::array::unsafe_weak_copy(a));
    for (const auto& a : outputs) out.push_back(mx::array::unsafe_weak_copy(a));
    // The body is copied: the primitive may be gone when the task runs.
    mx::cpu::get_command_encoder(stream()).dispatch([body = body_, in = std::move(in), out = std::move(out)]() mutable { body(in, out); });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw Error(Code::internal, name_, "a CPU kernel was asked to run on the GPU");
  }
  const char* name() const override { return name_; }

 private:
  const char* name_;
  Body body_;
  bool share_first_;
};

inline mx::array make_kernel(const char* name, mx::Shape shape, mx::Dtype dtype, std::vector<mx::array> inputs, Body body,
                             bool share_first = false) {
  const auto stream = mx::default_stream(mx::Device::cpu);
  return mx::array(std::move(shape), dtype, std::make_shared<FunctionPrimitive>(stream, name, std::move(body), share_first),
                   std::move(inputs));
}

/** The same with several outputs. */
inline std::vector<mx::array> make_kernels(const char* name, std::vector<mx::Shape> shapes, const std::vector<mx::Dtype>& dtypes,
                                           const std::vector<mx::array>& inputs, Body body) {
  const auto stream = mx::default_stream(mx::Device::cpu);
  return mx::array::make_arrays(std::move(shapes), dtypes, std::make_shared<FunctionPrimitive>(stream, name, std::move(body)), inputs);
}

}  // namespace mlxlm::kernels::cpu
