// What memory there is, and what a prompt will need of it.
#pragma once

#include <cstdint>
#include <optional>

#include "arch/model.h"

namespace mlxlm::gen {

/** Bytes that this process may still use: free memory of the host and of its control group; MLXLM_MEMORY_BYTES overrides. Nothing =
 * unknown. */
std::optional<int64_t> available_bytes();

/** The most memory that the process had resident, in bytes. */
int64_t peak_resident_bytes();

/** Bytes that the caches of `model` take for a context of `tokens` tokens, at `value_bytes` a number; max_kv_size_tokens 0 = unbounded. */
int64_t cache_bytes(const arch::Model& model, int64_t tokens, int max_kv_size_tokens, int value_bytes);

/** Throws Error(out_of_memory) with both figures when `needed` exceeds what is available. */
void check_available(int64_t needed_bytes, int64_t tokens);

}  // namespace mlxlm::gen
