// Streaming detokenizers. Reference: mlx_lm/tokenizer_utils.py
#include "text/detokenizer.h"

#include <array>
#include <cstdint>
#include <utility>

#include "base/utf8.h"

namespace mlxlm::text {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

bool plain_byte(int b) {
  return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
}

/** GPT-2's alphabet: code point -> byte, -1 = not in it. */
const std::array<int16_t, 512>& byte_of_code_point() {
  static const auto table = [] {
    std::array<int16_t, 512> out;
    out.fill(-1);
    int next = 256;
    for (int b = 0; b < 256; ++b) out[plain_byte(b) ? b : next++] = static_cast<int16_t>(b);
    return out;
  }();
  return table;
}

int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

class BytesDetokenizer final : public Detokenizer {
 public:
  BytesDetokenizer(std::shared_ptr<const TokenBytes> table, bool trim_space, std::string unknown)
      : table_(std::move(table)), trim_space_(trim_space), unknown_(std::move(unknown)) {}

  void reset() override {
    held_.clear();
    segment_.clear();
    at_start_ = true;
  }
  void add_token(int token) override {
    const bool known = token >= 0 && static_cast<std::size_t>(token) < table_->size();
    held_ += known ? (*table_)[static_cast<std::size_t>(token)] : unknown_;
    flush(complete_utf8_prefix(held_));
  }
  void finalize() override { flush(held_.size()); }
  std::string take_segment() override { return std::exchange(segment_, {}); }

 private:
  void flush(std::size_t size_bytes) {
    if (size_bytes == 0) return;
    std::string text = to_valid_utf8(std::string_view(held_).substr(0, size_bytes));
    held_.erase(0, size_bytes);
    if (at_start_ && trim_space_ && text.front() == ' ') text.erase(0, 1);
    at_start_ = false;
    segment_ += text;
  }

  std::shared_ptr<const TokenBytes> table_;
  bool trim_space_;
  std::string unknown_;
  std::string held_, segment_;
  bool at_start_ = true;
};

class NaiveDetokenizer final : public Detokenizer {
 public:
  NaiveDetokenizer(std::function<std::string(const std::vector<int>&)> decode, bool clean_spaces)
      : decode_(std::move(decode)), clean_spaces_(clean_spaces) {}

  void reset() override {
    context_.clear();
    pending_.clear();
    segment_.clear();
    context_text_.clear();
    emitted_bytes_ = 0;
  }
  void add_token(int token) override {
    pending_.push_back(token);
    advance(pending_.size() >= kMaxPending);
  }
  void finalize() override {
    if (!pending_.empty()) advance(true);
  }
  std::string take_segment() override { return std::exchange(segment_, {}); }

 private:
  // A character has at most four bytes, so more pending tokens than this are broken text, not an unfinished character.
  static constexpr std::size_t kMaxPending = 32;

  void advance(bool force) {
    std::vector<int> window = context_;
    window.insert(window.end(), pending_.begin(), pending_.end());
    std::string text = decode_(window);
    std::string certain = text;
    if (!force) {
      while (certain.ends_with(kReplacement)) certain.resize(certain.size() - kReplacement.size());
      if (clean_spaces_ && certain.size() == text.size() && certain.ends_with(' ')) certain.pop_back();
    }
    std::size_t start = context_text_.size() + emitted_bytes_;
    while (start < certain.size() && (certain[start] & 0xC0) == 0x80) ++start;  // broken text may decode otherwise with more context
    if (certain.size() > start) {
      segment_ += certain.substr(start);
      emitted_bytes_ = certain.size() - context_text_.size();
    }
    if (!force && certain.size() != text.size()) return;
    if (certain.size() <= context_text_.size() && !force) return;  // no text yet: keep the context that shows it
    context_ = std::exchange(pending_, {});
    context_text_ = decode_(context_);
    emitted_bytes_ = 0;
  }

  std::function<std::string(const std::vector<int>&)> decode_;
  bool clean_spaces_;
  std::vector<int> context_, pending_;  // the window: tokens whose text is out, and those after them
  std::string context_text_;            // decode(context_)
  std::size_t emitted_bytes_ = 0;       // of the pending tokens' text
  std::string segment_;
};

}  // namespace

std::string byte_level_bytes(const std::string& token) {
  std::string out;
  for (std::size_t position = 0; position < token.size();) {
    const char32_t c = next_code_point(token, position);
    const int byte = c < 512 ? byte_of_code_point()[c] : -1;
    if (byte < 0) return token;
    out.push_back(static_cast<char>(byte));
  }
  return out;
}

std::string spm_bytes(const std::string& token) {
  if (token.size() == 6 && token.starts_with("<0x") && token[5] == '>' && hex_value(token[3]) >= 0 && hex_value(token[4]) >= 0)
    return std::string(1, static_cast<char>(hex_value(token[3]) * 16 + hex_value(token[4])));
  constexpr std::string_view kSpace = "\xE2\x96\x81";
  std::string out;
  for (std::size_t i = 0; i < token.size();) {
    const bool space = token.compare(i, kSpace.size(), kSpace) == 0;
    out.push_back(space ? ' ' : token[i]);
    i += space ? kSpace.size() : 1;
  }
  return out;
}

std::unique_ptr<Detokenizer> make_bytes_detokenizer(std::shared_ptr<const TokenBytes> table, bool trim_space, std::string unknown) {
  return std::make_unique<BytesDetokenizer>(std::move(table), trim_space, std::move(unknown));
}

std::unique_ptr<Detokenizer> make_naive_detokenizer(std::function<std::string(const std::vector<int>&)> decode, bool clean_spaces) {
  return std::make_unique<NaiveDetokenizer>(std::move(decode), clean_spaces);
}

}  // namespace mlxlm::text
