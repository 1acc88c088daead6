// The one error type of the project, and the tables that map it to exit statuses.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace mlxlm {

enum class Code {
  bad_config,
  bad_weights,
  bad_template,
  bad_request,
  unsupported,
  not_found,
  io,
  network,
  out_of_memory,
  cancelled,
  internal,
};

/** What ends an operation. The message is one line: where: what, got, wanted. */
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}
  /** Message "where: what". */
  Error(Code code, std::string_view where, std::string_view what)
      : std::runtime_error(std::string(where) + ": " + std::string(what)), code_(code) {}
  Code code() const noexcept { return code_; }

 private:
  Code code_;
};

/** "bad_config", ... : stable names for JSON and logs. */
std::string_view code_name(Code code) noexcept;

/** 130 for cancelled (as a shell reports Ctrl-C), 1 for all others. */
int exit_status(Code code) noexcept;

}  // namespace mlxlm
