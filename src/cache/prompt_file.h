// Prompt-cache files: caches on disk, in mlx_lm's layout. Reference: mlx_lm/models/cache.py save_prompt_cache, load_prompt_cache
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache/cache.h"
#include "cache/quantized.h"

namespace mlxlm::cache {

/** What the writer notes beside the caches; mlx_lm and this program write "model" (name or path) and "tokenizer_config" (JSON). */
using PromptMetadata = std::map<std::string, std::string>;

/** Writes beside `file` and renames. Layers that remember nothing have no entry, those that remember several things a CacheList, as in
 * mlx_lm. Throws Error(io), Error(unsupported). */
void save_prompt_file(const std::filesystem::path& file, const Caches& caches, const arch::Model& model, PromptMetadata metadata);

/** The content of such a file as it lies in memory, for whoever writes it later or elsewhere: `start`, and then `rest` piece by piece. */
struct PromptFilePieces {
  std::string start{};
  std::vector<std::span<const std::byte>> rest{};
  std::shared_ptr<const void> owner{};  // of the memory of `rest`, also when the caches are gone
  int64_t copied_bytes = 0;             // of `rest`: what does not lie in memory as files have it
};
/** Caches are not copied where they lie in memory as kernels read them. They must not change any more: only be copied, or freed. Throws
 * Error(unsupported). */
PromptFilePieces prompt_file_pieces(const Caches& caches, const arch::Model& model, PromptMetadata metadata);

/** Reads the header only: which model a file is of, before that model is loaded. */
PromptMetadata read_prompt_metadata(const std::filesystem::path& file);

/** The caches of a file in the layout of mlx_lm 0.32 or in the one before it, in memory of their own: as
 * plan::cache_layout(model). Throws Error(bad_weights) when the file is broken, contradicts itself or is of a model with other shapes;
 * Error(unsupported) for classes that no model of this program uses. */
Caches load_prompt_file(const std::filesystem::path& file, const arch::Model& model);

/** Tokens that the caches have seen. */
int prompt_tokens(const Caches& caches);
/** Throws Error(bad_request) unless quantized caches have these bits and this group size; 0 = any. */
void check_prompt_quantization(const Caches& caches, int bits, int group_size);

/** Small helpers over all layers. */
int64_t total_bytes(const Caches& caches);
bool trimmable(const Caches& caches);
/** Forgets the last n tokens of every layer; 0 and no change when a layer cannot. Returns how many were forgotten. */
int trim(Caches& caches, int n);
Caches copy(const Caches& caches);

}  // namespace mlxlm::cache
