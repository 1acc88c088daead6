// A GGUF file's vocabulary as the JSON files of a tokenizer folder.
#pragma once

#include <string>

#include "base/json.h"

namespace mlxlm::text {

struct GgufTokenizerFiles {
  std::string tokenizer_json;
  json tokenizer_config;
};

/** metadata: tokenizer.ggml.* and tokenizer.chat_template. Throws Error(unsupported): other models than gpt2 and llama, unknown
 *  pre-tokenizers; Error(bad_config): missing or contradictory keys. Reference: llama.cpp src/llama-vocab.cpp */
GgufTokenizerFiles tokenizer_files_from_gguf(const json& metadata);

}  // namespace mlxlm::text
