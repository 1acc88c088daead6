// One detokenizer and one stop matcher a request.
#include "gen/text_events.h"

namespace mlxlm::gen {

void TextEvents::begin(engine::SequenceId id, const std::vector<std::string>& stop) {
  open_.insert_or_assign(id, Open{tokenizer_.make_detokenizer(), text::StopMatcher(stop)});
}

TextEvents::Piece TextEvents::take(const engine::Event& event) {
  const auto found = open_.find(event.id);
  if (found == open_.end()) return {};
  auto& [detokenizer, stops] = found->second;
  Piece piece;
  if (event.chosen && event.finish != engine::Finish::stop) {
    detokenizer->add_token(event.chosen->token);
    piece.text = stops.feed(detokenizer->take_segment());
  }
  const bool last = event.finish != engine::Finish::none || stops.stopped();
  if (last) {
    detokenizer->finalize();
    piece.text += stops.feed(detokenizer->take_segment());
    piece.text += stops.flush();
  }
  piece.stopped = stops.stopped();
  if (last) open_.erase(found);
  return piece;
}

}  // namespace mlxlm::gen
