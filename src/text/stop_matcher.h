// Cuts a text stream at the first stop string, holding back what may be the beginning of one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace mlxlm::text {

class StopMatcher {
 public:
  /** Empty strings are ignored. */
  explicit StopMatcher(std::vector<std::string> stops);
  /** Text that is certain not to belong to a stop string. After a match: what stood before it, then nothing. */
  std::string feed(std::string_view segment);
  /** End of the stream: the text held back. */
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace mlxlm::text
