// The public C++ API: load a model, generate text. No MLX header is needed to use it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace mlxlm {

struct LoadOptions {
  std::string revision = "main";
  bool offline = false;
};

/** A model and its tokenizer. Movable. One thread at a time: the one that called load(). */
class Model {
 public:
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

  std::vector<int> encode(const std::string& text, bool add_special_tokens = true) const;
  std::string decode(const std::vector<int>& tokens) const;
  /** The chat template around one user message; `text` itself when the model has none. */
  std::string chat_prompt(const std::string& user, const std::string& system = "") const;

  struct Impl;
  Impl& impl() const { return *impl_; }
  explicit Model(std::unique_ptr<Impl> impl);

 private:
  std::unique_ptr<Impl> impl_;
};

/** A folder, a .gguf file or "org/name"; empty = the default model. Throws mlxlm::Error (a std::runtime_error). */
Model load(const std::string& path_or_repo = "", const LoadOptions& options = {});

/** What a model remembers of a text, to go on from: prompts continue it, and it then holds prompt and answer as well. Movable. Not for two
 * calls at a time. */
class PromptCache {
 public:
  PromptCache();  // of nothing
  PromptCache(PromptCache&&) noexcept;
  PromptCache& operator=(PromptCache&&) noexcept;
  ~PromptCache();

  /** A file of save(), of `mlx-lm cache_prompt` or of Python's mlx_lm. Throws Error when it is broken or of a model with other shapes. */
  static PromptCache load(const Model& model, const std::string& file);
  void save(const Model& model, const std::string& file) const;
  int tokens() const;
  /** Forgets the last n tokens; returns how many: all of them or, where the model cannot forget, none. */
  int trim(int n);
  PromptCache copy() const;

  struct Impl;
  Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

struct GenerateOptions {
  int max_tokens = 256;
  float temperature = 0.f, top_p = 1.f, min_p = 0.f;
  int top_k = 0, min_tokens_to_keep = 1;
  float xtc_probability = 0.f, xtc_threshold = 0.1f;
  std::optional<uint64_t> seed{};
  std::map<int, float> logit_bias{};
  float repetition_penalty = 0.f, presence_penalty = 0.f, frequency_penalty = 0.f;
  int repetition_context_size = 20, presence_context_size = 20, frequency_context_size = 20;
  int max_kv_size = 0, prefill_step_size = 2048;
  std::vector<std::string> stop{};
  int kv_bits = 0, kv_group_size = 64;  // caches with so many bits a number, 2 to 8; 0 = not quantized
  int quantized_kv_start = 0;           // tokens before they are
  // Tokens guessed ahead and checked by the model in one call, faster where the guesses are often right. The answer stays the model's own;
  // with sampling, it has the model's own distribution.
  const Model* draft_model = nullptr;   // a smaller model with the same tokens, which outlives the call
  int num_draft_tokens = 3;             // that it guesses at a time
  int ngram_draft_tokens = 0;           // instead of it: guess out of the text so far, at most so many tokens at a time
  PromptCache* prompt_cache = nullptr;  // continue from it
};

struct GenerationResponse {
  std::string text;
  int token = 0;
  float logprob = 0.f;
  int prompt_tokens = 0, generation_tokens = 0;
  int drafted_tokens = 0, accepted_tokens = 0;  // guesses, and those that are among generation_tokens
  bool from_draft = false;                      // `token` was guessed
  double prompt_tps = 0, generation_tps = 0, peak_memory_gb = 0;
  std::string finish_reason;  // "", "stop", "length"
};

/** The whole text. `prompt` is used as it is: see Model::chat_prompt. */
std::string generate(Model& model, const std::string& prompt, const GenerateOptions& options = {});

/** Calls back for each piece; return false to stop. Returns the last response. */
GenerationResponse stream_generate(Model& model, const std::string& prompt, const GenerateOptions& options,
                                   const std::function<bool(const GenerationResponse&)>& on_response);

}  // namespace mlxlm
