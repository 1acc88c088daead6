// How much of a prompt may run beside decoding sequences, learned from the time that steps took.
#pragma once

#include <map>
#include <vector>

namespace mlxlm::engine {

/** Keeps a step that carries prompt tokens within `ratio` times the step without them. Results don't depend on it, only times do. */
class Pacer {
 public:
  Pacer(double ratio, int least_tokens, int most_tokens) : ratio_(ratio), least_tokens_(least_tokens), most_tokens_(most_tokens) {}
  /** held_tokens: those that a prompt token has before it, on average. */
  void observe(int decode_rows, int prompt_tokens, double held_tokens, double seconds);
  /** Of a prompt that holds so many already, for the next step. decode_rows 0 = the most: nobody waits. */
  int prompt_tokens(int decode_rows, int held_tokens) const;

 private:
  /** Per-token times by what was held, of which older ones count less and less. */
  struct Line {
    double weight = 0, x = 0, y = 0, xx = 0, xy = 0;  // sums
    void add(double held_tokens, double seconds);
    double growth() const;
  };
  double decode_s(int rows) const;
  double token_s(double held_tokens) const { return first_token_s_ * (1 + line_.growth() * held_tokens); }

  double ratio_;
  int least_tokens_, most_tokens_;
  std::map<int, std::vector<double>> decode_s_;  // by rows: the latest, in order
  double first_token_s_ = 0;                     // of a prompt token with nothing before it, smoothed
  Line line_;
};

}  // namespace mlxlm::engine
