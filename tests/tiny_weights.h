// Weights of tiny models, computed from a tensor's name: the same bits here and in parity/make_goldens.py, so none are stored.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>
#include <vector>

namespace mlxlm::tests {

/** The checksum of zlib and PNG, continued from `crc`. */
inline uint32_t crc32(const void* data, std::size_t bytes, uint32_t crc = 0) {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xedb88320u ^ (value >> 1) : value >> 1;
      t[i] = value;
    }
    return t;
  }();
  const auto* at = static_cast<const uint8_t*>(data);
  crc = ~crc;
  for (std::size_t i = 0; i < bytes; ++i) crc = table[(crc ^ at[i]) & 0xff] ^ (crc >> 8);
  return ~crc;
}

inline uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/** Nearly normal, standard deviation 1.15; a multiple of 2^-15 below 4 in size, so exact in float32. */
inline float tiny_noise(uint32_t name_crc, uint32_t seed, uint64_t index) {
  const uint64_t bits = splitmix64(splitmix64((uint64_t(seed) << 32) | name_crc) + index);
  const int64_t sum = int64_t(bits & 0xffff) + int64_t(bits >> 16 & 0xffff) + int64_t(bits >> 32 & 0xffff) + int64_t(bits >> 48);
  return static_cast<float>(sum - 131070) * 0x1p-15f;
}

/** What a vector's values lie around: norm weights, D and the inverse scales of fp8 blocks 1, A_log 0.5, biases 0. */
inline float tiny_centre(std::string_view name, std::size_t axes) {
  if (name.ends_with("_scale_inv")) return 1.f;
  if (name.ends_with("A_log")) return 0.5f;
  const bool one = name.ends_with(".D") || (axes == 1 && name.ends_with(".weight"));
  return one ? 1.f : 0.f;
}

/** Matrices spread 0.7 / sqrt(last axis); everything else spreads 0.1 around its centre, in steps that make the sum exact. */
inline std::vector<float> tiny_weights(std::string_view name, const std::vector<int>& shape, uint32_t seed = 0) {
  uint64_t count = 1;
  for (const int dim : shape) count *= static_cast<uint64_t>(dim);
  const bool matrix = shape.size() >= 2 && !name.ends_with("_scale_inv");
  const float scale = matrix ? static_cast<float>(0.60625 / std::sqrt(double(shape.back()))) : 0.09375f;
  const float centre = matrix ? 0.f : tiny_centre(name, shape.size());
  const uint32_t crc = crc32(name.data(), name.size());
  std::vector<float> values(count);
  for (uint64_t i = 0; i < count; ++i) {
    const float noise = tiny_noise(crc, seed, i) * scale;
    values[i] = matrix ? noise : centre + noise;
  }
  return values;
}

}  // namespace mlxlm::tests
