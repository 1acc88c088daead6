// UTF-8 by the table of well-formed byte sequences (Unicode, table 3-7).
#include "base/utf8.h"

namespace mlxlm {
namespace {

constexpr char32_t replacement = 0xFFFD;

struct Sequence {
  char32_t code_point = replacement;
  std::size_t bytes = 1;  // how many bytes to consume
  bool valid = false;
  bool incomplete = false;  // valid so far, cut off by the end
};

/** The sequence at `i`: a character, or the maximal invalid part. */
Sequence read_sequence(std::string_view s, std::size_t i) {
  const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(s[at]); };
  const unsigned char lead = byte(i);
  if (lead < 0x80) return {lead, 1, true, false};
  int more = 0;
  unsigned char low = 0x80, high = 0xBF;
  char32_t value = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    more = 1;
    value = lead & 0x1F;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    more = 2;
    value = lead & 0x0F;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    more = 3;
    value = lead & 0x07;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {};
  }
  for (int n = 1; n <= more; ++n) {
    const std::size_t at = i + static_cast<std::size_t>(n);
    if (at >= s.size()) return {replacement, static_cast<std::size_t>(n), false, true};
    if (byte(at) < low || byte(at) > high) return {replacement, static_cast<std::size_t>(n), false, false};
    value = (value << 6) | (byte(at) & 0x3Fu);
    low = 0x80;
    high = 0xBF;
  }
  return {value, static_cast<std::size_t>(more) + 1, true, false};
}

}  // namespace

std::size_t complete_utf8_prefix(std::string_view bytes) {
  // Only the last three bytes can begin a sequence that the end cuts off.
  const std::size_t size = bytes.size();
  for (std::size_t back = 1; back <= 3 && back <= size; ++back) {
    const std::size_t at = size - back;
    const auto c = static_cast<unsigned char>(bytes[at]);
    if (c < 0x80) break;
    if (c < 0xC0) continue;
    return read_sequence(bytes, at).incomplete ? at : size;
  }
  return size;
}

std::string to_valid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (std::size_t i = 0; i < bytes.size();) {
    const Sequence sequence = read_sequence(bytes, i);
    if (sequence.valid)
      out.append(bytes.substr(i, sequence.bytes));
    else
      out.append("\xEF\xBF\xBD");
    i += sequence.bytes;
  }
  return out;
}

void append_utf8(std::string& out, char32_t c) {
  if (c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) c = replacement;
  const auto put = [&](char32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | (c >> 6));
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | (c >> 12));
    put(0x80 | ((c >> 6) & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | (c >> 18));
    put(0x80 | ((c >> 12) & 0x3F));
    put(0x80 | ((c >> 6) & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

char32_t next_code_point(std::string_view text, std::size_t& position) {
  const Sequence sequence = read_sequence(text, position);
  position += sequence.bytes;
  return sequence.valid ? sequence.code_point : replacement;
}

}  // namespace mlxlm
