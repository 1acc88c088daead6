// What must hold of the engine between steps, checked without it.
#pragma once

#include <string>
#include <vector>

#include "engine/runner.h"

namespace mlxlm::engine {

/** The engine's state as plain data. */
struct Snapshot {
  struct Sequence {
    SequenceId id = 0;
    bool running = false;
    int prompt_tokens = 0, tokens = 0, computed_tokens = 0;
    int generated_tokens = 0, max_tokens = 0;  // max_tokens -1 = no limit
    CacheId cache = 0;
    CacheInfo held{};  // what the runner says of it
    int64_t reserved_bytes = 0, reserved_tokens = 0;
  };
  struct Stored {
    CacheId cache = 0;
    int tokens = 0;
    CacheInfo held{};
    int64_t bytes = 0;  // as counted by the prefix cache
  };
  std::vector<Sequence> sequences{};
  std::vector<SequenceId> waiting{}, running{};  // the queues
  std::vector<Stored> stored{};
  int64_t reserved_bytes = 0, stored_bytes = 0, stored_budget_bytes = 0, unwritten_bytes = 0, memory_bytes = 0;  // memory 0 = unlimited
  int max_sequences = 0;
};

/** Every violation, a sentence each; empty = all is well. */
std::vector<std::string> check_invariants(const Snapshot& snapshot);

}  // namespace mlxlm::engine
