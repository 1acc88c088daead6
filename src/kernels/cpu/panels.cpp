// Rows of codes <-> panels of 16 rows.
#include "kernels/cpu/panels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace mlxlm::kernels::cpu {
namespace {

/** 8 codes of a stream of bits as 8 bytes. */
uint64_t eight_codes(const uint8_t* from, int bits) {
  uint64_t stream = 0, bytes = 0;
  std::memcpy(&stream, from, bits);
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  for (int i = 0; i < 8; ++i) bytes |= ((stream >> (bits * i)) & mask) << (8 * i);
  return bytes;
}

/** Every other byte. */
uint32_t even_bytes(uint64_t v) {
  v &= 0x00ff00ff00ff00ffu;
  v = (v | v >> 8) & 0x0000ffff0000ffffu;
  return static_cast<uint32_t>(v | v >> 16);
}

void put(uint8_t* panel, int64_t vector, int lane, uint32_t word) {
  std::memcpy(panel + vector * 64 + lane * 4, &word, 4);
}

/** Codes [32 * block, + count) of one row into its lane. Layout: isa.h. */
void write_block(const Panels& p, const uint8_t* codes, int count, int bits, uint8_t* to, int lane) {
  uint32_t one = 0, two[2] = {0, 0};
  const int high = p.bits - p.base_bits();  // bits beside the base
  for (int d = 0; d < count / 8; ++d) {
    const uint64_t c = eight_codes(codes + int64_t(d) * bits, bits);
    const uint32_t even = even_bytes(c), odd = even_bytes(c >> 8);
    const int pair = d / 2, at = d % 2 * 4;
    if (p.base_bits() == 4) put(to, d, lane, (even & 0x0f0f0f0fu) | (odd & 0x0f0f0f0fu) << 4);
    if (p.base_bits() == 2) two[pair] |= (even & 0x03030303u) << at | (odd & 0x03030303u) << (at + 2);
    const uint32_t even_high = even >> p.base_bits(), odd_high = odd >> p.base_bits();
    if (high == 2) two[pair] |= (even_high & 0x03030303u) << at | (odd_high & 0x03030303u) << (at + 2);
    if (high == 1) one |= (even_high & 0x01010101u) << (2 * d) | (odd_high & 0x01010101u) << (2 * d + 1);
  }
  const int first = p.base_bits() == 4 ? 4 : 0;
  if (p.base_bits() == 2 || high == 2) {
    put(to, first, lane, two[0]);
    put(to, first + 1, lane, two[1]);
  }
  if (high == 1) put(to, first == 4 ? 4 : 2, lane, one);
}

void write_bytes(const Panels& p, const uint8_t* codes, int bits, uint8_t* to, int lane) {
  for (int i = 0; i < p.group; i += 8) {
    const uint64_t c = eight_codes(codes + int64_t(i) / 8 * bits, bits);
    if (p.codes == Codes::e4m3) {
      for (int j = 0; j < 8; ++j) to[(i + j) * 16 + lane] = static_cast<uint8_t>(c >> (8 * j));
    } else {
      put(to, i / 4, lane, static_cast<uint32_t>(c));
      put(to, i / 4 + 1, lane, static_cast<uint32_t>(c >> 32));
    }
  }
}

int code_at(const Panels& p, const uint8_t* group, int lane, int i) {
  if (p.codes == Codes::e4m3) return group[i * 16 + lane];
  if (p.bits == 8) return group[i / 4 * 64 + lane * 4 + i % 4];
  const int d = i / 8 % 4, byte = lane * 4 + i % 8 / 2, odd = i % 2, s = 2 * d + odd;
  const uint8_t* block = group + int64_t(i / 32) * p.bits * 64;
  const auto two = [&](int first) { return block[(first + s / 4) * 64 + byte] >> (2 * (s % 4)) & 3; };
  const auto one = [&](int first) { return block[first * 64 + byte] >> s & 1; };
  if (p.bits == 2) return two(0);
  if (p.bits == 3) return two(0) | one(2) << 2;
  const int low = block[d * 64 + byte] >> (4 * odd) & 15;
  if (p.bits == 5) return low | one(4) << 4;
  if (p.bits == 6) return low | two(4) << 4;
  return low;
}

float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

float e4m3_value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float size = exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
  return code & 128 ? -size : size;
}

float code_value(Codes codes, int code) {
  static constexpr float fours[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
  return codes == Codes::affine ? float(code) : codes == Codes::e2m1 ? fours[code] : e4m3_value(code);
}

float scale_value(const Panels& p, const uint8_t* scales, int index) {
  if (p.scales == Storage::e8m0) return from_bits(scales[index] == 0 ? 0x400000u : uint32_t(scales[index]) << 23);
  if (p.scales == Storage::e4m3) return e4m3_value(scales[index]);
  float value;
  isa_generic().load(scales + int64_t(index) * p.scale_bytes(), p.scales, &value, 1);
  return value;
}

}  // namespace

void write_panel(const Panels& p, int bits, const StoredRow (&rows)[16], uint8_t* panel) {
  const int64_t group_codes = int64_t(p.group) * bits / 8;
  const int item = p.scale_bytes();
  const auto copy_scale = [item](uint8_t* to, const uint8_t* from) {  // sizes that the compiler knows: millions of these at a start
    if (item == 2) return void(std::memcpy(to, from, 2));
    if (item == 4) return void(std::memcpy(to, from, 4));
    *to = *from;
  };
  const bool writes_all = (p.bits == 4 || p.bits == 8) && std::ranges::none_of(rows, [](const auto& r) { return r.codes == nullptr; });
  for (int g = 0; g < p.k / p.group; ++g, panel += p.group_bytes()) {
    uint8_t* scales = panel + p.code_bytes();
    if (!writes_all) std::memset(panel, 0, p.group_bytes());
    for (int lane = 0; lane < 16; ++lane) {
      const auto& row = rows[lane];
      if (row.codes == nullptr) continue;
      const uint8_t* codes = row.codes + g * group_codes;
      if (p.bits == 8) {
        write_bytes(p, codes, bits, panel, lane);
      } else if (p.bits == 4 && bits == 4) {
        for (int d = 0; d < p.group / 8; ++d) std::memcpy(panel + d * 64 + lane * 4, codes + d * 4, 4);
      } else {
        for (int i = 0; i < p.group; i += 32) {
          write_block(p, codes + int64_t(i) / 8 * bits, p.group - i < 32 ? p.group - i : 32, bits, panel + int64_t(i) * p.bits * 2, lane);
        }
      }
      copy_scale(scales + lane * item, row.scales + int64_t(g) * item);
      if (p.codes == Codes::affine) copy_scale(scales + (16 + lane) * item, row.biases + int64_t(g) * item);
    }
  }
}

void expand_panel_row(const Panels& p, const uint8_t* panel, int lane, float* out) {
  for (int g = 0; g < p.k / p.group; ++g, panel += p.group_bytes()) {
    const uint8_t* scales = panel + p.code_bytes();
    const float scale = scale_value(p, scales, lane), bias = p.codes == Codes::affine ? scale_value(p, scales, 16 + lane) : 0.f;
    for (int i = 0; i < p.group; ++i) {
      const float value = code_value(p.codes, code_at(p, panel, lane, i)) * scale;
      *out++ = p.codes == Codes::affine ? value + bias : value;
    }
  }
}

}  // namespace mlxlm::kernels::cpu
