// Cutting calls at the ends of chunks.
#include "model/chunked_calls.h"

#include <algorithm>
#include <climits>

#include <mlx/ops.h>

#include "plan/plan.h"

namespace mlxlm::model {
namespace {

int seen(const Segment& segment, int cache) {
  return segment.caches == nullptr || segment.caches->empty() ? 0 : (*segment.caches)[cache]->offset();
}

}  // namespace

ChunkedCalls::ChunkedCalls(const arch::Model& model) {
  const auto layout = plan::cache_layout(model);
  for (std::size_t i = 0; i < layout.size(); ++i) {
    if (layout[i].kind != plan::CacheKind::chunked) continue;
    cache_ = static_cast<int>(i);
    if (std::ranges::find(sizes_, layout[i].window_tokens) == sizes_.end()) sizes_.push_back(layout[i].window_tokens);
  }
}

int ChunkedCalls::room(int offset) const {
  int least = INT_MAX;
  for (const int size : sizes_) least = std::min(least, size - offset % size);
  return least;
}

bool ChunkedCalls::cross(const std::vector<Segment>& segments) const {
  if (sizes_.empty()) return false;
  return std::ranges::any_of(segments, [&](const Segment& s) { return s.tokens > room(seen(s, cache_)); });
}

mx::array ChunkedCalls::run(CausalModel& model, const mx::array& tokens, const std::vector<Segment>& segments) const {
  struct Left {
    Segment segment;
    int at;                         // its first token
    std::vector<mx::array> rows{};  // logits
  };
  std::vector<cache::Caches> own(segments.size());
  std::vector<Left> lefts;
  int at = 0;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    lefts.push_back({segments[i], at});
    at += segments[i].tokens;
    if (segments[i].caches != nullptr && !segments[i].caches->empty()) continue;
    own[i] = cache::make_caches(model.description());
    lefts.back().segment.caches = &own[i];
  }
  for (;;) {
    std::vector<Segment> now;
    std::vector<mx::array> parts;
    std::vector<Left*> owners;
    for (auto& left : lefts) {
      auto& s = left.segment;
      const int count = std::min(s.tokens, room(seen(s, cache_)));
      if (count == 0) continue;
      const int wanted = std::max(0, s.wanted_rows - (s.tokens - count));
      now.push_back({count, wanted, s.caches});
      parts.push_back(mx::slice(tokens, {left.at}, {left.at + count}));
      owners.push_back(&left);
      left.at += count;
      s.tokens -= count;
      s.wanted_rows -= wanted;
    }
    if (now.empty()) break;
    const auto logits = model.run(mx::concatenate(parts), now);
    int row = 0;
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (now[i].wanted_rows > 0) owners[i]->rows.push_back(mx::slice(logits, {row, 0}, {row + now[i].wanted_rows, logits.shape(1)}));
      row += now[i].wanted_rows;
    }
  }
  std::vector<mx::array> rows;
  for (auto& left : lefts) rows.insert(rows.end(), left.rows.begin(), left.rows.end());
  if (rows.empty()) return mx::zeros({0, model.description().vocab});
  return rows.size() == 1 ? rows[0] : mx::concatenate(rows, 0);
}

}  // namespace mlxlm::model
