// Shortening and cleaning of names for messages.
#include "weights/names.h"

#include "base/utf8.h"

namespace mlxlm::weights {

std::string shown_name(std::string_view name) {
  constexpr std::size_t longest = 100;
  std::string shown = to_valid_utf8(name.substr(0, name.size() > longest ? longest - 3 : longest));
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return name.size() > longest ? shown + "..." : shown;
}

}  // namespace mlxlm::weights
