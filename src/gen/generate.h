// Prefill and decode for one sequence. Reference: mlx_lm/generate.py generate_step, stream_generate
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "cache/quantized.h"
#include "model/causal_model.h"
#include "sample/sample.h"
#include "text/tokenizer.h"

namespace mlxlm::gen {

namespace mx = mlx::core;

struct DraftMemory;  // gen/speculative.h

struct Options {
  int max_tokens = 256;  // -1 = until a stop
  sample::SamplerOptions sampler{};
  sample::ProcessorOptions processors{};
  int prefill_step_tokens = 2048;
  int max_kv_size_tokens = 0;  // 0 = unbounded
  cache::Quantization kv_quantization{};
  std::vector<std::string> stop{};
  bool ignore_eos = false;
  bool want_logprob = false;   // of the chosen token; costs a logsumexp when greedy
  bool want_logprobs = false;  // the whole vector for each token
  std::function<void(int processed, int total)> on_prefill{};
  int prefill_boundary = 0;                   // a chunk of the prompt ends after so many tokens, if it has more; 0 = none
  const std::atomic<bool>* cancel = nullptr;  // set from a signal handler or another thread; looked at within a prompt's chunks, too
  std::vector<int> context{};                 // tokens that the given caches hold: drafts and processors look back into them
  // Speculative decoding: tokens are guessed ahead and checked by the model in one call. What comes out is the model's own choice (greedy)
  // or has its own distribution (sampling).
  model::CausalModel* draft_model = nullptr;  // with the tokens of the model (check_same_vocabulary)
  int draft_tokens = 3;                       // that draft_model guesses at a time; 1 to 256
  DraftMemory* draft_memory = nullptr;        // what draft_model has read stays here for the next call
  int ngram_draft_tokens = 0;                 // most that are guessed at a time out of the text so far; 0 = off, at most 256
};

enum class Finish { none, stop, length, cancelled };
/** "stop" and so on; none has no name. */
const char* finish_name(Finish finish);

/** What one token brought. */
struct Response {
  std::string text;  // since the last response; may be empty
  int token = 0;
  float logprob = 0.f;            // only when wanted
  std::vector<float> logprobs{};  // [V], only when wanted
  bool from_draft = false;        // guessed, and right
  Finish finish = Finish::none;
  int prompt_tokens = 0, generation_tokens = 0;
  int drafted_tokens = 0, accepted_tokens = 0;  // guesses, and those that are among generation_tokens
  double prompt_tokens_per_s = 0, generation_tokens_per_s = 0;
  double peak_memory_gb = 0;  // 1e9 bytes; on the CPU of the whole process, on a GPU of MLX's allocator
};

/** GB (1e9 bytes): on a GPU of MLX's allocator, on the CPU of the whole process. */
double peak_memory_gb();

/** Ends an evaluation that failed: no work may outlive the caches that it writes to. Thread: the one that owns MLX. */
void end_evaluation() noexcept;

/** The most bytes that so many tokens of a prompt add to `caches` (none = fresh ones): what must be available before it runs. */
int64_t prompt_bytes(const model::CausalModel& model, int64_t tokens, const Options& options, const cache::Caches& caches);

/** Runs a prompt through `caches` (made when empty) without sampling anything: they then hold all its tokens. Of `options` it uses the
 * prefill step, the sizes and quantization of caches, on_prefill and cancel. Returns false when it was cancelled. Throws as
 * stream_generate. Reference: mlx_lm/cache_prompt.py, which generates 0 tokens */
bool prefill(model::CausalModel& model, const std::vector<int>& prompt, const Options& options, cache::Caches& caches);

/** Calls on_response once for each token, the end-of-text token included; the last call has `finish` set and the rest of the text.
 *  When on_response returns false, or `cancel` is set, generation ends with Finish::cancelled. `caches` may be given to continue from (they
 *  then hold every token that was delivered; speculation may replace the objects in them); else fresh ones are made. Returns the last
 * response. A prompt that was cancelled leaves in `caches` the tokens that on_prefill told. Throws Error(bad_request): empty prompt, token
 * out of the vocabulary; Error(out_of_memory) with both figures before prefill, or before the answer outgrows the memory. */
Response stream_generate(model::CausalModel& model, const text::Tokenizer& tokenizer, const std::vector<int>& prompt,
                         const Options& options, const std::function<bool(const Response&)>& on_response, cache::Caches* caches = nullptr);

}  // namespace mlxlm::gen
