// Names and exit statuses of error codes.
#include "base/error.h"

namespace mlxlm {

std::string_view code_name(Code code) noexcept {
  switch (code) {
    case Code::bad_config:
      return "bad_config";
    case Code::bad_weights:
      return "bad_weights";
    case Code::bad_template:
      return "bad_template";
    case Code::bad_request:
      return "bad_request";
    case Code::unsupported:
      return "unsupported";
    case Code::not_found:
      return "not_found";
    case Code::io:
      return "io";
    case Code::network:
      return "network";
    case Code::out_of_memory:
      return "out_of_memory";
    case Code::cancelled:
      return "cancelled";
    case Code::internal:
      return "internal";
  }
  return "internal";
}

int exit_status(Code code) noexcept {
  return code == Code::cancelled ? 130 : 1;
}

}  // namespace mlxlm
