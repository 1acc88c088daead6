// Attention in a latent space: one key for all heads, whose first part is the value, too. Thread: as eager.h.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/isa.h"

namespace mlxlm::kernels::cpu {

/** One sequence's new tokens over its cache. A key is a row of `latent` with a row of `more` behind it; the value is the row of `latent`.
 */
struct LatentAttention {
  const float* q = nullptr;  // [tokens][heads][latent_dims + more_dims], not scaled
  float* out = nullptr;      // [tokens][heads][latent_dims]
  int tokens = 0;
  const void *latent = nullptr, *more = nullptr;  // [rows][latent_dims], [rows][more_dims]
  int visible = 0;                                // keys that the first token sees; each next one sees one more
  int window = 0;                                 // > 0: only the last so many of them
  struct Shared {
    const void *latent, *more;
    int rows;  // a multiple of attention_block
  };
  std::vector<Shared> shared{};  // rows that come before those of `latent` and `more`
};
struct LatentShape {
  int heads, latent_dims, more_dims;
  float scale;
  Storage storage;
};
void eager_latent_attention(const std::vector<LatentAttention>& sequences, const LatentShape& shape);

}  // namespace mlxlm::kernels::cpu
