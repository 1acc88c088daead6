// What memory there is, and what a prompt will need of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "arch/model.h"
#include "cache/quantized.h"

namespace mlxlm::gen {

/** Bytes that this process may still use: free memory of the host and of its control group, or on a GPU what MLX's limit leaves;
 * MLXLM_MEMORY_BYTES overrides. Nothing = unknown. */
std::optional<int64_t> available_bytes();

/** The most memory that the process had resident, in bytes. */
int64_t peak_resident_bytes();

/** Bytes that the caches of `model` take at most while a context of `tokens` tokens is built up, at `value_bytes` a number;
 * max_kv_size_tokens 0 = unbounded. Quantized ones hold floats until they are converted: for `start_tokens`, and for a whole step of the
 * prompt. */
struct CacheSizes {
  int max_kv_size_tokens = 0;
  int value_bytes = 2;
  cache::Quantization quantization{};
  int prefill_step_tokens = 0;
};
int64_t cache_bytes(const arch::Model& model, int64_t tokens, const CacheSizes& sizes);

/** Before the caches of an answer grow: they move to new memory, for half as many tokens again, while the old is still there. Throws as
 * check_available() unless that fits; returns how many tokens they may then hold before this must be asked again. */
int64_t check_answer(const arch::Model& model, const cache::Caches& caches, int64_t more_tokens, CacheSizes sizes);

/** Bytes of one number in caches of attention that hold something, 0 for others. */
int value_bytes(const cache::Caches& caches);

/** Throws Error(out_of_memory) with both figures when `needed` exceeds what is available. `what` grows: "prompt" or "answer". */
void check_available(int64_t needed_bytes, int64_t tokens, const char* what = "prompt");
/** The same for a prompt-cache file. */
void check_available_for(const std::string& file, int64_t needed_bytes);

}  // namespace mlxlm::gen
