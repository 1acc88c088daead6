// Position by position: what the functions see of a draft is only what they chose themselves.
#include "gen/callers_choice.h"

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/error.h"

namespace mlxlm::gen {
namespace {

std::vector<float> to_host(const mx::array& row) {
  auto values = mx::contiguous(mx::astype(mx::reshape(row, {-1}), mx::float32));
  mx::eval(values);
  return {values.data<float>(), values.data<float>() + values.size()};
}

int choose_token(const engine::Sampling& sampling, sample::Sampler& sampler, const mx::array& logprobs) {
  if (!sampling.sampler) return mx::array(sampler(logprobs)).item<int>();
  const int token = sampling.sampler(to_host(logprobs)), vocab = logprobs.shape(-1);
  if (token >= 0 && token < vocab) return token;
  throw Error(Code::bad_request, "sampler", fmt::format("chose token {}, wanted 0 to {}", token, vocab - 1));
}

}  // namespace

CallersChoice choose_by_caller(const engine::PlannedRow& row, const engine::Sampling& sampling, const sample::ProcessorOptions& penalties,
                               sample::Sampler& sampler, const std::function<mx::array(const mx::array&)>& masked, const mx::array& logits,
                               bool wants_logprobs) {
  CallersChoice choice;
  auto& verdict = choice.verdict;
  std::vector<mx::array> told;
  auto before = row.history;
  while (true) {
    const int at = verdict.accepted, vocab = logits.shape(1);
    auto one = mx::slice(logits, {at, 0}, {at + 1, vocab});
    if (penalties.any()) one = sample::process(one, before, penalties);
    if (!sampling.processors.empty()) {
      auto values = to_host(one);
      for (const auto& process : sampling.processors) process(before, values);
      one = mx::array(values.data(), {1, vocab}, mx::float32);
    }
    const auto logprobs = sample::log_probabilities(masked(one));
    verdict.token = choose_token(sampling, sampler, logprobs);
    if (wants_logprobs) told.push_back(logprobs);
    if (at == static_cast<int>(row.draft.size()) || verdict.token != row.draft[at]) break;
    ++verdict.accepted;
    before.push_back(verdict.token);
  }
  if (!told.empty()) choice.logprobs = mx::contiguous(mx::astype(mx::concatenate(told, 0), mx::float32));
  return choice;
}

}  // namespace mlxlm::gen
