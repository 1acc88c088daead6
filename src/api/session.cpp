// Puts hub, model and text together.
#include "api/session.h"

#include "hub/default_model.h"

namespace mlxlm {

std::filesystem::path resolve_model(const std::string& path_or_repo, const hub::ResolveOptions& options) {
  return path_or_repo.empty() ? hub::resolve_default(options) : hub::resolve(path_or_repo, options);
}

text::Tokenizer open_tokenizer(const std::filesystem::path& path, const json& config, const json& gguf_metadata) {
  return gguf_metadata.is_null() ? text::Tokenizer::from_folder(path, config) : text::Tokenizer::from_gguf(gguf_metadata, config);
}

Session open_session(const std::filesystem::path& path, const model::LoadOptions& options) {
  auto loaded = model::load(path, options);
  auto tokenizer = open_tokenizer(path, loaded.config, loaded.gguf_metadata);
  return {std::move(loaded), std::move(tokenizer)};
}

std::vector<int> encode_prompt(const text::Tokenizer& tokenizer, const std::string& prompt) {
  const auto& bos = tokenizer.bos_token();
  return tokenizer.encode(prompt, !bos || !prompt.starts_with(*bos));
}

}  // namespace mlxlm
