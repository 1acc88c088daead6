// Attention over quantized keys and values, and their expansion.
#include <mlx/ops.h>

#include "base/thread_pool.h"
#include "kernels/cpu/eager.h"
#include "kernels/cpu/kernel.h"
#include "kernels/cpu/rows.h"

namespace mlxlm::kernels::cpu {
namespace {

/** Rows between two heads when rows lie one after the other, or 0. */
int64_t capacity_of(const mx::array& a) {
  const int64_t width = a.shape(3);
  const bool plain = (width == 1 || a.strides(3) == 1) && (a.shape(2) == 1 || a.strides(2) == width);
  if (!plain) return 0;
  return a.shape(1) == 1 ? a.shape(2) : a.strides(1) % width == 0 ? a.strides(1) / width : 0;
}

/** The three parts of quantized rows in memory, heads equally far apart in all of them. */
class Parts {
 public:
  Parts(const mx::array& packed, const mx::array& scales, const mx::array& biases, int bits, int group)
      : arrays_{mx::array::unsafe_weak_copy(packed), mx::array::unsafe_weak_copy(scales), mx::array::unsafe_weak_copy(biases)},
        bits_(bits),
        group_(group) {
    capacity = capacity_of(packed);
    if (capacity == 0 || capacity_of(scales) != capacity || capacity_of(biases) != capacity) gather();
  }
  void gather() {
    for (auto& a : arrays_) a = copy_without_gaps(a);
    capacity = arrays_[0].shape(2);
  }
  int64_t capacity = 0;
  QuantizedSpan span(int b, int head = 0, int64_t row = 0) const {
    const auto at = [&](const mx::array& a) {
      const int64_t skip = b * a.strides(0) + (head * capacity + row) * a.shape(3);
      return a.data<uint8_t>() + skip * static_cast<int64_t>(mx::size_of(a.dtype()));
    };
    const auto& scales = arrays_[1];
    return {at(arrays_[0]),  at(scales), at(arrays_[2]), storage_of(scales.dtype()), int64_t(arrays_[0].shape(3)) * 4,
            scales.shape(3), bits_,      group_,         scales.shape(3) * group_};
  }

 private:
  std::vector<mx::array> arrays_;
  int bits_, group_;
};

void check(const QuantizedRows& r) {
  const bool axes =
      r.packed.ndim() == 4 && r.scales.ndim() == 4 && r.scales.shape() == r.biases.shape() && r.scales.dtype() == r.biases.dtype();
  bool fits = axes && r.packed.dtype() == mx::uint32 && r.group_size % 32 == 0 && r.packed.shape(3) * 32 == r.dims() * r.bits;
  for (int axis = 0; fits && axis < 3; ++axis) fits = r.packed.shape(axis) == r.scales.shape(axis);
  if (!fits) throw Error(Code::internal, "quantized rows", "shapes do not fit");
  storage_of(r.scales.dtype());
}

/** q [B,H,L,E] as the rows of floats that the kernel wants, and the way back. */
void run_attention(const std::vector<mx::array>& in, mx::array& out, const AttentionOptions& options, int bits, int group) {
  const auto& q = in[0];
  const int batch = q.shape(0), heads = q.shape(1), length = q.shape(2), keys = in[1].shape(2), kv_heads = in[1].shape(1);
  Parts k(in[1], in[2], in[3], bits, group), v(in[4], in[5], in[6], bits, group);
  if (k.capacity != v.capacity) {  // the kernel has one number for the distance between heads
    k.gather();
    v.gather();
  }
  const int e = k.span(0).dims, f = v.span(0).dims;
  static thread_local FloatBuffer queries, mixed;
  float *from = queries.get(int64_t(batch) * length * heads * e), *to = mixed.get(int64_t(batch) * length * heads * f);
  const Rows rows(q);
  for (int64_t row = 0; row < rows.count(); ++row) {
    const int64_t b = row / (heads * length), h = row / length % heads, l = row % length;
    rows.load(row, from + ((b * length + l) * heads + h) * e);
  }
  std::vector<QuantizedSpan> spans;
  spans.reserve(2 * batch);
  for (int b = 0; b < batch; ++b) {
    spans.push_back(k.span(b));
    spans.push_back(v.span(b));
    EagerAttention s{};
    s.q = from + int64_t(b) * length * heads * e;
    s.out = to + int64_t(b) * length * heads * f;
    s.q_stride = int64_t(heads) * e;
    s.out_stride = int64_t(heads) * f;
    s.tokens = length;
    s.capacity = k.capacity;
    s.visible = options.causal ? keys - length + 1 : keys;
    s.window = options.window;
    s.quantized_keys = &spans[2 * b];
    s.quantized_values = &spans[2 * b + 1];
    eager_attention({s}, {heads, kv_heads, e, f, options.scale, options.softcap, Storage::f32});
  }
  for (int64_t row = 0; row < int64_t(batch) * length * heads; ++row) store_row(out, row, f, to + row * f);
}

}  // namespace

mx::array attention(const mx::array& q, const QuantizedRows& k, const QuantizedRows& v, const AttentionOptions& options) {
  check(k);
  check(v);
  if (q.ndim() != 4 || k.dims() != q.shape(3) || k.packed.shape(0) != q.shape(0) || v.packed.shape(0) != q.shape(0) ||
      v.packed.shape(1) != k.packed.shape(1) || v.packed.shape(2) != k.packed.shape(2) || k.packed.shape(2) < q.shape(2) ||
      k.packed.shape(1) == 0 || q.shape(1) % k.packed.shape(1) != 0 || k.bits != v.bits || k.group_size != v.group_size ||
      !options.causal) {
    throw Error(Code::internal, "quantized attention", "shapes do not fit");
  }
  storage_of(q.dtype());
  return make_kernel(
      "QuantizedAttention", {q.shape(0), q.shape(2), q.shape(1), v.dims()}, q.dtype(),
      {q, k.packed, k.scales, k.biases, v.packed, v.scales, v.biases},
      [options, bits = k.bits, group = k.group_size](const auto& in, auto& out) { run_attention(in, out[0], options, bits, group); });
}

mx::array dequantize(const QuantizedRows& rows) {
  check(rows);
  if (!active()) return mx::dequantize(rows.packed, rows.scales, rows.biases, rows.group_size, rows.bits);
  mx::Shape shape = rows.packed.shape();
  shape.back() = rows.dims();
  return make_kernel("DequantizeRows", shape, rows.scales.dtype(), {rows.packed, rows.scales, rows.biases},
                     [bits = rows.bits, group = rows.group_size](const auto& in, auto& out) {
                       const Parts parts(in[0], in[1], in[2], bits, group);
                       const int heads = in[0].shape(1), held = in[0].shape(2), dims = out[0].shape(3);
                       compute_pool().parallel_for(in[0].shape(0) * heads, [&](int task, int) {
                         float* row = scratch(1, dims);
                         for (int s = 0; s < held; ++s) {
                           isa().dequantize(parts.span(task / heads, task % heads, s), 1, row, dims);
                           store_row(out[0], int64_t(task) * held + s, dims, row);
                         }
                       });
                     });
}

}  // namespace mlxlm::kernels::cpu
