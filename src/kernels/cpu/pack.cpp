// MLX's quantized layouts -> panels of 16 rows.
#include <algorithm>
#include <cstring>
#include <utility>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "base/thread_pool.h"
#include "kernels/cpu/packed.h"

namespace mlxlm::kernels::cpu {
namespace {

constexpr int64_t huge_page = 2 << 20;

void require(bool fine, const char* what) {
  if (!fine) throw Error(Code::bad_weights, "quantized weight", what);
}

mx::array ready(mx::array a) {
  a = mx::contiguous(a);
  mx::eval(a);
  return a;
}

/** Codes of one row as bytes: a little-endian bit stream. */
void unpack_codes(const uint8_t* row, int k, int bits, uint8_t* codes) {
  if (bits == 8) {
    std::memcpy(codes, row, k);
    return;
  }
  if (bits == 4) {
    for (int i = 0; i < k / 2; ++i) {
      codes[2 * i] = row[i] & 15;
      codes[2 * i + 1] = row[i] >> 4;
    }
    return;
  }
  const uint32_t mask = (1u << bits) - 1;
  uint32_t buffer = 0;
  int held = 0;
  for (int i = 0; i < k; ++i) {
    while (held < bits) {
      buffer |= uint32_t(*row++) << held;
      held += 8;
    }
    codes[i] = uint8_t(buffer & mask);
    buffer >>= bits;
    held -= bits;
  }
}

struct Source {
  mx::array codes, scales, biases;
  int rows, matrices;
};

/** Interleaves 16 rows of codes (bytes) into the dwords of a panel. */
void write_panel_codes(const Panels& p, uint8_t* panel, const std::vector<uint8_t>& codes) {
  const int dwords = p.group * p.bits / 32, per = 32 / p.bits;
  for (int g = 0; g < p.k / p.group; ++g) {
    auto* out = reinterpret_cast<uint32_t*>(panel + g * p.group_bytes());
    for (int d = 0; d < dwords; ++d) {
      for (int lane = 0; lane < 16; ++lane) {
        const uint8_t* c = codes.data() + std::size_t(lane) * p.k + g * p.group + d * per;
        uint32_t w = 0;
        for (int j = 0; j < per; ++j) w |= uint32_t(c[j]) << (p.bits * j);
        out[d * 16 + lane] = w;
      }
    }
  }
}

/** As write_panel_codes for 4 and 8 bits that MLX already stores as dwords: a transposition. */
void copy_panel_dwords(const Panels& p, uint8_t* panel, const uint32_t* const* rows) {
  const int dwords = p.group * p.bits / 32;
  for (int g = 0; g < p.k / p.group; ++g) {
    auto* out = reinterpret_cast<uint32_t*>(panel + g * p.group_bytes());
    for (int lane = 0; lane < 16; ++lane) {
      const uint32_t* in = rows[lane] + g * dwords;
      for (int d = 0; d < dwords; ++d) out[d * 16 + lane] = in[d];
    }
  }
}

template <class T>
void write_panel_scales(const Panels& p, uint8_t* panel, const T* const* scales, const T* const* biases) {
  const int64_t at = int64_t(p.group) * p.bits / 32 * 64;
  for (int g = 0; g < p.k / p.group; ++g) {
    T* out = reinterpret_cast<T*>(panel + g * p.group_bytes() + at);
    for (int lane = 0; lane < 16; ++lane) {
      out[lane] = scales[lane] == nullptr ? T{} : scales[lane][g];
      out[16 + lane] = biases[lane] == nullptr ? T{} : biases[lane][g];
    }
  }
}

/** Which source and row a row of the concatenation is. */
std::pair<const Source*, int> locate(const std::vector<Source>& sources, int row) {
  for (const auto& s : sources) {
    if (row < s.rows) return {&s, row};
    row -= s.rows;
  }
  return {nullptr, 0};
}

void pack_panel(const std::vector<Source>& sources, int bits, int matrix, int index, const PackedMatrix& m, uint8_t* out) {
  const Panels& p = m.panels;
  const int64_t row_dwords = int64_t(p.k) * bits / 32, groups = p.k / p.group;
  static const std::vector<uint32_t> zeros(1 << 18, 0);
  const uint32_t* rows[16];
  const uint8_t *scales[16], *biases[16];
  const bool direct = bits == p.bits && row_dwords <= int64_t(zeros.size());
  for (int lane = 0; lane < 16; ++lane) {
    const auto [s, row] = locate(sources, index * 16 + lane);
    rows[lane] = direct ? zeros.data() : nullptr;
    scales[lane] = biases[lane] = nullptr;
    if (s == nullptr) continue;
    const int64_t at = int64_t(matrix) * s->rows + row;
    rows[lane] = s->codes.data<uint32_t>() + at * row_dwords;
    scales[lane] = s->scales.data<uint8_t>() + at * groups * p.scale_bytes();
    biases[lane] = s->biases.data<uint8_t>() + at * groups * p.scale_bytes();
  }
  if (direct) {
    copy_panel_dwords(p, out, rows);
  } else {
    std::vector<uint8_t> codes(std::size_t(16) * p.k, 0);
    for (int lane = 0; lane < 16; ++lane) {
      if (rows[lane] != nullptr) unpack_codes(reinterpret_cast<const uint8_t*>(rows[lane]), p.k, bits, codes.data() + std::size_t(lane) * p.k);
    }
    write_panel_codes(p, out, codes);
  }
  if (p.scale_bytes() == 4) {
    write_panel_scales(p, out, reinterpret_cast<const uint32_t* const*>(scales), reinterpret_cast<const uint32_t* const*>(biases));
  } else {
    write_panel_scales(p, out, reinterpret_cast<const uint16_t* const*>(scales), reinterpret_cast<const uint16_t* const*>(biases));
  }
}

}  // namespace

Arena::Arena(int64_t bytes) : bytes_(bytes) {
  const bool large = bytes >= huge_page;
  const int64_t alignment = large ? huge_page : 64, slack = 8192;  // kernels prefetch past the end
  const int64_t size = (bytes + slack + alignment - 1) / alignment * alignment;
  data_ = static_cast<uint8_t*>(std::aligned_alloc(alignment, size));
  if (data_ == nullptr) throw Error(Code::out_of_memory, "weights", "cannot reserve " + std::to_string(bytes >> 20) + " MiB");
#if defined(MADV_HUGEPAGE)
  if (large) {
    // The last large page only where most of it is used: half of one on average, for each matrix, is much of a small model.
    const int64_t whole = size - bytes > bytes / 32 ? size - alignment : size;
    madvise(data_, whole, MADV_HUGEPAGE);
    if (whole < size) madvise(data_ + whole, size - whole, MADV_NOHUGEPAGE);
  }
#endif
}

Arena::~Arena() { std::free(data_); }

Arena::Arena(Arena&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Storage storage_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return Storage::f32;
  if (dtype == mx::float16) return Storage::f16;
  if (dtype == mx::bfloat16) return Storage::bf16;
  throw Error(Code::unsupported, "kernel", "got a dtype that is neither float32, float16 nor bfloat16");
}

const void* PackedMatrix::dense_row(int matrix, int row) const {
  for (const auto& part : parts) {
    if (row < part.rows) {
      const int64_t at = (int64_t(matrix) * part.rows + row) * k;
      return part.array.data<uint8_t>() + at * static_cast<int64_t>(mx::size_of(part.array.dtype()));
    }
    row -= part.rows;
  }
  return nullptr;
}

PackedMatrixPtr pack_affine(const std::vector<mx::array>& weights, const std::vector<mx::array>& scales, const std::vector<mx::array>& biases,
                            int bits, int group_size) {
  require(!weights.empty() && weights.size() == scales.size() && weights.size() == biases.size(), "parts do not match");
  require(bits >= 2 && bits <= 8 && bits != 7 && group_size >= 16 && group_size % 16 == 0, "bits or group size out of range");
  auto m = std::make_shared<PackedMatrix>();
  std::vector<Source> sources;
  // Parts with scales of unequal dtypes share the wider one.
  mx::Dtype scale_dtype = scales[0].dtype();
  for (const auto& s : scales) scale_dtype = s.dtype() == scale_dtype ? scale_dtype : mx::float32;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto& w = weights[i];
    require(w.dtype() == mx::uint32 && (w.ndim() == 2 || w.ndim() == 3), "wanted uint32 codes");
    auto rows = w.shape(), scale_rows = scales[i].shape();
    rows.back() = 0;
    if (!scale_rows.empty()) scale_rows.back() = 0;
    require(rows == scale_rows && scales[i].shape() == biases[i].shape(), "scales or biases do not fit");
    Source s{ready(w), ready(mx::astype(scales[i], scale_dtype)), ready(mx::astype(biases[i], scale_dtype)), w.shape(-2),
             w.ndim() == 3 ? w.shape(0) : 1};
    const int k = static_cast<int>(int64_t(w.shape(-1)) * 32 / bits);
    require(i == 0 || (k == m->k && s.matrices == m->matrices), "parts differ in width");
    require(k % group_size == 0 && s.scales.shape(-1) == k / group_size, "scales do not fit");
    m->k = k;
    m->matrices = s.matrices;
    m->rows += s.rows;
    sources.push_back(std::move(s));
  }
  m->panels = {nullptr, m->k, group_size, bits <= 4 ? 4 : 8, storage_of(scale_dtype)};
  const int panels = m->panel_count();
  m->arena = Arena(int64_t(m->matrices) * panels * m->panels.panel_bytes());
  m->panels.data = m->arena.data();
  compute_pool().parallel_for(m->matrices * panels, [&](int chunk, int) {
    const int matrix = chunk / panels, index = chunk % panels;
    pack_panel(sources, bits, matrix, index, *m, const_cast<uint8_t*>(m->panel(matrix, index)));
  });
  return m;
}

PackedMatrixPtr pack_float(const std::vector<mx::array>& weights, const std::vector<mx::array>& scales, const std::string& mode, int bits,
                           int group_size) {
  // Values of mxfp4 and mxfp8 have at most 3 bits of mantissa and a power of two as scale: bfloat16 holds them exactly. nvfp4 has scales with
  // a mantissa: float32. Panels of their own would read 2-8 times fewer bytes.
  std::vector<mx::array> dense;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto dtype = mode == "nvfp4" ? mx::float32 : mx::bfloat16;
    require(scales.size() == weights.size() && weights[i].ndim() >= 2, "parts do not match");
    // MLX fails at an odd number of groups of nvfp4: give it the rows twice.
    const bool odd = mode == "nvfp4" && scales[i].size() % 2 == 1;
    const auto twice = [&](const mx::array& a) { return odd ? mx::concatenate({a, a}, -2) : a; };
    const auto values = mx::dequantize(twice(weights[i]), twice(scales[i]), std::nullopt, group_size, bits, mode, std::nullopt, dtype);
    auto stop = values.shape();
    stop[stop.size() - 2] = weights[i].shape(-2);
    dense.push_back(odd ? mx::slice(values, mx::Shape(values.ndim(), 0), stop) : values);
  }
  return pack_dense(dense);
}

PackedMatrixPtr pack_dense(const std::vector<mx::array>& weights) {
  require(!weights.empty(), "no parts");
  auto m = std::make_shared<PackedMatrix>();
  mx::Dtype dtype = weights[0].dtype();
  for (const auto& w : weights) dtype = w.dtype() == dtype ? dtype : mx::float32;
  m->storage = storage_of(dtype);
  for (const auto& w : weights) {
    require(w.ndim() == 2 || w.ndim() == 3, "wanted a matrix");
    const int matrices = w.ndim() == 3 ? w.shape(0) : 1;
    require(m->parts.empty() || (w.shape(-1) == m->k && matrices == m->matrices), "parts differ in width");
    m->k = w.shape(-1);
    m->matrices = matrices;
    m->rows += w.shape(-2);
    m->parts.push_back({ready(mx::astype(w, dtype)), w.shape(-2)});
  }
  return m;
}

int64_t packed_bytes(const PackedMatrix& w) {
  int64_t bytes = w.arena.bytes();
  for (const auto& part : w.parts) bytes += static_cast<int64_t>(part.array.nbytes());
  return bytes;
}

}  // namespace mlxlm::kernels::cpu
