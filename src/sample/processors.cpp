// Logit bias and penalties for repetition. Reference: mlx_lm/sample_utils.py 0.32.2 make_logits_processors
#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <mlx/ops.h>

#include "base/error.h"
#include "sample/sample.h"

namespace mlxlm::sample {

namespace {

/** The last `size` tokens as indices [1, n]; size 0 = all, as in the reference, where it is tokens[-0:]. */
mx::array window(const std::vector<int>& tokens, int size) {
  const auto count = size == 0 ? tokens.size() : std::min(tokens.size(), static_cast<size_t>(size));
  return mx::array(tokens.data() + (tokens.size() - count), {1, static_cast<int>(count)}, mx::int32);
}

void check_penalty(const char* name, float value, const char* size_name, int size) {
  if (!std::isfinite(value)) throw Error(Code::bad_request, name, fmt::format("got {}, wanted a finite number", value));
  if (size < 0) throw Error(Code::bad_request, size_name, fmt::format("got {}, wanted 0 (all tokens) or more", size));
}

mx::array add_bias(const mx::array& logits, const std::map<int, float>& bias) {
  std::vector<int> ids;
  std::vector<float> values;
  for (const auto& [id, value] : bias) {
    ids.push_back(id);
    values.push_back(value);
  }
  const mx::Shape shape{1, static_cast<int>(ids.size())};
  return mx::scatter_add_axis(logits, mx::array(ids.data(), shape, mx::int32),
                              mx::astype(mx::array(values.data(), shape, mx::float32), logits.dtype()), -1);
}

}  // namespace

void check(const ProcessorOptions& o, int vocab) {
  check_penalty("repetition_penalty", o.repetition_penalty, "repetition_context_size", o.repetition_context_size);
  check_penalty("presence_penalty", o.presence_penalty, "presence_context_size", o.presence_context_size);
  check_penalty("frequency_penalty", o.frequency_penalty, "frequency_context_size", o.frequency_context_size);
  if (o.repetition_penalty < 0.f) {
    throw Error(Code::bad_request, "repetition_penalty", fmt::format("got {}, wanted 0 (off) or more", o.repetition_penalty));
  }
  for (const auto& [id, value] : o.logit_bias) {
    if (id < 0 || (vocab > 0 && id >= vocab)) {
      throw Error(
          Code::bad_request, "logit_bias",
          vocab > 0 ? fmt::format("got token {}, wanted 0 to {}", id, vocab - 1) : fmt::format("got token {}, wanted 0 or more", id));
    }
    if (std::isnan(value)) throw Error(Code::bad_request, "logit_bias", fmt::format("got nan for token {}, wanted a number", id));
  }
}

mx::array process(const mx::array& logits, const std::vector<int>& tokens, const ProcessorOptions& o) {
  mx::array x = logits;
  const auto dtype = x.dtype();
  if (!o.logit_bias.empty()) x = add_bias(x, o.logit_bias);
  if (tokens.empty()) return x;
  if (o.repetition_penalty != 0.f) {
    const auto ids = window(tokens, o.repetition_context_size);
    const auto penalty = mx::array(o.repetition_penalty, dtype);
    const auto chosen = mx::take_along_axis(x, ids, -1);
    x = mx::put_along_axis(x, ids, mx::where(mx::less(chosen, mx::array(0.f, dtype)), chosen * penalty, chosen / penalty), -1);
  }
  if (o.presence_penalty != 0.f) {
    const auto ids = window(tokens, o.presence_context_size);
    x = mx::put_along_axis(x, ids, mx::take_along_axis(x, ids, -1) - mx::array(o.presence_penalty, dtype), -1);
  }
  if (o.frequency_penalty != 0.f) {
    const auto ids = window(tokens, o.frequency_context_size);
    x = mx::scatter_add_axis(x, ids, mx::broadcast_to(mx::array(-o.frequency_penalty, dtype), ids.shape()), -1);
  }
  return x;
}

}  // namespace mlxlm::sample
