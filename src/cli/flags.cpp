// What shared options are called, and what their values may be.
#include "cli/flags.h"

#include <fmt/format.h>

#include "base/error.h"
#include "base/thread_pool.h"
#include "gen/speculative.h"
#include "kernels/cpu/kernels.h"

namespace mlxlm::cli {

void check_at_least(const char* name, int64_t value, int64_t least) {
  if (value < least) throw Error(Code::bad_request, name, fmt::format("got {}, wanted at least {}", value, least));
}

void check_max_tokens(int value) {
  if (value == 0 || value < -1) {
    throw Error(Code::bad_request, "max_tokens", fmt::format("got {}, wanted at least 1, or -1 for no limit", value));
  }
}

void add_model(CLI::App& c, std::string& model, bool& trust_remote_code) {
  c.add_option("--model", model, "Folder, .gguf file or repository (org/name); the default model when not given");
  c.add_flag("--trust-remote-code", trust_remote_code, "Accepted for compatibility: no code of a model is ever run");
}

void add_cpu_precision(CLI::App& c, std::string& value) {
  c.add_option("--cpu-precision", value,
               "Activations in products with quantized weights: exact (float32), default (15 bits), fast (8 bits, the output layer 15)")
      ->check(CLI::IsMember({"exact", "default", "fast"}))
      ->capture_default_str();
}

void set_cpu_precision(const std::string& value) {
  using kernels::cpu::Precision;
  kernels::cpu::set_precision(value == "exact" ? Precision::exact : value == "fast" ? Precision::fast : Precision::standard);
}

void add_threads(CLI::App& c, int& threads) {
  c.add_option("--threads", threads, "CPU threads; 0 = all cores this process may use")->capture_default_str();
}

void use_threads(int threads) {
  if (threads < 0) throw Error(Code::bad_request, "--threads", fmt::format("got {}, wanted 0 (all cores) or more", threads));
  if (threads > 0) set_compute_threads(threads);
}

void add_max_kv_size(CLI::App& c, CacheFlags& flags) {
  c.add_option("--max-kv-size", flags.max_kv_size, "Most tokens that the cache holds; unbounded when not given");
}

void add_kv_bits(CLI::App& c, CacheFlags& flags) {
  c.add_option("--kv-bits", flags.kv_bits, "Bits of a quantized cache: 2, 3, 4, 5, 6 or 8; not quantized when not given");
  c.add_option("--kv-group-size", flags.kv_group_size, "Group size of a quantized cache: 32, 64 or 128 [64]");
}

void add_quantized_kv_start(CLI::App& c, CacheFlags& flags) {
  c.add_option("--quantized-kv-start", flags.quantized_kv_start, "Tokens before the cache is quantized")->capture_default_str();
}

int CacheFlags::max_kv_size_tokens() const {
  if (max_kv_size) check_at_least("max_kv_size", *max_kv_size, 1);
  return max_kv_size.value_or(0);
}

cache::Quantization CacheFlags::quantization() const {
  if (kv_bits && *kv_bits <= 0) throw Error(Code::bad_request, "kv_bits", fmt::format("got {}, wanted 2, 3, 4, 5, 6 or 8", *kv_bits));
  return {.bits = kv_bits.value_or(0), .group_size = kv_group_size.value_or(64), .start_tokens = quantized_kv_start};
}

void add_drafts(CLI::App& c, DraftFlags& flags) {
  c.add_option("--draft-model", flags.model, "Smaller model with the same tokens that guesses ahead; the answer stays the model's own");
  c.add_option("--num-draft-tokens", flags.num_tokens, "Tokens that the draft model guesses at a time")->capture_default_str();
  c.add_option("--ngram-draft-tokens", flags.ngram_tokens,
               "Guess ahead out of the text so far, at most so many tokens at a time; for texts that repeat themselves; 0 = off")
      ->capture_default_str();
}

std::optional<Session> open_draft_model(const DraftFlags& flags, const text::Tokenizer& tokenizer) {
  if (flags.model.empty()) return std::nullopt;
  std::optional<Session> draft(open_session(find_model(flags.model)));
  gen::check_same_vocabulary(tokenizer, draft->tokenizer);
  return draft;
}

std::function<void(int, int)> show_prompt_on(StatusLine& line) {
  constexpr int long_prompt_tokens = 512;  // from here on a prompt is worth a progress line
  return [&line](int processed, int total) {
    if (processed == total) {
      line.clear();
    } else if (total >= long_prompt_tokens) {
      line.show(fmt::format("Prompt: {} of {} tokens", processed, total));
    }
  };
}

json template_variables(const std::string& text) {
  if (text.empty()) return json::object();
  json variables = parse_json(text, "--chat-template-config");
  if (!variables.is_object()) throw Error(Code::bad_request, "--chat-template-config", "wanted a JSON object");
  return variables;
}

}  // namespace mlxlm::cli
