// Options that several commands share.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include "api/session.h"
#include "base/json.h"
#include "cache/quantized.h"
#include "cli/command.h"

namespace mlxlm::cli {

/** Throws Error(bad_request) naming the option, what was got and what was wanted. */
void check_at_least(const char* name, int64_t value, int64_t least);
/** -1 = no limit. */
void check_max_tokens(int value);

/** --model and --trust-remote-code, which is ignored. */
void add_model(CLI::App& command, std::string& model, bool& trust_remote_code);

/** --cpu-precision exact|default|fast. */
void add_cpu_precision(CLI::App& command, std::string& value);
void set_cpu_precision(const std::string& value);

/** --threads. */
void add_threads(CLI::App& command, int& threads);
/** Throws Error(bad_request) for a number below 0. Before the first kernel runs. */
void use_threads(int threads);

/** --temp to --min-tokens-to-keep, into sample::SamplerOptions or engine::Sampling. */
template <class Sampling>
void add_sampling(CLI::App& c, Sampling& s) {
  c.add_option("--temp", s.temperature, "Sampling temperature; 0 = the most likely token")->capture_default_str();
  c.add_option("--top-p", s.top_p, "Sampling top-p")->capture_default_str();
  c.add_option("--min-p", s.min_p, "Sampling min-p")->capture_default_str();
  c.add_option("--top-k", s.top_k, "Sampling top-k; 0 = off")->capture_default_str();
  c.add_option("--xtc-probability", s.xtc_probability, "Probability of XTC for each token")->capture_default_str();
  c.add_option("--xtc-threshold", s.xtc_threshold, "Probability that makes a token a candidate of XTC")->capture_default_str();
  c.add_option("--min-tokens-to-keep", s.min_tokens_to_keep, "Tokens that min-p keeps at least")->capture_default_str();
}

/** --max-kv-size, --kv-bits, --kv-group-size and --quantized-kv-start. */
struct CacheFlags {
  std::optional<int> max_kv_size, kv_bits, kv_group_size;
  int quantized_kv_start = 5000;
  /** 0 = unbounded. Throws Error(bad_request). */
  int max_kv_size_tokens() const;
  /** Throws Error(bad_request). */
  cache::Quantization quantization() const;
};
void add_max_kv_size(CLI::App& command, CacheFlags& flags);
void add_kv_bits(CLI::App& command, CacheFlags& flags);  // and the group size
void add_quantized_kv_start(CLI::App& command, CacheFlags& flags);

/** Shows how far a long prompt is. */
std::function<void(int processed, int total)> show_prompt_on(StatusLine& line);

/** --draft-model, --num-draft-tokens and --ngram-draft-tokens. */
struct DraftFlags {
  std::string model;
  int num_tokens = 3, ngram_tokens = 0;
};
void add_drafts(CLI::App& command, DraftFlags& flags);
/** The draft model, if there is one; its tokens are those of `tokenizer`. */
std::optional<Session> open_draft_model(const DraftFlags& flags, const text::Tokenizer& tokenizer);

/** --chat-template-config as an object of variables. Throws Error(bad_request). */
json template_variables(const std::string& text);

}  // namespace mlxlm::cli
