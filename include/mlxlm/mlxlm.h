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
};

struct GenerationResponse {
  std::string text;
  int token = 0;
  float logprob = 0.f;
  int prompt_tokens = 0, generation_tokens = 0;
  double prompt_tps = 0, generation_tps = 0, peak_memory_gb = 0;
  std::string finish_reason;  // "", "stop", "length"
};

/** The whole text. `prompt` is used as it is: see Model::chat_prompt. */
std::string generate(Model& model, const std::string& prompt, const GenerateOptions& options = {});

/** Calls back for each piece; return false to stop. Returns the last response. */
GenerationResponse stream_generate(Model& model, const std::string& prompt, const GenerateOptions& options,
                                   const std::function<bool(const GenerationResponse&)>& on_response);

}  // namespace mlxlm
