// Names out of files, as error messages show them.
#pragma once

#include <string>
#include <string_view>

namespace mlxlm::weights {

/** On one line, valid UTF-8, at most about 100 bytes: a hostile name must not flood or forge a log. */
std::string shown_name(std::string_view name);

}  // namespace mlxlm::weights
