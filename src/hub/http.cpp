// Carries answers and exceptions across the C interface of mlxlm_rust.h.
#include "hub/http.h"

#include <exception>

#include <fmt/format.h>

#include "base/error.h"
#include "mlxlm_rust.h"

namespace mlxlm::hub {

namespace {

std::string plain_etag(std::string_view etag) {
  if (etag.starts_with("W/")) etag.remove_prefix(2);
  if (etag.size() >= 2 && etag.front() == '"' && etag.back() == '"') etag = etag.substr(1, etag.size() - 2);
  return std::string(etag);
}

struct Call {
  HttpAnswer answer{};
  int64_t max_body_bytes = 0;
  const std::function<void(int, const char*, std::size_t)>* on_body = nullptr;
  std::exception_ptr failure{};
};

int on_head(void* context, const MlxlmHttpHead* head) {
  auto& a = static_cast<Call*>(context)->answer;
  a.status = head->status;
  a.etag = plain_etag(*head->x_linked_etag ? head->x_linked_etag : head->etag);
  a.commit = head->x_repo_commit;
  a.error_code = head->x_error_code;
  a.error_message = head->x_error_message;
  a.content_length = head->content_length;
  a.size = head->x_linked_size >= 0 ? head->x_linked_size : head->status < 300 ? head->content_length : -1;
  return 0;
}

int on_piece(void* context, const char* data, size_t size) {
  auto& call = *static_cast<Call*>(context);
  try {  // an exception must not pass through Rust
    if (*call.on_body && (call.answer.status == 200 || call.answer.status == 206)) {
      (*call.on_body)(call.answer.status, data, size);
    } else {
      call.answer.body.append(data, size);
      if (static_cast<int64_t>(call.answer.body.size()) > call.max_body_bytes) {
        throw Error(Code::network, fmt::format("answer is longer than {} bytes", call.max_body_bytes));
      }
    }
    return 0;
  } catch (...) {
    call.failure = std::current_exception();
    return 1;
  }
}

}  // namespace

HttpAnswer http(const HttpRequest& request, const std::function<void(int, const char*, std::size_t)>& on_body) {
  Call call;
  call.max_body_bytes = request.max_body_bytes;
  call.on_body = &on_body;
  std::string headers = "User-Agent: mlx-lm.cpp\nAccept-Encoding: identity";
  if (!request.token.empty()) headers += "\nAuthorization: Bearer " + request.token;
  MlxlmHttpRequest raw{};
  raw.url = request.url.c_str();
  raw.headers = headers.c_str();
  raw.method = request.head ? "HEAD" : "GET";
  raw.range_start = request.range_start;
  raw.follow_redirects = 10;
  raw.follow_relative_only = request.head ? 1 : 0;
  raw.connect_timeout_ms = request.connect_timeout_ms;
  raw.read_timeout_ms = request.read_timeout_ms;
  raw.on_head = on_head;
  raw.on_body = on_piece;
  raw.context = &call;
  int status = 0;
  MlxlmString error{};
  const int rc = mlxlm_http(&raw, &status, &error);
  std::string message;
  if (rc != MLXLM_OK) {
    message.assign(error.data ? error.data : "", error.data ? error.size : 0);
    if (error.data) mlxlm_string_free(error);
  }
  if (call.failure) std::rethrow_exception(call.failure);
  if (rc != MLXLM_OK) {
    if (message.find(request.url) == std::string::npos) message = request.url + ": " + message;
    throw Error(rc == MLXLM_E_INVALID ? Code::bad_request : Code::network, message);
  }
  call.answer.status = status;
  return std::move(call.answer);
}

}  // namespace mlxlm::hub
