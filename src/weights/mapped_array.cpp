// Arrays over mapped files. MLX's CPU allocator keeps the size of a buffer in the 8 bytes before its data, so the buffer of an array at
// pointer p is p - 8; for a mapping those bytes are file content, which MLX reads only to judge a donation that never happens here.
#include "weights/mapped_array.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"

namespace mlxlm::weights {

namespace detail {

namespace {

/** A few blocks that died, for those that come: a loader that converts matrix by matrix touches the same memory again. */
class Spares {
 public:
  static constexpr std::size_t length = 4 << 20;
  /** Null when there is none. */
  void* take() {
    const std::lock_guard lock(mutex_);
    if (blocks_.empty()) return nullptr;
    void* const block = blocks_.back();
    blocks_.pop_back();
    return block;
  }
  /** Whether it is kept. */
  bool keep(void* block) {
    constexpr std::size_t most = 4;
    const std::lock_guard lock(mutex_);
    if (blocks_.size() >= most) return false;
    blocks_.push_back(block);
    return true;
  }

 private:
  std::mutex mutex_;
  std::vector<void*> blocks_;
};

/** Lives as long as the process: arrays may die after everything else. */
Spares& spares() {
  static auto* const all = new Spares;
  return *all;
}

}  // namespace

mx::allocator::Data reserve(std::size_t bytes) {
  constexpr std::size_t small = 1 << 16, before = 64;  // room for the size, and the alignment of what follows
  if (bytes < small) return mx::allocator::Data(mx::allocator::malloc(bytes));
  const std::size_t length = std::max(bytes + before, Spares::length);
  void* base = length == Spares::length ? spares().take() : nullptr;
  if (base == nullptr) base = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw Error(Code::out_of_memory, "weights", "cannot reserve " + std::to_string(bytes >> 20) + " MiB");
  auto* const size = static_cast<std::byte*>(base) + before - sizeof(std::size_t);
  std::memcpy(size, &bytes, sizeof(bytes));
  return mx::allocator::Data(mx::allocator::Buffer(size), [base, length](mx::allocator::Buffer) {
    if (length != Spares::length || !spares().keep(base)) ::munmap(base, length);
  });
}

void adopt(mx::array& a, mx::allocator::Data data) {
  mx::Strides strides(a.ndim());
  int64_t stride = 1;
  for (int axis = static_cast<int>(a.ndim()) - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= a.shape(axis);
  }
  mx::array::Flags flags;
  flags.contiguous = flags.row_contiguous = true;
  flags.col_contiguous = a.size() <= 1 || a.ndim() <= 1;
  a.set_data(std::move(data), a.size(), strides, flags, 0);
  a.set_status(mx::array::Status::available);
}

}  // namespace detail

void release_pages(const MappedFile& file, uint64_t offset, uint64_t bytes) {
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(file.bytes().data()) + offset, end = begin + bytes;
  const auto first = (begin + page - 1) / page * page, last = end / page * page;
  if (first < last)
    ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);  // only advice: a failure costs nothing but memory
}

mx::array mapped_array(const std::shared_ptr<const MappedFile>& file, uint64_t offset, const mx::Shape& shape, mx::Dtype dtype) {
  const std::byte* data = file->bytes().data() + offset;
  std::size_t bytes = mx::size_of(dtype);
  for (const int dim : shape) bytes *= static_cast<std::size_t>(dim);
  const bool aligned = reinterpret_cast<std::uintptr_t>(data) % mx::size_of(dtype) == 0;
  if (!aligned || offset < 8 || bytes == 0) {
    return filled_array(shape, dtype, [&](void* out) {
      if (bytes > 0) std::memcpy(out, data, bytes);
    });
  }
  mx::array a(shape, dtype, nullptr, {});
  auto* before = const_cast<std::byte*>(data) - sizeof(std::size_t);
  detail::adopt(a, mx::allocator::Data(mx::allocator::Buffer(before),
                                       [file, offset, bytes](mx::allocator::Buffer) { release_pages(*file, offset, bytes); }));
  return a;
}

}  // namespace mlxlm::weights
