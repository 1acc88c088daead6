// A request inside the engine.
#pragma once

#include "engine/engine.h"

namespace mlxlm::engine {

struct Engine::Sequence {
  SequenceId id = 0;
  Request request;
  std::vector<int> tokens{};  // prompt (with what a given cache held) and answer
  int prompt_tokens = 0;      // of these
  int unknown_tokens = 0;     // the first of `tokens`: in a cache that came without them
  int computed_tokens = 0;    // in the cache
  CacheId cache = 0;
  bool replaceable = true;  // the cache, by what its tokens give computed again; not so, it is kept, or the request ends with it
  CacheOptions cache_options{};
  bool fixed_chunks = false;  // as Runner::chunks_show
  int64_t reserved_bytes = 0, reserved_tokens = 0;
  int reused_tokens = 0;
  std::size_t next_boundary = 0;
  int suspect_until_tokens = 0;  // was in a step that failed: runs alone until so many tokens are computed
  bool running = false, in_step = false;
  bool has_read_store = false;  // once: what was read may have been evicted before there was room for the rest
  Finish ended = Finish::none;  // while its step runs

  const char* why_not_replaceable() const {
    return unknown_tokens > 0 ? "its tokens are not known" : "what it holds depends on the chunks that its tokens came in";
  }
  std::span<const int> known_tokens() const { return std::span(tokens).subspan(unknown_tokens); }
  int generated_tokens() const { return static_cast<int>(tokens.size()) - prompt_tokens; }
  int pending_tokens() const { return static_cast<int>(tokens.size()) - computed_tokens; }
  /** Whether a cache with a limit forgets some of it. */
  bool overflows(std::size_t count) const {
    return request.max_kv_size_tokens > 0 && count > static_cast<std::size_t>(request.max_kv_size_tokens);
  }
  bool decoding() const { return pending_tokens() == 1 && generated_tokens() > 0; }
};

}  // namespace mlxlm::engine
