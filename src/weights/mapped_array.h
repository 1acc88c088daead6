// Arrays over mapped files, without a copy.
#pragma once

#include <cstdint>
#include <memory>

#include <mlx/array.h>

#include "base/files.h"

namespace mlxlm::weights {

namespace mx = mlx::core;

/** An evaluated array over `file` at `offset`; the mapping lives as long as the array. Data that is not aligned for its dtype is copied.
 *  MLX never writes into it: an array with a deleter of its own is not donated. CPU only. */
mx::array mapped_array(const std::shared_ptr<const MappedFile>& file, uint64_t offset, const mx::Shape& shape, mx::Dtype dtype);

/** Tells the system that these bytes of the file are not needed for now: the process no longer counts their whole pages as its memory.
 *  They read the same afterwards. Arrays over the file do so when they die, so that a loader that repacks them does not hold everything
 * twice. */
void release_pages(const MappedFile& file, uint64_t offset, uint64_t bytes);

/** An evaluated array whose 64-byte aligned memory `fill(pointer)` writes. CPU only. */
template <class Fill>
mx::array filled_array(const mx::Shape& shape, mx::Dtype dtype, Fill&& fill);

}  // namespace mlxlm::weights

#include "weights/mapped_array_impl.h"
