// A model with its tokenizer, as commands and the public API open it.
#pragma once

#include <filesystem>
#include <string>

#include "hub/hub.h"
#include "model/causal_model.h"
#include "text/tokenizer.h"

namespace mlxlm {

struct Session {
  model::Loaded loaded;
  text::Tokenizer tokenizer;
};

/** An empty name means the default model. Throws every Error of the rooms below. */
std::filesystem::path resolve_model(const std::string& path_or_repo, const hub::ResolveOptions& options = {});

/** The tokenizer is made on a thread of its own while the weights are read. */
Session open_session(const std::filesystem::path& path, const model::LoadOptions& options = {});

/** Tokens of a prompt: special tokens are added unless it begins with the text of the bos token. Reference: mlx_lm/generate.py
 * stream_generate */
std::vector<int> encode_prompt(const text::Tokenizer& tokenizer, const std::string& prompt);

/** What XTC never takes away: the newline and the ends of the text. */
std::vector<int> xtc_special_tokens(const text::Tokenizer& tokenizer);

}  // namespace mlxlm
