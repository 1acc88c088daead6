// Puts hub, model and text together.
#include "api/session.h"

#include <future>

#include "hub/default_model.h"

namespace mlxlm {

std::filesystem::path resolve_model(const std::string& path_or_repo, const hub::ResolveOptions& options) {
  return path_or_repo.empty() ? hub::resolve_default(options) : hub::resolve(path_or_repo, options);
}

Session open_session(const std::filesystem::path& path, const model::LoadOptions& options) {
  std::future<text::Tokenizer> tokenizer;
  model::LoadOptions with_tokenizer = options;
  with_tokenizer.on_config = [&](const json& config, const std::shared_ptr<const json>& gguf_metadata) {
    tokenizer = std::async(std::launch::async, [path, config, gguf_metadata] {
      return gguf_metadata ? text::Tokenizer::from_gguf(*gguf_metadata, config) : text::Tokenizer::from_folder(path, config);
    });
  };
  auto loaded = model::load(path, with_tokenizer);
  auto ready = tokenizer.get();
  loaded.gguf_metadata.reset();  // a vocabulary as JSON is large, and all of it is in the tokenizer now
  return {std::move(loaded), std::move(ready)};
}

std::vector<int> encode_prompt(const text::Tokenizer& tokenizer, const std::string& prompt) {
  const auto& bos = tokenizer.bos_token();
  return tokenizer.encode(prompt, !bos || !prompt.starts_with(*bos));
}

std::vector<int> xtc_special_tokens(const text::Tokenizer& tokenizer) {
  auto tokens = tokenizer.encode("\n", true);
  const auto& eos = tokenizer.eos_token_ids();
  tokens.insert(tokens.end(), eos.begin(), eos.end());
  return tokens;
}

}  // namespace mlxlm
