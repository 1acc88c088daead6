// The order of rows in a rotating cache. Reference: mlx_lm/models/cache.py RotatingKVCache
#include "cache/ring.h"

#include <algorithm>

#include "cache/rows.h"

namespace mlxlm::cache {

/** The first `keep`, then the others from the oldest to the newest. */
mx::array Ring::temporal_order(const mx::array& v) const {
  const int held = v.shape(2);
  if (index == held) return v;
  if (index < offset) return mx::concatenate({rows(v, 0, keep), rows(v, index, held), rows(v, keep, index)}, 2);
  return rows(v, 0, index);
}

/** Without the `count` oldest after the first `keep`. */
mx::array Ring::trimmed(int count, const mx::array& v, const mx::array* append) const {
  std::vector<mx::array> parts;
  if (count > 0) {
    parts = {rows(v, 0, keep), rows(v, count + keep, v.shape(2))};
  } else {
    parts = {v};
  }
  if (append != nullptr) parts.push_back(*append);
  return parts.size() == 1 ? parts[0] : mx::concatenate(parts, 2);
}

void Ring::update_many(Planes& planes, const Planes& fresh) {
  const bool first = planes.empty();
  if (first) planes = fresh;
  for (std::size_t i = 0; i < fresh.size(); ++i) {
    if (first) {
      // A copy: the arrays of the graph are not ours to write into later.
      planes[i] = mx::concatenate({fresh[i], zeros_like_rows(fresh[i], 0)}, 2);
      continue;
    }
    const auto ordered = temporal_order(planes[i]);
    // Each new token sees max_size tokens, itself included.
    planes[i] = trimmed(ordered.shape(2) - max_size + 1, ordered, &fresh[i]);
  }
  offset += fresh[0].shape(2);
  index = planes[0].shape(2);
}

void Ring::update_one(Planes& planes, const Planes& fresh) {
  const bool first = planes.empty();
  const int held = first ? 0 : planes[0].shape(2);
  if (first || (offset >= held && held < max_size)) {
    const int more = std::min(block_tokens, max_size - held);
    for (std::size_t i = 0; i < fresh.size(); ++i) {
      const auto added = zeros_like_rows(fresh[i], more);
      if (first)
        planes.push_back(added);
      else
        planes[i] = mx::concatenate({planes[i], added}, 2);
    }
    index = offset;
  }
  if (const int excess = planes[0].shape(2) - max_size; excess > 0) {
    for (auto& plane : planes) plane = trimmed(excess, plane, nullptr);
    index = max_size;
  }
  if (index == max_size) index = keep;
  for (std::size_t i = 0; i < fresh.size(); ++i) planes[i] = written(mx::contiguous(planes[i]), fresh[i], index);
  ++offset;
  ++index;
}

Planes Ring::update(Planes& planes, const Planes& fresh) {
  for (std::size_t i = 0; i < planes.size(); ++i) {
    if (planes[i].dtype() != fresh[i].dtype()) planes[i] = mx::astype(planes[i], fresh[i].dtype());
  }
  if (fresh[0].shape(2) > 1) {
    update_many(planes, fresh);
    return planes;
  }
  update_one(planes, fresh);
  if (offset >= max_size) return planes;
  Planes seen;
  for (const auto& plane : planes) seen.push_back(rows(plane, 0, offset));
  return seen;
}

int Ring::trim(int n) {
  if (!trimmable()) return 0;
  n = std::clamp(n, 0, offset);
  offset -= n;
  index -= n;
  return n;
}

bool Ring::consistent(int rows) const {
  if (max_size < 1 || keep < 0 || keep >= max_size || offset < 0 || index < 0 || index > rows) return false;
  if (offset <= rows) return index == offset;  // nothing was dropped yet
  return rows >= max_size && index >= keep;
}

}  // namespace mlxlm::cache
