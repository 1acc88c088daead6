// UTF-8 validity, for streams that must not emit half a character.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace mlxlm {

/** Length of the longest prefix that ends on a character boundary: an incomplete sequence at the very end is left out;
 *  bytes that can never be valid count as complete. */
std::size_t complete_utf8_prefix(std::string_view bytes);

/** Replaces each maximal invalid sequence by U+FFFD, as Python's bytes.decode(errors="replace"). */
std::string to_valid_utf8(std::string_view bytes);

/** Appends one code point; invalid ones become U+FFFD. */
void append_utf8(std::string& out, char32_t code_point);

/** Decodes one code point at `position` and moves past it; U+FFFD for invalid bytes. */
char32_t next_code_point(std::string_view text, std::size_t& position);

}  // namespace mlxlm
