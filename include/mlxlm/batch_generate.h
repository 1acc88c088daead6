// The public C++ API, continued: many prompts at once.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "mlxlm/batch_generator.h"

namespace mlxlm {

/** One prompt with its own options. `prompt` is used as it is: see Model::chat_prompt. prefill_step_size is that of BatchOptions; all
 * prompts with a draft_model have the same one. Of a prompt_cache a copy is continued: it stays as it is, and may be that of many prompts.
 */
struct BatchPrompt {
  std::string prompt;
  GenerateOptions options{.max_tokens = 128};
  std::vector<int> tokens{};  // when there are any, the prompt, instead of the text
};

struct BatchResult {
  std::string text;
  std::vector<int> tokens{};      // without the one that ended the answer
  std::vector<float> logprobs{};  // of `tokens`, when wanted
  std::string finish_reason;      // "stop", "length", "cancelled"; "error"
  std::string error;              // one line; empty = none
  int prompt_tokens = 0, generation_tokens = 0;
  int accepted_tokens = 0;  // of generation_tokens: guesses
  /** With return_prompt_caches, but not yet in on_result: of prompt and answer. Its last token may be missing, and tokens behind a stop
   * text may be there: see PromptCache::tokens(). */
  std::optional<PromptCache> prompt_cache{};
};

struct BatchOptions {
  int max_sequences = 32;       // answered at a time
  int prefill_step_size = 512;  // prompt tokens processed at a time
  bool want_logprobs = false;
  bool return_prompt_caches = false;
  std::function<void(std::size_t index, const BatchResult&)> on_result{};     // as each ends
  std::function<bool(std::size_t index, const std::string& text)> on_text{};  // more text of an answer; false ends that answer
  const std::atomic<bool>* cancel = nullptr;                                  // may be set by another thread
};

/** Results in order of the prompts. Each is what generate() gives for it alone; one that cannot be run fails alone. Thread: that of the
 * model. Throws Error(bad_request): several draft models, or one with other tokens. Reference: mlx_lm/generate.py batch_generate */
std::vector<BatchResult> batch_generate(Model& model, const std::vector<BatchPrompt>& prompts, const BatchOptions& options = {},
                                        BatchStats* stats = nullptr);
/** The same options for all. */
std::vector<BatchResult> batch_generate(Model& model, const std::vector<std::string>& prompts,
                                        const GenerateOptions& each = {.max_tokens = 128}, const BatchOptions& options = {},
                                        BatchStats* stats = nullptr);

}  // namespace mlxlm
