// One HTTP request over the Rust library, as hub and default model need it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace mlxlm::hub {

struct HttpRequest {
  std::string url;
  std::string token{};  // bearer, "" = none
  bool head = false;    // HEAD, following relative redirects only
  int64_t range_start = 0;
  int connect_timeout_ms = 10000, read_timeout_ms = 30000;
  int64_t max_body_bytes = int64_t{64} << 20;  // of `body`; more is Error(network)
};

struct HttpAnswer {
  int status = 0;
  std::string body{};  // empty when on_body is given and status is 200 or 206
  std::string etag{};  // without quotes; that of the linked blob when there is one
  std::string commit{}, error_code{}, error_message{};
  int64_t size = -1;  // bytes of the whole file; -1 = unknown
  int64_t content_length = -1;
};

/** on_body gets the pieces of a successful body; throwing from it ends the request. Throws Error(network): no connection, time-out, broken
 * transfer. */
HttpAnswer http(const HttpRequest& request, const std::function<void(int status, const char* data, std::size_t size)>& on_body = {});

}  // namespace mlxlm::hub
