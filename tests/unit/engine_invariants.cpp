// Every violation is found: each is made by changing one field of a sound snapshot.
#include <functional>

#include <gtest/gtest.h>

#include "engine/invariants.h"

namespace mlxlm::engine {
namespace {

Snapshot sound() {
  Snapshot s;
  s.sequences.push_back({.id = 1,
                         .running = true,
                         .prompt_tokens = 4,
                         .tokens = 6,
                         .computed_tokens = 5,
                         .generated_tokens = 2,
                         .max_tokens = 10,
                         .cache = 11,
                         .held = {5, true, 50},
                         .reserved_bytes = 100,
                         .reserved_tokens = 14});
  s.sequences.push_back({.id = 2, .running = false, .prompt_tokens = 3, .tokens = 3, .max_tokens = 5});
  s.waiting = {2};
  s.running = {1};
  s.stored.push_back({.cache = 12, .tokens = 7, .held = {7, true, 70}, .bytes = 70});
  s.reserved_bytes = 100;
  s.stored_bytes = 70;
  s.stored_budget_bytes = 90;
  s.memory_bytes = 200;
  s.max_sequences = 1;
  return s;
}

TEST(Invariants, ASoundSnapshotHasNone) {
  EXPECT_TRUE(check_invariants(sound()).empty());
  EXPECT_TRUE(check_invariants({}).empty());
}

TEST(Invariants, EachViolationIsNamed) {
  const std::vector<std::function<void(Snapshot&)>> breaks{
      [](auto& s) { s.waiting = {}; },
      [](auto& s) { s.unwritten_bytes = 31; },
      [](auto& s) { s.waiting = {2, 2}; },
      [](auto& s) { s.running = {}; },
      [](auto& s) { s.running = {1, 3}; },
      [](auto& s) { s.waiting.push_back(1); },
      [](auto& s) { s.max_sequences = 0; },
      [](auto& s) { s.sequences[0].cache = 0; },
      [](auto& s) { s.sequences[0].computed_tokens = s.sequences[0].held.tokens = 6; },
      [](auto& s) { s.sequences[0].held.tokens = 4; },
      [](auto& s) { s.sequences[0].generated_tokens = 3; },
      [](auto& s) { s.sequences[0].max_tokens = 2; },
      [](auto& s) { s.sequences[0].held.bytes = 101; },
      [](auto& s) { s.sequences[0].reserved_tokens = 4; },
      [](auto& s) { s.sequences[1].reserved_bytes = s.reserved_bytes = 5; },
      [](auto& s) {
        s.sequences[1].cache = 13;
        s.sequences[1].held.bytes = 5;
      },
      [](auto& s) { s.sequences[1].cache = 11; },
      [](auto& s) { s.sequences[1].computed_tokens = 1; },
      [](auto& s) { s.stored[0].cache = 11; },
      [](auto& s) { s.stored[0].held.tokens = 6; },
      [](auto& s) { s.stored[0].held.bytes = 71; },
      [](auto& s) { s.reserved_bytes = 99; },
      [](auto& s) { s.stored_bytes = 71; },
      [](auto& s) { s.stored_budget_bytes = 69; },
      [](auto& s) { s.memory_bytes = 169; },
      [](auto& s) { s.sequences.push_back(s.sequences[1]); },
  };
  for (std::size_t i = 0; i < breaks.size(); ++i) {
    auto s = sound();
    breaks[i](s);
    EXPECT_FALSE(check_invariants(s).empty()) << "break " << i;
  }
}

}  // namespace
}  // namespace mlxlm::engine
