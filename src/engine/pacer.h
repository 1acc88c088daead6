// How much of a prompt may run beside decoding sequences, learned from the time that steps took.
#pragma once

#include <map>

namespace mlxlm::engine {

/** Keeps a step that carries prompt tokens within `ratio` times the step without them. Results don't depend on it, only times do. */
class Pacer {
 public:
  Pacer(double ratio, int least_tokens, int most_tokens) : ratio_(ratio), least_tokens_(least_tokens), most_tokens_(most_tokens) {}
  void observe(int decode_rows, int prompt_tokens, double seconds);
  /** Prompt tokens for the next step. decode_rows 0 = the most: nobody waits. */
  int prompt_tokens(int decode_rows) const;

 private:
  /** Seconds of a step of so many rows and nothing else; 0 = not known. */
  double decode_s(int rows) const;

  double ratio_;
  int least_tokens_, most_tokens_;
  std::map<int, double> decode_s_;  // by rows, smoothed
  double prompt_token_s_ = 0;       // smoothed
};

}  // namespace mlxlm::engine
