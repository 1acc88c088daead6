// One call of the provider at a time, each on a thread of its own.
#include "engine/async_mask.h"

#include <utility>

namespace mlxlm::engine {

AsyncMask::AsyncMask(Provider provider) : provider_(std::move(provider)) {
  ask();
}

AsyncMask::~AsyncMask() {
  if (next_.valid()) next_.wait();
}

void AsyncMask::ask() {
  next_ = std::async(std::launch::async, [this] { return provider_(answer_); });
}

void AsyncMask::accept(int token) {
  if (next_.valid()) next_.wait();  // it reads the answer
  answer_.push_back(token);
  ask();
}

std::span<const uint32_t> AsyncMask::allowed() {
  if (next_.valid()) bits_ = next_.get();
  return bits_;
}

}  // namespace mlxlm::engine
