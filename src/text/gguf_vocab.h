// A GGUF file's vocabulary as a tokenizer.
#pragma once

#include "base/json.h"
#include "text/rust_handles.h"

namespace mlxlm::text {

struct GgufTokenizer {
  BytePairs model;
  json tokenizer_config;  // as in tokenizer_config.json
};

/** metadata: tokenizer.ggml.* and tokenizer.chat_template. Throws Error(unsupported): other models than gpt2 and llama, unknown
 *  pre-tokenizers; Error(bad_config): missing or contradictory keys. Reference: llama.cpp src/llama-vocab.cpp */
GgufTokenizer tokenizer_from_gguf(const json& metadata);

}  // namespace mlxlm::text
