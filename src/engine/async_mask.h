// A token mask that is found on another thread while the step runs.
#pragma once

#include <cstdint>
#include <functional>
#include <future>
#include <vector>

#include "engine/runner.h"

namespace mlxlm::engine {

/** Asks a provider once for each token to come: as soon as the token before it is known, and so while the model runs; the sampler waits for
 * the result and nobody else does. The provider is never called twice at a time. */
class AsyncMask final : public TokenMask {
 public:
  /** The answer so far -> one bit a token as TokenMask::allowed(). What it throws fails the request. */
  using Provider = std::function<std::vector<uint32_t>(std::span<const int> answer)>;
  explicit AsyncMask(Provider provider);
  /** Waits for the provider. */
  ~AsyncMask() override;
  void accept(int token) override;
  std::span<const uint32_t> allowed() override;

 private:
  void ask();
  Provider provider_;
  std::vector<int> answer_;
  std::future<std::vector<uint32_t>> next_;
  std::vector<uint32_t> bits_;
};

}  // namespace mlxlm::engine
