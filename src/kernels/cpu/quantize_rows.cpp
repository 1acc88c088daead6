// Rows of numbers to MLX's affine quantization, with the codes that mx::quantize gives.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/eager.h"

namespace mlxlm::kernels::cpu {
namespace {

/** To the nearest whole number, ties to even; right below 2^22, and no call into the math library. */
float nearest(float x) {
  return std::abs(x) < 4194304.f ? (x + 12582912.f) - 12582912.f : x;
}

struct Scale {
  float scale, bias;
};

Scale scale_of(const float* x, int group, int most) {
  float low = x[0], high = x[0];
  for (int i = 1; i < group; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  const bool lower = std::abs(low) > std::abs(high);
  const float step = std::max((high - low) / float(most), 1e-7f), scale = lower ? step : -step, edge = lower ? low : high;
  const float whole = nearest(edge / scale);
  return whole == 0.f ? Scale{scale, 0.f} : Scale{edge / whole, edge};
}

}  // namespace

void quantize_row(const float* x, int dims, int bits, int group, Storage storage, uint8_t* packed, void* scales, void* biases) {
  const int most = (1 << bits) - 1, item = storage == Storage::f32 ? 4 : 2;
  uint32_t codes[128];
  for (int g = 0; g < dims / group; ++g, x += group) {
    const auto s = scale_of(x, group, most);
    for (int i = 0; i < group; ++i) {
      const float code = nearest((x[i] - s.bias) / s.scale);
      codes[i] = code > 0.f ? static_cast<uint32_t>(std::min(code, float(most))) : 0;  // not a number: 0
    }
    isa().store(&s.scale, storage, static_cast<uint8_t*>(scales) + g * item, 1);
    isa().store(&s.bias, storage, static_cast<uint8_t*>(biases) + g * item, 1);
    // One little-endian stream of bits; a group is a multiple of 32 codes, so it ends with a whole byte.
    uint64_t held = 0;
    int count = 0;
    for (int i = 0; i < group; ++i) {
      held |= uint64_t(codes[i]) << count;
      for (count += bits; count >= 8; count -= 8, held >>= 8) *packed++ = static_cast<uint8_t>(held);
    }
  }
}

}  // namespace mlxlm::kernels::cpu
