// Streaming detokenizers: tokens in, text segments out, never half a character, linear cost.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace mlxlm::text {

class Detokenizer {
 public:
  virtual ~Detokenizer() = default;
  virtual void reset() = 0;
  virtual void add_token(int token) = 0;
  /** No more tokens: what was held back becomes text. */
  virtual void finalize() = 0;
  /** Text that became certain since the last call. */
  virtual std::string take_segment() = 0;
};

/** The bytes that each token stands for, by token id. */
using TokenBytes = std::vector<std::string>;

/** Bytes of a token of a GPT-2 (ByteLevel) vocabulary, by the rule of tokenizers' ByteLevel decoder. */
std::string byte_level_bytes(const std::string& token);
/** Bytes of a token of a SentencePiece vocabulary: "<0x0A>" is a byte, U+2581 a space. */
std::string spm_bytes(const std::string& token);

/** Text is the concatenation of token bytes; its first space is dropped if trim_space. Ids beyond the table become `unknown`.
 *  Reference: mlx_lm/tokenizer_utils.py BPEStreamingDetokenizer, SPMStreamingDetokenizer. */
std::unique_ptr<Detokenizer> make_bytes_detokenizer(std::shared_ptr<const TokenBytes> table, bool trim_space, std::string unknown);

/** For any tokenizer, by re-decoding a short window. clean_spaces: a trailing space may still vanish, so it is held back.
 *  Reference: NaiveStreamingDetokenizer, which re-decodes the line. */
std::unique_ptr<Detokenizer> make_naive_detokenizer(std::function<std::string(const std::vector<int>&)> decode, bool clean_spaces);

}  // namespace mlxlm::text
