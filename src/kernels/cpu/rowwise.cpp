// Kernels that work on one row at a time: norms, activations, rotation, cache writes.
#include <algorithm>
#include <cmath>

#include <mlx/ops.h>

#include "base/thread_pool.h"
#include "kernels/cpu/kernel.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/rows.h"

namespace mlxlm::kernels::cpu {
namespace {

/** body(row) over `rows`, in parallel when it pays. */
template <class RowBody>
void for_rows(int64_t rows, int64_t width, RowBody&& body) {
  constexpr int64_t worth_a_thread = 16384;  // elements
  const int chunks = rows * width < worth_a_thread ? 1 : chunks_for(rows, compute_pool().threads());
  compute_pool().parallel_for(chunks, [&](int chunk, int) {
    for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; ++row) body(row);
  });
}

void run_rms_norm(const std::vector<mx::array>& in, mx::array& out, float eps, bool plus_one) {
  const Rows rows(in[0]);
  const int64_t width = rows.width();
  std::vector<float> weight;
  if (in.size() > 1) {
    weight.resize(width);
    Rows(in[1]).load(0, weight.data());
    if (plus_one) {
      for (auto& w : weight) w += 1.f;
    }
  }
  for_rows(rows.count(), width, [&](int64_t row) {
    float *x = scratch(1, width), *y = scratch(2, width);
    rows.load(row, x);
    isa().rms_norm(x, weight.empty() ? nullptr : weight.data(), eps, static_cast<int>(width), y);
    store_row(out, row, width, y);
  });
}

void act_row(GluAct act, const float* gate, const float* up, float* out, int64_t n) {
  switch (act) {
    case GluAct::silu:
      return isa().silu_mul(gate, up, out, n);
    case GluAct::gelu_tanh:
      return isa().gelu_tanh_mul(gate, up, out, n);
    case GluAct::gelu:
      for (int64_t i = 0; i < n; ++i) out[i] = 0.5f * gate[i] * (1.f + std::erf(gate[i] * 0.70710678f)) * (up == nullptr ? 1.f : up[i]);
      return;
    case GluAct::relu2:
      for (int64_t i = 0; i < n; ++i) {
        const float positive = std::max(gate[i], 0.f);
        out[i] = positive * positive * (up == nullptr ? 1.f : up[i]);
      }
  }
}

struct Rotation {
  std::shared_ptr<const std::vector<float>> frequencies;
  int offset;
  bool traditional;
  float input_scale;
};

void rotate(const Rotation& r, const float* cosines, const float* sines, const float* x, float* out, int64_t width) {
  const int64_t pairs = static_cast<int64_t>(r.frequencies->size());
  std::copy(x + 2 * pairs, x + width, out + 2 * pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t a = r.traditional ? 2 * i : i, b = r.traditional ? 2 * i + 1 : pairs + i;
    const float xa = x[a] * r.input_scale, xb = x[b] * r.input_scale;
    out[a] = xa * cosines[i] - xb * sines[i];
    out[b] = xb * cosines[i] + xa * sines[i];
  }
}

void run_rope(const mx::array& x, mx::array& out, const Rotation& r) {
  const Rows rows(x);
  const int64_t length = x.shape(1), heads = x.shape(2), width = rows.width(), pairs = static_cast<int64_t>(r.frequencies->size());
  for_rows(x.shape(0) * length, heads * width * 4, [&](int64_t token) {
    const int64_t batch = token / length, l = token % length;
    float *cosines = scratch(1, pairs), *sines = scratch(2, pairs), *in = scratch(3, width), *y = scratch(4, width);
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle = double(r.offset + l) * (*r.frequencies)[i];
      cosines[i] = static_cast<float>(std::cos(angle));
      sines[i] = static_cast<float>(std::sin(angle));
    }
    for (int64_t h = 0; h < heads; ++h) {
      rows.load(token * heads + h, in);
      rotate(r, cosines, sines, in, y, width);
      store_row(out, (batch * heads + h) * length + l, width, y);
    }
  });
}

}  // namespace

mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps, bool plus_one) {
  storage_of(x.dtype());
  std::vector<mx::array> inputs{x};
  if (weight) {
    if (x.ndim() == 0 || weight->shape() != mx::Shape{x.shape(-1)}) throw Error(Code::internal, "rms_norm", "the weight does not fit");
    storage_of(weight->dtype());
    inputs.push_back(*weight);
  }
  return make_kernel("RmsNorm", x.shape(), x.dtype(), std::move(inputs),
                     [eps, plus_one](const auto& in, auto& out) { run_rms_norm(in, out[0], eps, plus_one); });
}

mx::array glu(const mx::array& gate_up, GluAct act) {
  if (gate_up.ndim() == 0 || gate_up.shape(-1) % 2 != 0) throw Error(Code::internal, "glu", "wanted an even last axis");
  storage_of(gate_up.dtype());
  auto shape = gate_up.shape();
  shape.back() /= 2;
  return make_kernel("Glu", shape, gate_up.dtype(), {gate_up}, [act](const auto& in, auto& out) {
    const Rows rows(in[0]);
    const int64_t half = rows.width() / 2;
    for_rows(rows.count(), half * 4, [&](int64_t row) {
      float *x = scratch(1, 2 * half), *y = scratch(2, half);
      rows.load(row, x);
      act_row(act, x, x + half, y, half);
      store_row(out[0], row, half, y);
    });
  });
}

mx::array activate(const mx::array& x, GluAct act) {
  storage_of(x.dtype());
  return make_kernel("Activate", x.shape(), x.dtype(), {x}, [act](const auto& in, auto& out) {
    const Rows rows(in[0]);
    for_rows(rows.count(), rows.width() * 4, [&](int64_t row) {
      float *a = scratch(1, rows.width()), *y = scratch(2, rows.width());
      rows.load(row, a);
      act_row(act, a, nullptr, y, rows.width());
      store_row(out[0], row, rows.width(), y);
    });
  });
}

mx::array rope_heads(const mx::array& x, const std::shared_ptr<const std::vector<float>>& frequencies, int offset, bool traditional,
                     float input_scale) {
  if (x.ndim() != 4 || 2 * static_cast<int64_t>(frequencies->size()) > x.shape(3))
    throw Error(Code::internal, "rope_heads", "does not fit");
  storage_of(x.dtype());
  const Rotation rotation{frequencies, offset, traditional, input_scale};
  return make_kernel("RopeHeads", {x.shape(0), x.shape(2), x.shape(1), x.shape(3)}, x.dtype(), {x},
                     [rotation](const auto& in, auto& out) { run_rope(in[0], out[0], rotation); });
}

mx::array write_rows(const mx::array& buffer, const mx::array& x, int start) {
  const bool axes = x.ndim() == 4 && buffer.ndim() == 4 && x.shape(0) == buffer.shape(0) && x.shape(1) == buffer.shape(1) &&
                    x.shape(3) == buffer.shape(3);
  if (!axes || x.dtype() != buffer.dtype() || start < 0 || start + x.shape(2) > buffer.shape(2)) {
    throw Error(Code::internal, "write_rows", "does not fit");
  }
  return make_kernel(
      "WriteRows", buffer.shape(), buffer.dtype(), {buffer, x},
      [start](const auto& in, auto& out) {
        const auto& from = in[1];
        const int64_t length = from.shape(2), width = from.shape(3), capacity = out[0].shape(2), heads = from.shape(1);
        const int64_t item = static_cast<int64_t>(mx::size_of(from.dtype()));
        for (int64_t row = 0; row < from.shape(0) * heads * length; ++row) {
          const int64_t b = row / (heads * length), h = row / length % heads, l = row % length;
          const auto* source = from.template data<uint8_t>() + (b * from.strides(0) + h * from.strides(1) + l * from.strides(2)) * item;
          auto* target = out[0].template data<uint8_t>() + (((b * heads + h) * capacity) + start + l) * width * item;
          if (from.strides(3) == 1 || width == 1) {
            std::memcpy(target, source, width * item);
          } else {
            for (int64_t i = 0; i < width; ++i) std::memcpy(target + i * item, source + i * from.strides(3) * item, item);
          }
        }
      },
      /*share_first=*/true);
}

}  // namespace mlxlm::kernels::cpu
