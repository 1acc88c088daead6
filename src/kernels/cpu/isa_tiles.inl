// Products by tiles (AMX): panel_digits for 16 rows of activations at once, with the same sums in the same order, so the same bits.
// Part of isa_gfni.cpp, after isa.inl; the functions that need the tiles say so themselves.

namespace {

#define MLXLM_TILES __attribute__((target("amx-tile,amx-int8")))

/** What ldtilecfg reads. */
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr int tile_rows = 16;

/** Tiles: 0, 1 = sums of high and low digits; 2, 3 = those digits; 4 = codes. `span`: bytes of a row of digits. */
MLXLM_TILES inline void shape_tiles(int span) {
  TileShapes shapes;
  for (int tile = 0; tile < 4; ++tile) {
    shapes.row_bytes[tile] = static_cast<uint16_t>(tile < 2 ? 64 : span);
    shapes.rows[tile] = tile_rows;
  }
  shapes.row_bytes[4] = 64;
  shapes.rows[4] = static_cast<uint8_t>(span / 4);
  _tile_loadconfig(&shapes);
}

/** A group's codes as vectors of bytes, in the order of the digits. */
template <Format C>
void codes_to_bytes(const uint8_t* group, int size, uint8_t* to) {
  for (int d = 0; d < size / 8; ++d) {
    H even, odd;
    codes_at<C>(group, d, even, odd);
    memcpy(to + d * 128, &even, 64);
    memcpy(to + d * 128 + 64, &odd, 64);
  }
}

using CodesToBytes = void (*)(const uint8_t* group, int size, uint8_t* to);

/** Null: they are bytes already. */
CodesToBytes codes_to_bytes_of(const Panels& p) {
  if (p.codes == Codes::e2m1) return codes_to_bytes<fp4>;
  switch (p.bits) {
    case 2:
      return codes_to_bytes<u2>;
    case 3:
      return codes_to_bytes<u3>;
    case 4:
      return codes_to_bytes<u4>;
    case 5:
      return codes_to_bytes<u5>;
    case 6:
      return codes_to_bytes<u6>;
    default:
      return nullptr;
  }
}

/** Bytes of a group that fit a tile's row; 0 = no tiles for such groups. */
inline int tile_span(int group) {
  return group <= 64 ? group : group % 64 == 0 ? 64 : 0;
}

/** Integer sums of one group: codes times high and low digits of the rows that the tiles are shaped for. */
template <int DIGITS>
MLXLM_TILES inline void tile_dots(const uint8_t* codes, int size, int span, const int8_t* x, int64_t row, int64_t k, D* high, D* low) {
  __asm__ volatile("" ::: "memory");  // the loads of tiles do not say that they read memory
  _tile_zero(0);
  if constexpr (DIGITS == 2) _tile_zero(1);
  for (int at = 0; at < size; at += span) {
    _tile_loadd(4, codes + at * 16, 64);
    _tile_loadd(2, x + at, row);
    _tile_dpbsud(0, 2, 4);
    if constexpr (DIGITS == 2) {
      _tile_loadd(3, x + k + at, row);
      _tile_dpbsud(1, 3, 4);
    }
  }
  _tile_stored(0, high, 64);
  if constexpr (DIGITS == 2) _tile_stored(1, low, 64);
}

/** Some groups of a panel: their codes as bytes, and where they lie. */
struct GroupSpan {
  const uint8_t *panel, *codes;  // both of the first group
  int64_t panel_stride, codes_stride;
  int first, count;  // groups
};

/** c [16][ldc] plus the products of these groups. A group's tiles are asked for before the sums of the one before are used: that hides
 * their latency. */
template <int DIGITS, bool FOURS>
MLXLM_TILES __attribute__((noinline)) void add_tiles(const Panels& p, const GroupSpan& s, const Activations& a, int m0, float* c,
                                                     int64_t ldc) {
  const int span = tile_span(p.group);
  const int64_t row = DIGITS * int64_t(a.k), groups = a.groups, first = m0 * groups + s.first;
  const float *steps = a.steps + first, *sums = a.digit_sums + first;
  alignas(64) D high[2][tile_rows], low[2][tile_rows];
  P total[tile_rows];
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i) total[i] = s.first == 0 ? P{} : load_piece(c + i * ldc);
  const int8_t* x = a.digits + int64_t(m0) * row + int64_t(s.first) * p.group;
  const uint8_t* scales = s.panel + p.code_bytes() - s.panel_stride;
  for (int g = 0; g <= s.count; ++g, x += p.group, scales += s.panel_stride) {
    if (g < s.count) tile_dots<DIGITS>(s.codes + g * s.codes_stride, p.group, span, x, row, a.k, high[g % 2], low[g % 2]);
    if (g == 0) continue;
    const P scale = (P)panel_scale(scales, p.scales, 0), bias = FOURS ? P{} : (P)panel_scale(scales, p.scales, 1);
    const D *h = high[(g - 1) % 2], *l = low[(g - 1) % 2];
    int64_t at = g - 1;
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i, at += groups) {
      __asm__("" : "+r"(at));  // else 32 addresses are kept in memory
      add_group<FOURS>(total[i], DIGITS == 2 ? (h[i] << 7) + l[i] : h[i], scale, bias, steps[at], sums[at]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i) memcpy(c + i * ldc, &total[i], sizeof(P));
}

MLXLM_TILES void add_tiles_of(const Panels& p, const GroupSpan& s, const Activations& a, int m0, float* c, int64_t ldc) {
  const bool fours = p.codes == Codes::e2m1;
  if (a.digit_count == 1) return fours ? add_tiles<1, true>(p, s, a, m0, c, ldc) : add_tiles<1, false>(p, s, a, m0, c, ldc);
  fours ? add_tiles<2, true>(p, s, a, m0, c, ldc) : add_tiles<2, false>(p, s, a, m0, c, ldc);
}

/** As panel_kernel: every 16 rows by tiles. Codes become bytes once for all rows; 128 KB of them at a time stay in the second cache. */
MLXLM_TILES void panel_kernel_with_tiles(const Panels& p, const uint8_t* panel, const Activations& a, int m0, int count, float* c,
                                         int64_t ldc) {
  constexpr int codes_at_once = 8192;
  const int span = tile_span(p.group), by_tiles = a.digits == nullptr || span == 0 ? 0 : count / tile_rows * tile_rows;
  if (by_tiles > 0) {
    alignas(64) uint8_t bytes[codes_at_once * 16];
    const CodesToBytes unpack = codes_to_bytes_of(p);
    const int groups = p.k / p.group, at_once = codes_at_once / p.group;
    const int64_t stride = p.group_bytes(), unpacked = int64_t(p.group) * 16;
    shape_tiles(span);
    for (int first = 0; first < groups; first += at_once) {
      const uint8_t* at = panel + first * stride;
      GroupSpan s = {at, at, stride, stride, first, groups - first < at_once ? groups - first : at_once};
      for (int g = 0; g < s.count; ++g) {
        prefetch_group(at + g * stride, stride);
        if (unpack != nullptr) unpack(at + g * stride, p.group, bytes + g * unpacked);
      }
      if (unpack != nullptr) s.codes = bytes, s.codes_stride = unpacked;
      for (int m = 0; m < by_tiles; m += tile_rows) add_tiles_of(p, s, a, m0 + m, c + m * ldc, ldc);
    }
    _tile_release();
  }
  if (by_tiles < count) panel_kernel(p, panel, a, m0 + by_tiles, count - by_tiles, c + by_tiles * ldc, ldc);
}

}  // namespace

MLXLM_TILES bool try_tiles() {
  alignas(64) uint8_t codes[64];
  alignas(64) int8_t digits[64];
  alignas(64) int32_t sums[16] = {};
  memset(codes, 200, sizeof codes);
  memset(digits, -3, sizeof digits);
  TileShapes shapes;
  shapes.row_bytes[0] = shapes.row_bytes[2] = 64;
  shapes.row_bytes[1] = 4;
  shapes.rows[0] = shapes.rows[1] = shapes.rows[2] = 1;
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_loadd(1, digits, 64);
  _tile_loadd(2, codes, 64);
  _tile_dpbsud(0, 1, 2);
  _tile_stored(0, sums, 64);
  _tile_release();
  __asm__ volatile("" ::: "memory");
  for (int i = 0; i < 16; ++i) {
    if (sums[i] != -3 * 200 * 4) return false;
  }
  return true;
}

const Isa& isa_amx() {
  static const Isa table = [] {
    Isa isa = isa_gfni();
    isa.name = "amx-int8";
    isa.panel = panel_kernel_with_tiles;
    return isa;
  }();
  return table;
}
