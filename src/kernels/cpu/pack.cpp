// MLX's quantized layouts -> panels of 16 rows.
#include <algorithm>
#include <mutex>
#include <optional>
#include <utility>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "base/thread_pool.h"
#include "kernels/cpu/packed.h"
#include "kernels/cpu/panels.h"

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

struct Source {
  mx::array codes, scales;
  std::optional<mx::array> biases;
  int rows, matrices, k;
};

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
  const int64_t row_bytes = int64_t(p.k) * bits / 8, scale_bytes = int64_t(p.k / p.group) * p.scale_bytes();
  StoredRow rows[16];
  for (int lane = 0; lane < 16; ++lane) {
    const auto [s, row] = locate(sources, index * 16 + lane);
    if (s == nullptr) continue;
    const int64_t at = int64_t(matrix) * s->rows + row;
    rows[lane].codes = s->codes.data<uint8_t>() + at * row_bytes;
    rows[lane].scales = s->scales.data<uint8_t>() + at * scale_bytes;
    if (s->biases) rows[lane].biases = s->biases->data<uint8_t>() + at * scale_bytes;
  }
  write_panel(p, bits, rows, out);
}

/** The bits that panels give to codes of `bits`: blocks of 32 codes hold any width, others nibbles or bytes. */
int stored_bits(int bits, int group) {
  return group % 32 == 0 ? bits : bits <= 4 ? 4 : 8;
}

/** Panels of all sources, one below the other. `panels` has all but data and k. */
PackedMatrixPtr pack_sources(const std::vector<Source>& sources, int bits, Panels panels) {
  auto m = std::make_shared<PackedMatrix>();
  m->matrices = sources[0].matrices;
  for (const auto& s : sources) {
    require(s.k == sources[0].k && s.matrices == m->matrices, "parts differ in width");
    require(s.k % panels.group == 0 && s.scales.shape(-1) == s.k / panels.group, "scales do not fit");
    m->rows += s.rows;
  }
  m->k = panels.k = sources[0].k;
  m->panels = panels;
  const int count = m->panel_count();
  m->arena = Arena(int64_t(m->matrices) * count * m->panels.panel_bytes());
  m->panels.data = m->arena.data();
  compute_pool().parallel_for(m->matrices * count, [&](int chunk, int) {
    const int matrix = chunk / count, index = chunk % count;
    pack_panel(sources, bits, matrix, index, *m, const_cast<uint8_t*>(m->panel(matrix, index)));
  });
  return m;
}

/** Checks the shapes of codes and scales. */
Source source_of(const mx::array& w, const mx::array& scales, std::optional<mx::array> biases, int bits) {
  require(w.dtype() == mx::uint32 && (w.ndim() == 2 || w.ndim() == 3), "wanted uint32 codes");
  auto rows = w.shape(), scale_rows = scales.shape();
  rows.back() = 0;
  if (!scale_rows.empty()) scale_rows.back() = 0;
  require(rows == scale_rows && (!biases || scales.shape() == biases->shape()), "scales or biases do not fit");
  if (biases) biases = ready(*biases);
  return {ready(w),
          ready(scales),
          std::move(biases),
          w.shape(-2),
          w.ndim() == 3 ? w.shape(0) : 1,
          static_cast<int>(int64_t(w.shape(-1)) * 32 / bits)};
}

}  // namespace

class Slab {
 public:
  explicit Slab(int64_t bytes) : size_(bytes) {
    const bool large = bytes >= huge_page;
    const int64_t alignment = large ? huge_page : line, slack = 8192;  // kernels prefetch past the end
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
  ~Slab() { std::free(data_); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  /** Null when there is not enough left. */
  uint8_t* take(int64_t bytes) {
    if (bytes > size_ - used_) return nullptr;
    uint8_t* const at = data_ + used_;
    used_ += (bytes + line - 1) / line * line;
    return at;
  }

 private:
  static constexpr int64_t line = 64;
  uint8_t* data_ = nullptr;
  int64_t size_, used_ = 0;
};

Arena::Arena(int64_t bytes) : bytes_(bytes) {
  constexpr int64_t shared_bytes = 8 * huge_page, small = 2 * huge_page;
  static std::mutex mutex;
  static std::weak_ptr<Slab> latest;
  const std::lock_guard lock(mutex);
  if (bytes < small) {
    slab_ = latest.lock();
    data_ = slab_ ? slab_->take(bytes) : nullptr;
    if (data_ != nullptr) return;
  }
  slab_ = std::make_shared<Slab>(bytes < small ? shared_bytes : bytes);
  data_ = slab_->take(bytes);
  if (bytes < small) latest = slab_;
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

PackedMatrixPtr pack_affine(const std::vector<mx::array>& weights, const std::vector<mx::array>& scales,
                            const std::vector<mx::array>& biases, int bits, int group_size) {
  require(!weights.empty() && weights.size() == scales.size() && weights.size() == biases.size(), "parts do not match");
  require(bits >= 2 && bits <= 8 && bits != 7 && group_size >= 16 && group_size % 16 == 0, "bits or group size out of range");
  std::vector<Source> sources;
  // Parts with scales of unequal dtypes share the wider one.
  mx::Dtype scale_dtype = scales[0].dtype();
  for (const auto& s : scales) scale_dtype = s.dtype() == scale_dtype ? scale_dtype : mx::float32;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    sources.push_back(source_of(weights[i], mx::astype(scales[i], scale_dtype), mx::astype(biases[i], scale_dtype), bits));
  }
  return pack_sources(sources, bits, {nullptr, 0, group_size, stored_bits(bits, group_size), storage_of(scale_dtype), Codes::affine});
}

PackedMatrixPtr pack_float(const std::vector<mx::array>& weights, const std::vector<mx::array>& scales, const std::string& mode, int bits,
                           int group_size) {
  const bool nv = mode == "nvfp4", eight = mode == "mxfp8";
  require(nv || eight || mode == "mxfp4", "wanted mxfp4, mxfp8 or nvfp4");
  require(!weights.empty() && weights.size() == scales.size(), "parts do not match");
  require(bits == (eight ? 8 : 4) && group_size == (nv ? 16 : 32), "bits or group size out of range");
  std::vector<Source> sources;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    require(scales[i].dtype() == mx::uint8, "wanted uint8 scales");
    sources.push_back(source_of(weights[i], scales[i], std::nullopt, bits));
  }
  return pack_sources(sources, bits, {nullptr, 0, group_size, bits, nv ? Storage::e4m3 : Storage::e8m0, eight ? Codes::e4m3 : Codes::e2m1});
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
