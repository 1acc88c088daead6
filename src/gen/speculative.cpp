// Drafts, and going back from them. Reference: mlx_lm/generate.py speculative_generate_step
#include "gen/speculative.h"

#include <algorithm>
#include <climits>
#include <limits>
#include <variant>

#include <fmt/format.h>
#include <mlx/memory.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"
#include "cache/layer_shape.h"
#include "cache/prompt_file.h"
#include "nn/nn.h"

namespace mlxlm::gen {

namespace {

template <class Body>
void for_ops(const arch::Model& model, Body&& body) {
  for (const auto& layer : model.layers) {
    for (const auto& step : layer) {
      for (const auto& op : step.ops) body(op);
    }
  }
}

/** The longest context in which no layer's rotation depends on the length of the call. */
int exact_context(const arch::Model& model) {
  int least = INT_MAX;
  const auto look = [&](const std::optional<arch::Rope>& rope) {
    if (rope && rope->kind == arch::RopeKind::dynamic_ntk) least = std::min(least, rope->max_positions);
  };
  for_ops(model, [&](const arch::Op& op) {
    if (const auto* attention = std::get_if<arch::Attention>(&op)) look(attention->rope);
    if (const auto* latent = std::get_if<arch::Mla>(&op)) look(latent->rope);
  });
  return least;
}

/** The longest call in which each token gets what it would get alone. */
int exact_call(const arch::Model& model) {
  int most = INT_MAX;
  for_ops(model, [&](const arch::Op& op) {
    if (std::holds_alternative<arch::Mla>(op) || std::holds_alternative<arch::Mamba2>(op)) most = nn::stepwise_tokens;
  });
  return most;
}

mx::array row_of_tokens(const std::vector<int>& tokens) {
  return mx::array(tokens.data(), {static_cast<int>(tokens.size())}, mx::int32);
}

uint64_t pair_key(int first, int second) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(first)) << 32) | static_cast<uint32_t>(second);
}

}  // namespace

void evaluate_state(const cache::Caches& caches) {
  std::vector<mx::array> arrays;
  for (const auto& c : caches) {
    if (!c) continue;
    const auto state = c->state();
    arrays.insert(arrays.end(), state.begin(), state.end());
  }
  mx::eval(arrays);
}

void check_same_vocabulary(const text::Tokenizer& target, const text::Tokenizer& draft) {
  const int size = target.vocab_size(), got = draft.vocab_size();
  if (got != size) {
    throw Error(Code::bad_request, "draft model", fmt::format("got a vocabulary of {} tokens, wanted the model's own of {}", got, size));
  }
  constexpr int samples = 2000;
  for (int id = 0; id < size; id += std::max(1, size / samples)) {
    const auto wanted = target.id_to_token(id), token = draft.id_to_token(id);
    if (wanted != token) {
      throw Error(
          Code::bad_request, "draft model",
          fmt::format("token {} is '{}', wanted '{}' as in the model's own vocabulary", id, token.value_or(""), wanted.value_or("")));
    }
  }
}

// ---- Undo -------------------------------------------------------------------------------------------------------------

Undo::Undo(cache::Caches& caches, int tokens, bool wanted) : caches_(caches) {
  if (!wanted) return;
  for (const auto& c : caches) {
    offsets_.push_back(c ? c->offset() : 0);
    copies_.push_back(!c || c->can_rewind(tokens, false) ? nullptr : c->copy());
  }
}

void Undo::back() {
  for (std::size_t i = 0; i < copies_.size(); ++i) {
    if (copies_[i]) {
      caches_[i] = std::move(copies_[i]);
    } else if (caches_[i] && caches_[i]->offset() > offsets_[i]) {
      caches_[i]->rewind(caches_[i]->offset() - offsets_[i]);
    }
  }
}

// ---- Trail -------------------------------------------------------------------------------------------------------------

Trail::Trail(model::CausalModel& model, cache::Caches& caches)
    : model_(model), caches_(caches), exact_context_(exact_context(model.description())), exact_call_(exact_call(model.description())) {}

bool Trail::one_call_agrees(int tokens) const {
  tokens += static_cast<int>(pending_.size());
  if (tokens > exact_call_) return false;
  return std::ranges::all_of(caches_,
                             [&](const auto& c) { return !c || (c->one_call_agrees(tokens) && tokens <= exact_context_ - c->offset()); });
}

void Trail::mark(int tokens, bool one_call) {
  constexpr std::size_t most_pending = nn::stepwise_tokens / 2;  // so few rows more cost a call nearly nothing
  if (pending_.size() > most_pending) settle();
  tokens += static_cast<int>(pending_.size());
  since_.clear();
  copies_.clear();
  marked_ = true;
  redone_ = static_cast<int>(pending_.size());
  if (tokens == 1 && one_call) return;  // it stays in any case
  // Where one cache must go back to the mark, all must: in their case beyond the first token of the call.
  const bool some_copied = std::ranges::any_of(caches_, [&](const auto& c) { return c && !c->can_rewind(tokens, one_call); });
  copies_.resize(caches_.size());
  for (std::size_t i = 0; i < caches_.size(); ++i) {
    if (caches_[i] && !caches_[i]->can_rewind(tokens, one_call && !some_copied)) copies_[i] = caches_[i]->copy();
  }
}

std::vector<int> Trail::take_call(const std::vector<int>& tokens) {
  std::vector<int> all = std::move(pending_);
  pending_.clear();
  all.insert(all.end(), tokens.begin(), tokens.end());
  if (marked_) since_.insert(since_.end(), all.begin(), all.end());
  return all;
}

mx::array Trail::run(const std::vector<int>& tokens, int wanted_rows) {
  const auto all = take_call(tokens);
  return model_.run(row_of_tokens(all), {{static_cast<int>(all.size()), wanted_rows, &caches_}});
}

void Trail::back_to(int count) {
  count += redone_;
  const int ran = static_cast<int>(since_.size()), dropped = ran - count;
  if (!marked_ || dropped < 0) throw Error(Code::internal, "trail", "wanted a mark before the tokens to keep");
  marked_ = false;
  const bool copied = std::ranges::any_of(copies_, [](const auto& c) { return c != nullptr; });
  if (dropped > 0) {
    for (std::size_t i = 0; i < caches_.size(); ++i) {
      if (!caches_[i]) continue;
      if (!copied)
        caches_[i]->rewind(dropped);
      else if (copies_[i])
        caches_[i] = std::move(copies_[i]);
      else
        caches_[i]->rewind(ran);
    }
    if (copied) pending_.assign(since_.begin(), since_.begin() + count);
  }
  copies_.clear();
  since_.clear();
}

void Trail::settle() {
  if (pending_.empty()) return;
  mx::eval(run({}, 0));
  evaluate_state(caches_);
}

// ---- NgramDrafter ------------------------------------------------------------------------------------------------------

void NgramDrafter::index(const std::vector<int>& history) {
  // The last pair is what is looked for: it is indexed when something follows it.
  if (earlier_.empty()) earlier_.push_back(-1);
  for (std::size_t at = earlier_.size(); at + 1 < history.size(); ++at) {
    const auto [found, fresh] = latest_.try_emplace(pair_key(history[at - 1], history[at]), -1);
    earlier_.push_back(found->second);
    found->second = static_cast<int>(at);
  }
}

/** The place whose past agrees longest with that of the end. */
std::optional<int> NgramDrafter::match(const std::vector<int>& history) const {
  constexpr int most_places = 64, longest = 32;
  const int end = static_cast<int>(history.size()) - 1;
  const auto found = latest_.find(pair_key(history[end - 1], history[end]));
  if (found == latest_.end()) return std::nullopt;
  int best = -1, best_length = 0, places = 0;
  for (int at = found->second; at >= 0 && places < most_places && best_length < longest; at = earlier_[at], ++places) {
    int length = 2;
    while (length < longest && length <= at && history[at - length] == history[end - length]) ++length;
    if (length > best_length) {
      best = at;
      best_length = length;
    }
  }
  return best;
}

void NgramDrafter::judge_last(const std::vector<int>& history) {
  if (last_.empty()) return;
  std::size_t accepted = 0;
  while (accepted < last_.size() && last_at_ + accepted < history.size() && history[last_at_ + accepted] == last_[accepted]) ++accepted;
  constexpr int least = 2, most = 256;
  if (accepted == last_.size())
    length_ = std::min(most, std::max(length_, static_cast<int>(accepted) * 2));
  else if (2 * accepted < last_.size())
    length_ = std::max(least, length_ / 2);
  // Where guesses are wrong again and again, they are rarer.
  constexpr int longest_rest = 16;
  misses_ = accepted == 0 ? misses_ + 1 : 0;
  rest_ = misses_ < 4 ? 0 : std::min(longest_rest, 1 << std::min(misses_ - 4, 4));
  last_.clear();
}

Draft NgramDrafter::propose(const std::vector<int>& history, int most) {
  if (history.size() < 3) return {};
  judge_last(history);
  index(history);
  if (rest_ > 0) {
    --rest_;
    return {};
  }
  const auto place = match(history);
  if (!place) return {};
  Draft draft;
  const int count = std::min(most, length_);
  for (int i = 0; i < count; ++i) {
    // Beyond the end what was drafted goes on: a text that repeats itself at once.
    const std::size_t at = static_cast<std::size_t>(*place) + 1 + i;
    draft.tokens.push_back(at < history.size() ? history[at] : draft.tokens[at - history.size()]);
  }
  last_ = draft.tokens;
  last_at_ = history.size();
  return draft;
}

// ---- ModelDrafter ------------------------------------------------------------------------------------------------------

ModelDrafter::ModelDrafter(model::CausalModel& model, int vocab, int max_kv_size_tokens, int prefill_step_tokens, sample::Sampler& sampler,
                           const sample::ProcessorOptions& processors, DraftMemory* memory)
    : model_(model),
      vocab_(vocab),
      prefill_step_tokens_(prefill_step_tokens),
      sampler_(sampler),
      processors_(processors),
      max_kv_size_tokens_(max_kv_size_tokens),
      memory_(memory ? *memory : own_memory_),
      caches_(memory_.caches),
      trail_(model, caches_),
      held_(memory_.held),
      held_surely_(held_.size()) {
  if (caches_.empty()) {
    caches_ = cache::make_caches(model.description(), max_kv_size_tokens);
    held_.clear();
    held_surely_ = 0;
    return;
  }
  cache::check_fits(caches_, model.description());
  if (cache::prompt_tokens(caches_) != static_cast<int>(held_.size())) {
    throw Error(Code::bad_request, "draft memory",
                fmt::format("its caches hold {} tokens, {} were named", cache::prompt_tokens(caches_), held_.size()));
  }
}

ModelDrafter::~ModelDrafter() {
  if (!finished_) memory_ = {};
}

void ModelDrafter::finish() {
  if (held_.size() > held_surely_) trail_.back_to(0);
  held_.resize(held_surely_);
  trail_.settle();
  evaluate_state(caches_);
  finished_ = true;
}

/** What was read earlier stays as far as `history` begins with it. */
void ModelDrafter::keep_common(const std::vector<int>& history) {
  const auto most = std::min(held_.size(), history.size() - 1);
  const auto end = held_.begin() + static_cast<std::ptrdiff_t>(most);
  auto same = static_cast<std::size_t>(std::mismatch(held_.begin(), end, history.begin()).first - held_.begin());
  const auto surplus = static_cast<int>(held_.size() - same);
  if (surplus > 0 && cache::trim(caches_, surplus) != surplus) {
    caches_ = cache::make_caches(model_.description(), max_kv_size_tokens_);
    same = 0;
  }
  held_.resize(same);
  held_surely_ = same;
}

/** Tokens that only the target has become the last one: a draft may be wrong, but must not read outside the embedding. */
std::vector<int> ModelDrafter::own_tokens(const std::vector<int>& tokens) const {
  std::vector<int> own = tokens;
  for (int& token : own) token = std::min(token, model_.description().vocab - 1);
  return own;
}

/** Takes back what did not come to pass; returns what is to be read, at least the last token, whose logits are wanted. */
std::vector<int> ModelDrafter::rejoin(const std::vector<int>& history) {
  if (history.size() <= held_surely_) throw Error(Code::internal, "draft", "wanted a history that has grown");
  std::size_t same = held_surely_;
  const std::size_t most = std::min(held_.size(), history.size() - 1);
  while (same < most && held_[same] == history[same]) ++same;
  if (held_.size() > held_surely_) trail_.back_to(static_cast<int>(same - held_surely_));
  held_.resize(same);
  return {history.begin() + static_cast<std::ptrdiff_t>(same), history.end()};
}

/** Reads up to the history's end, but for the last `left` tokens. */
void ModelDrafter::catch_up(const std::vector<int>& unread, std::size_t left, const std::atomic<bool>* cancel) {
  const auto cancelled = [&] { return cancel != nullptr && cancel->load(std::memory_order_relaxed); };
  const model::StopScope scope(model_, cancel);
  for (std::size_t from = 0; unread.size() - from > left && !cancelled();) {
    const std::size_t to = std::min(unread.size() - (left > 0 ? 1 : 0), from + prefill_step_tokens_);
    const std::vector<int> chunk(unread.begin() + static_cast<std::ptrdiff_t>(from), unread.begin() + static_cast<std::ptrdiff_t>(to));
    Undo undo(caches_, static_cast<int>(chunk.size()), cancel != nullptr);
    mx::eval(trail_.run(own_tokens(chunk), 0));
    if (cancelled()) return undo.back();
    held_.insert(held_.end(), chunk.begin(), chunk.end());
    held_surely_ = held_.size();
    evaluate_state(caches_);
    mx::clear_cache();
    from = to;
  }
}

void ModelDrafter::read(const std::vector<int>& history, const std::atomic<bool>* cancel) {
  keep_common(history);
  catch_up(rejoin(history), 0, cancel);
}

/** Logits [1, V'] as the sampler wants them, over the target's vocabulary. */
mx::array ModelDrafter::scores(mx::array logits, const std::vector<int>& history) const {
  const int own = logits.shape(1);
  if (own > vocab_) logits = mx::slice(logits, {0, 0}, {1, vocab_});
  if (own < vocab_) {
    logits = mx::concatenate({logits, mx::full({1, vocab_ - own}, mx::array(-std::numeric_limits<float>::infinity(), logits.dtype()))}, 1);
  }
  if (processors_.any()) logits = sample::process(logits, history, processors_);
  return sampler_.greedy() ? logits : sample::log_probabilities(logits);
}

/** One draft that is being made. */
struct ModelDrafter::Drawing {
  const Wanted* wanted;
  std::vector<int> next;    // tokens of the next call
  std::vector<int> so_far;  // history and draft
  Draft draft{};
  std::vector<mx::array> probabilities{};
  std::optional<mx::array> token{};        // drawn, not read yet
  std::optional<sample::Sampler> ahead{};  // draws with the random numbers that the target will draw with
};

void ModelDrafter::draw(const mx::array& logits, Drawing& d) {
  const auto row = scores(logits, d.so_far);
  if (sampler_.greedy()) {
    d.token = sampler_(row);
  } else if (sampler_.draws_ahead()) {
    if (!d.ahead) d.ahead = sampler_;
    d.token = (*d.ahead)(row);
  } else {
    d.probabilities.push_back(sampler_.probabilities(row));
    d.token = sampler_.draw(d.probabilities.back());
  }
}

std::vector<Draft> ModelDrafter::propose_together(const std::vector<Wanted>& wanted) {
  std::vector<Drawing> drawings;
  for (const auto& w : wanted) {
    auto& own = *w.drafter;
    auto unread = own.rejoin(*w.history);
    const auto step = static_cast<std::size_t>(own.prefill_step_tokens_);
    if (unread.size() > step) {
      own.catch_up(unread, step, nullptr);
      unread.assign(w.history->begin() + static_cast<std::ptrdiff_t>(own.held_.size()), w.history->end());
    }
    drawings.push_back({&w, std::move(unread), *w.history});
  }
  for (int round = 0;; ++round) {
    std::vector<Drawing*> active;
    std::vector<int> tokens;
    std::vector<model::Segment> segments;
    for (auto& d : drawings) {
      if (d.wanted->most <= round) continue;
      auto& own = *d.wanted->drafter;
      active.push_back(&d);
      const auto call = own.trail_.take_call(own.own_tokens(d.next));
      tokens.insert(tokens.end(), call.begin(), call.end());
      segments.push_back({static_cast<int>(call.size()), 1, &own.caches_});
      own.held_.insert(own.held_.end(), d.next.begin(), d.next.end());
      if (round == 0) own.held_surely_ = own.held_.size();
    }
    if (active.empty()) break;
    auto logits = wanted.front().drafter->model_.run(row_of_tokens(tokens), segments);
    if (round == 0 && std::ranges::any_of(active, [](const Drawing* d) { return d->wanted->most > 1; })) {
      mx::eval(logits);  // what may be copied next is complete
      for (auto* d : active) {
        if (d->wanted->most > 1) d->wanted->drafter->trail_.mark(d->wanted->most - 1, false);
      }
    }
    std::vector<mx::array> drawn;
    for (std::size_t i = 0; i < active.size(); ++i) {
      const int at = static_cast<int>(i);
      active[i]->wanted->drafter->draw(mx::slice(logits, {at, 0}, {at + 1, logits.shape(1)}), *active[i]);
      drawn.push_back(*active[i]->token);
    }
    mx::eval(drawn);
    for (auto* d : active) {
      d->next = {d->token->item<int>()};
      d->draft.tokens.push_back(d->next.front());
      d->so_far.push_back(d->next.front());
    }
  }
  std::vector<Draft> drafts;
  for (auto& d : drawings) {
    if (!d.probabilities.empty()) d.draft.probabilities = mx::concatenate(d.probabilities, 0);
    drafts.push_back(std::move(d.draft));
  }
  return drafts;
}

Draft ModelDrafter::propose(const std::vector<int>& history, int most) {
  return std::move(propose_together({{this, &history, most}}).front());
}

}  // namespace mlxlm::gen
