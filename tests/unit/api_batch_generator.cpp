// The public BatchGenerator: each sequence as alone, with what it asks for, whenever it comes and goes.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "mlxlm/batch_generate.h"
#include "unit/api_support.h"

namespace mlxlm {
namespace {

using Uid = BatchGenerator::Uid;

class ApiBatch : public Api {
 protected:
  ApiBatch() {
    auto config = tiny_config();
    config["head_dim"] = 32;  // can be quantized
    write(folder / "config.json", config.dump());
    write_weights(folder, config);
    model.emplace(open());
  }

  std::vector<int> tokens(const std::string& text) const { return model->encode(text); }

  /** As generate() answers, the end token included. */
  std::vector<int> alone(const std::string& prompt, GenerateOptions options) {
    std::vector<int> answer;
    stream_generate(*model, prompt, options, [&](const GenerationResponse& r) {
      answer.push_back(r.token);
      return true;
    });
    return answer;
  }
  std::vector<int> alone(const std::string& prompt, int max_tokens) { return alone(prompt, GenerateOptions{.max_tokens = max_tokens}); }

  std::string refusal(BatchGenerator& batch, const std::vector<std::vector<int>>& prompts, const InsertLists& lists) {
    try {
      batch.insert(prompts, lists);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::bad_request) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "was inserted";
    return "";
  }

  std::optional<Model> model;
};

struct Told {
  std::vector<int> tokens;
  std::string text;
  BatchGenerator::Response last;
};

void take(std::vector<BatchGenerator::Response> responses, std::map<Uid, Told>& told) {
  for (auto& r : responses) {
    auto& mine = told[r.uid];
    EXPECT_EQ(mine.last.finish_reason, "") << "a response after the last";
    if (r.token >= 0) mine.tokens.push_back(r.token);
    mine.text += r.text;
    mine.last = std::move(r);
  }
}

std::map<Uid, Told> drain(BatchGenerator& batch) {
  std::map<Uid, Told> told;
  while (batch.has_work()) take(batch.next_generated(), told);
  return told;
}

TEST_F(ApiBatch, SequencesJoinAndLeaveAtAnyStep) {
  BatchGenerator batch(*model);
  std::map<Uid, Told> told;
  const auto first = batch.insert({tokens("hello"), tokens("a much longer prompt than that")}, {.max_tokens = {20, 9}});
  for (int i = 0; i < 4; ++i) take(batch.next_generated(), told);
  const auto late = batch.insert({tokens("late")}, {.max_tokens = {12}});
  take(batch.next_generated(), told);
  const auto gone = batch.insert({tokens("gone")});
  take(batch.next_generated(), told);
  EXPECT_TRUE(batch.remove(gone).empty());
  const auto before = told[gone[0]].tokens.size();
  while (batch.has_work()) take(batch.next_generated(), told);
  EXPECT_TRUE(batch.next_generated().empty());
  EXPECT_EQ(told[gone[0]].tokens.size(), before);
  const std::map<Uid, std::vector<int>> wanted{
      {first[0], alone("hello", 20)}, {first[1], alone("a much longer prompt than that", 9)}, {late[0], alone("late", 12)}};
  for (const auto& [uid, answer] : wanted) {
    EXPECT_EQ(told[uid].tokens, answer);
    EXPECT_EQ(told[uid].last.finish_reason, "length");
    EXPECT_EQ(told[uid].text, model->decode(answer));
  }
}

TEST_F(ApiBatch, ProgressOfPromptsAndSegments) {
  BatchGenerator batch(*model);
  const auto p = tokens("0123456789abcdefghijklmno");
  const auto uid = batch.insert_segments({{{p.begin(), p.begin() + 10}, {}, {p.begin() + 10, p.begin() + 13}, {p.begin() + 13, p.end()}}},
                                         {.max_tokens = {4}})[0];
  std::vector<std::pair<int, int>> progress;
  std::vector<int> ends, answer;
  while (batch.has_work()) {
    const auto [prompts, responses] = batch.next();
    for (const auto& r : prompts) {
      EXPECT_TRUE(r.end_of_segment);
      EXPECT_EQ(r.end_of_prompt, r.processed_tokens == 25);
      EXPECT_EQ(r.total_tokens, 25);
      ends.push_back(r.processed_tokens);
      if (r.end_of_prompt) continue;
      const auto held = batch.extract_cache({uid});  // a snapshot at the end of each segment
      EXPECT_EQ(held.at(uid).tokens, std::vector<int>(p.begin(), p.begin() + r.processed_tokens));
      EXPECT_EQ(held.at(uid).cache.tokens(), r.processed_tokens);
    }
    for (const auto& r : responses) answer.push_back(r.token);
  }
  EXPECT_EQ(ends, (std::vector<int>{10, 13, 25}));
  EXPECT_EQ(answer, alone("0123456789abcdefghijklmno", 4));
}

TEST_F(ApiBatch, CachesGoFromOneToTheNext) {
  const auto whole = alone("once upon a time there", 12);
  BatchGenerator first(*model);
  const auto uid = first.insert({tokens("once upon a time there")}, {.max_tokens = {5}})[0];
  const auto answer = std::move(drain(first)[uid]);
  ASSERT_TRUE(answer.last.prompt_cache);
  auto& cache = *answer.last.prompt_cache;
  auto held = tokens("once upon a time there");
  held.insert(held.end(), whole.begin(), whole.begin() + 4);
  EXPECT_EQ(answer.last.all_tokens, held);
  EXPECT_EQ(cache.tokens(), static_cast<int>(held.size()));

  // With and without its tokens, and twice: it stays as it is.
  BatchGenerator second(*model);
  const std::vector<int> rest{whole[4]};
  const auto uids =
      second.insert({rest, rest, rest}, {.max_tokens = {7, 7, 7}, .caches = {&cache, &cache, &cache}, .all_tokens = {held, {}, held}});
  int total = 0;
  std::map<Uid, Told> told;
  while (second.has_work()) {
    auto [prompts, responses] = second.next();
    for (const auto& p : prompts) total += p.total_tokens;
    take(std::move(responses), told);
  }
  EXPECT_EQ(total, 3);
  for (const auto u : uids) EXPECT_EQ(told[u].tokens, std::vector<int>(whole.begin() + 5, whole.end()));
  EXPECT_EQ(cache.tokens(), static_cast<int>(held.size()));
  held.push_back(whole[4]);
  held.insert(held.end(), whole.begin() + 5, whole.end() - 1);
  EXPECT_EQ(told[uids[0]].last.all_tokens, held);
  EXPECT_EQ(told[uids[1]].last.all_tokens, std::vector<int>(held.end() - 7, held.end()));  // the others are not known
  EXPECT_EQ(told[uids[1]].last.prompt_cache->tokens(), static_cast<int>(held.size()));
}

TEST_F(ApiBatch, RemovalWaitingInThePromptAndDecoding) {
  BatchGenerator batch(*model, {.max_sequences = 1, .prefill_step_size = 4});
  PromptCache cache;
  generate(*model, "before", {.max_tokens = 1, .prompt_cache = &cache});
  const auto uids = batch.insert({tokens("abcdefghij"), tokens("waits"), tokens("waits with a cache"), tokens("the last one")},
                                 {.max_tokens = {5, 5, 5, 5}, .caches = {nullptr, nullptr, &cache, nullptr}});
  batch.next();
  auto held = batch.extract_cache(uids);
  ASSERT_EQ(held.size(), 4u);
  EXPECT_EQ(held.at(uids[0]).tokens, tokens("abcd"));
  EXPECT_EQ(held.at(uids[1]).cache.tokens(), 0);
  EXPECT_TRUE(held.at(uids[1]).tokens.empty());
  EXPECT_EQ(held.at(uids[2]).cache.tokens(), cache.tokens());
  // In the middle of its prompt, and while they wait.
  const auto removed = batch.remove({uids[0], uids[1], uids[2], 77}, true);
  ASSERT_EQ(removed.size(), 3u);
  EXPECT_EQ(removed.at(uids[0]).cache.tokens(), 4);
  EXPECT_EQ(batch.extract_cache(uids).size(), 1u);
  std::map<Uid, Told> told;
  take(batch.next_generated(), told);
  take(batch.next_generated(), told);
  const auto decoding = batch.remove({uids[3]}, true);
  EXPECT_EQ(decoding.at(uids[3]).tokens.size(), tokens("the last one").size() + 1);
  EXPECT_FALSE(batch.has_work());
  EXPECT_EQ(batch.prompt_cache_bytes(), 0);
  EXPECT_EQ(told.size(), 1u);
  // What was taken out goes on elsewhere.
  BatchGenerator other(*model);
  const auto on = other.insert({tokens("efghij")}, {.max_tokens = {5}, .caches = {&removed.at(uids[0]).cache}})[0];
  EXPECT_EQ(drain(other)[on].tokens, alone("abcdefghij", 5));
}

TEST_F(ApiBatch, SettingsOfEachSequence) {
  const auto draft = open();
  BatchGenerator batch(*model, {.each = {.max_tokens = 14, .draft_model = &draft}});
  const GenerateOptions plain{.max_tokens = 14};
  std::vector<GenerateOptions> options(6, plain);
  options[1].temperature = 1.5f;
  options[1].seed = 7;
  options[2].kv_bits = 4;
  options[2].kv_group_size = 32;
  options[2].quantized_kv_start = 12;
  options[3].draft_model = &draft;
  options[4].ngram_draft_tokens = 5;
  options[5].max_kv_size = 16;
  options[5].repetition_penalty = 1.3f;
  std::vector<std::vector<int>> prompts;
  std::vector<std::string> texts;
  for (int i = 0; i < 6; ++i) {
    texts.push_back("number " + std::string(3 + 4 * i, 'x'));
    prompts.push_back(tokens(texts.back()));
  }
  const auto uids = batch.insert(prompts, {.options = options});
  int steps = 0, quantized_tokens = 0, drafted = 0;
  std::map<Uid, Told> told;
  while (batch.has_work()) {
    auto responses = batch.next_generated();
    for (const auto& r : responses) drafted += r.from_draft;
    take(std::move(responses), told);
    if (++steps == 6) {
      // A quantized row can be taken out as well, and be continued.
      auto row = std::move(batch.extract_cache({uids[2]}).at(uids[2]));
      quantized_tokens = row.cache.tokens();
      EXPECT_EQ(quantized_tokens, static_cast<int>(row.tokens.size()));
      BatchGenerator other(*model);
      EXPECT_NE(refusal(other, {{1}}, {.caches = {&row.cache}, .options = {{.kv_bits = 8}}}).find("4 bits"), std::string::npos);
      const auto at = static_cast<std::size_t>(quantized_tokens) - prompts[2].size();
      const auto wanted = alone(texts[2], options[2]);
      const auto on = other.insert({{wanted[at]}}, {.max_tokens = {3}, .caches = {&row.cache}, .all_tokens = {row.tokens}})[0];
      EXPECT_EQ(drain(other)[on].tokens, std::vector<int>(wanted.begin() + at + 1, wanted.begin() + at + 4));
    }
  }
  EXPECT_GT(quantized_tokens, 12);
  EXPECT_GT(drafted, 8);
  EXPECT_EQ(batch.stats().accepted_tokens, drafted);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(told[uids[i]].tokens, alone(texts[i], options[i])) << i;
}

TEST_F(ApiBatch, SamplersAndProcessorsOfTheCaller) {
  BatchGenerator batch(*model, {.each = {.max_tokens = 10}, .stop_tokens = std::vector<std::vector<int>>{}});
  const auto likeliest = [](std::span<const float> logprobs) {
    double sum = 0;
    for (const float l : logprobs) sum += std::exp(double(l));
    EXPECT_NEAR(sum, 1, 1e-4);
    return static_cast<int>(std::ranges::max_element(logprobs) - logprobs.begin());
  };
  std::vector<std::vector<int>> seen;
  const LogitsProcessor no_repeat = [&](std::span<const int> tokens, std::span<float> logits) {
    seen.emplace_back(tokens.begin(), tokens.end());
    EXPECT_EQ(logits.size(), static_cast<std::size_t>(kVocab));
    for (const int t : tokens) logits[t] = -INFINITY;
  };
  const LogitsProcessor only_a = [](std::span<const int>, std::span<float> logits) {
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = i == 'a' ? 0.f : -INFINITY;
  };
  const LogitsProcessor failing = [](std::span<const int> tokens, std::span<float>) {
    if (tokens.size() == 8) throw std::runtime_error("no more");
  };
  const GenerateOptions drafts{.max_tokens = 10, .ngram_draft_tokens = 4}, sampled{.max_tokens = 10, .temperature = 1.f, .seed = 3};
  const std::vector<std::vector<int>> prompts(7, tokens("hello"));
  const auto uids = batch.insert(
      prompts, {.samplers = {nullptr, likeliest, nullptr, nullptr, nullptr, [](std::span<const float>) { return kVocab; }, likeliest},
                .logits_processors = {{}, {}, {no_repeat}, {no_repeat, only_a}, {failing}, {}, {only_a}},
                .options = {drafts, drafts, drafts, sampled, sampled, drafts, drafts}});
  auto told = drain(batch);
  const auto wanted = alone("hello", 10);
  EXPECT_EQ(told[uids[0]].tokens, wanted);
  EXPECT_EQ(told[uids[1]].tokens, wanted);
  auto all = tokens("hello");
  for (const int t : told[uids[2]].tokens) {
    EXPECT_EQ(std::ranges::count(all, t), 0);
    EXPECT_TRUE(std::ranges::find(seen, all) != seen.end());  // it saw the prompt and the answer so far
    all.push_back(t);
  }
  EXPECT_EQ(told[uids[3]].tokens, std::vector<int>(10, 'a'));
  EXPECT_EQ(told[uids[6]].tokens, std::vector<int>(10, 'a'));
  EXPECT_EQ(told[uids[4]].tokens.size(), 3u);
  EXPECT_EQ(told[uids[4]].last.finish_reason, "error");
  EXPECT_NE(told[uids[4]].last.error.find("no more"), std::string::npos);
  EXPECT_TRUE(told[uids[5]].tokens.empty());
  EXPECT_NE(told[uids[5]].last.error.find("chose token 260, wanted 0 to 259"), std::string::npos);
}

/** A sampler of the caller draws once for each token that comes out, in order, also where drafts run. */
TEST_F(ApiBatch, ASamplerIsAskedOnceAToken) {
  const auto draft = open();
  BatchGenerator batch(*model, {.each = {.max_tokens = 16, .draft_model = &draft}, .stop_tokens = std::vector<std::vector<int>>{}});
  std::vector<int> chosen[2];
  const auto third = [&](int k) {
    return [&, k](std::span<const float> logprobs) {  // now the likeliest token, now another
      std::vector<int> order(logprobs.size());
      std::iota(order.begin(), order.end(), 0);
      std::ranges::stable_sort(order, [&](int a, int b) { return logprobs[a] > logprobs[b]; });
      chosen[k].push_back(order[chosen[k].size() % 3 == 2 ? 5 : 0]);
      return chosen[k].back();
    };
  };
  const auto uids =
      batch.insert({tokens("hello"), tokens("hello")},
                   {.samplers = {third(0), third(1)}, .options = {{.max_tokens = 16, .draft_model = &draft}, {.max_tokens = 16}}});
  auto told = drain(batch);
  EXPECT_EQ(told[uids[0]].tokens, told[uids[1]].tokens);
  EXPECT_EQ(told[uids[0]].tokens, chosen[0]);
  EXPECT_GT(batch.stats().accepted_tokens, 5);
}

TEST_F(ApiBatch, MasksAndLogprobs) {
  BatchGenerator batch(*model, {.logprobs = {.chosen = true}});
  const TokenMask counts = [](std::span<const int> answer) {
    std::vector<uint32_t> bits((kVocab + 31) / 32);
    bits[('a' + answer.size()) / 32] |= 1u << ('a' + answer.size()) % 32;
    return bits;
  };
  const auto uids = batch.insert({tokens("count"), tokens("hello")},
                                 {.max_tokens = {5, 3}, .masks = {counts, nullptr}, .logprobs = {{}, {.all = true, .top = 3}}});
  while (batch.has_work()) {
    for (const auto& r : batch.next_generated()) {
      if (r.uid == uids[0]) {
        EXPECT_EQ(r.logprob, 0);
        continue;
      }
      ASSERT_EQ(r.logprobs.size(), static_cast<std::size_t>(kVocab));
      ASSERT_EQ(r.top_logprobs.size(), 3u);
      EXPECT_EQ(r.top_logprobs[0].first, r.token);
      EXPECT_EQ(r.top_logprobs[0].second, r.logprob);
      EXPECT_EQ(r.logprobs[r.token], r.logprob);
    }
  }
  const auto uid = batch.insert({tokens("count")}, {.max_tokens = {5}, .masks = {counts}})[0];
  const auto told = drain(batch);
  EXPECT_EQ(told.at(uid).text, "abcde");
  EXPECT_FLOAT_EQ(told.at(uid).last.logprob, 0);  // of the only one that there is
}

TEST_F(ApiBatch, StopsByTokensAndByTexts) {
  const auto whole = alone("hello", 12);
  const auto text = model->decode(whole);
  GenerateOptions by_text{.max_tokens = 12};
  by_text.stop = {text.substr(text.size() / 2, 2)};
  GenerateOptions at_end{.max_tokens = 12};
  at_end.logit_bias[kEos] = 1e4f;
  BatchGenerator batch(*model);
  const auto uids =
      batch.insert(std::vector<std::vector<int>>(5, tokens("hello")), {.max_tokens = {12, 12, 12, 12, 4},
                                                                       .stop_sequences = {{}, {{whole[3], whole[4]}, {}}, {}, {{kEos}}, {}},
                                                                       .options = {by_text, {}, at_end, at_end, {}}});
  // One of them joins later, and still has text of its own.
  std::map<Uid, Told> told;
  take(batch.next_generated(), told);
  const auto late = batch.insert({tokens("hello")}, {.options = {by_text}})[0];
  while (batch.has_work()) take(batch.next_generated(), told);
  for (const auto uid : {uids[0], late}) {
    EXPECT_EQ(told[uid].text, text.substr(0, text.find(by_text.stop[0])));
    EXPECT_EQ(told[uid].last.finish_reason, "stop");
    ASSERT_TRUE(told[uid].last.prompt_cache);
    EXPECT_EQ(told[uid].last.prompt_cache->tokens(), static_cast<int>(told[uid].last.all_tokens.size()));
  }
  EXPECT_EQ(told[uids[1]].tokens, std::vector<int>(whole.begin(), whole.begin() + 5));
  EXPECT_EQ(told[uids[1]].last.finish_reason, "stop");
  EXPECT_EQ(told[uids[2]].tokens.size(), 12u);  // no stop sequences, so the end token is one as others
  EXPECT_EQ(told[uids[3]].tokens, std::vector<int>{kEos});
  EXPECT_EQ(told[uids[3]].text, "");
  EXPECT_EQ(told[uids[4]].last.finish_reason, "length");
}

TEST_F(ApiBatch, WhatIsRefusedLeavesNothingBehind) {
  BatchGenerator batch(*model);
  const auto good = tokens("hello");
  EXPECT_NE(refusal(batch, {good, {}}, {}).find("prompt"), std::string::npos);
  EXPECT_NE(refusal(batch, {good}, {.max_tokens = {1, 2}}).find("max_tokens: got 2 entries, wanted one for each of 1 prompts"),
            std::string::npos);
  EXPECT_NE(refusal(batch, {good, good}, {.samplers = {nullptr}}).find("samplers"), std::string::npos);
  EXPECT_NE(refusal(batch, {good, good}, {.stop_sequences = {{}}}).find("stop_sequences"), std::string::npos);
  EXPECT_NE(refusal(batch, {good, good}, {.caches = {nullptr}}).find("caches"), std::string::npos);
  refusal(batch, {good}, {.max_tokens = {0}});
  refusal(batch, {good, {kVocab}}, {});
  refusal(batch, {good}, {.all_tokens = {{1, 2}}});  // of no cache
  refusal(batch, {good}, {.options = {{.temperature = -1.f}}});
  PromptCache cache;
  generate(*model, "hi", {.max_tokens = 1, .prompt_cache = &cache});
  refusal(batch, {good}, {.options = {{.prompt_cache = &cache}}});
  refusal(batch, {good}, {.caches = {&cache}, .all_tokens = {{1, 2, 3, 4}}});  // it holds 3
  refusal(batch, {good}, {.caches = {&cache}, .all_tokens = {{1, kVocab, 3}}});
  auto other = tiny_config();
  other["head_dim"] = 16;
  write(folder / "config.json", other.dump());
  write_weights(folder, other);
  auto another = open();
  BatchGenerator elsewhere(another);
  EXPECT_NE(refusal(elsewhere, {good}, {.caches = {&cache}}).find("another model"), std::string::npos);
  EXPECT_FALSE(batch.has_work());
  EXPECT_EQ(batch.prompt_cache_bytes(), 0);
  EXPECT_THROW(BatchGenerator(*model, {.max_sequences = 0}), Error);
  EXPECT_THROW(BatchGenerator(*model, {.each = {.prompt_cache = &cache}}), Error);
  EXPECT_THROW(BatchGenerator(*model, {.prefix_cache_bytes = 1000}), Error);
  BatchGenerator small(*model, {.memory_bytes = 1000});
  try {
    small.insert({good});
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::out_of_memory);
  }
}

TEST_F(ApiBatch, StatsOfAWindowAndMemory) {
  BatchGenerator batch(*model, {.prefix_cache_bytes = 1 << 24, .keep_caches = false});
  batch.insert({tokens("hello")}, {.max_tokens = {5}});
  drain(batch);
  const auto start = batch.stats();
  EXPECT_EQ(start.prompt_tokens, 5);
  EXPECT_EQ(start.generation_tokens, 5);
  EXPECT_EQ(start.decode_tokens, 4);
  EXPECT_EQ(start.generation_steps, 4);
  batch.insert({tokens("something else"), tokens("and more")}, {.max_tokens = {4, 8}});
  batch.next();
  const auto now = batch.memory();
  EXPECT_EQ(now.sequences.size(), 2u);
  EXPECT_GT(now.weight_bytes, 0);
  EXPECT_GT(now.stored_bytes, 0);
  EXPECT_EQ(now.stored_budget_bytes, 1 << 24);
  EXPECT_GE(now.reserved_bytes, now.held_bytes);
  EXPECT_EQ(now.held_bytes, now.sequences[0].held_bytes + now.sequences[1].held_bytes);
  EXPECT_EQ(now.held_bytes, batch.prompt_cache_bytes());
  drain(batch);
  const auto window = batch.stats().since(start);
  EXPECT_EQ(window.prompt_tokens, 22);
  EXPECT_EQ(window.generation_tokens, 12);
  EXPECT_EQ(window.decode_tokens, 10);
  EXPECT_GE(window.generation_steps, 7);
  EXPECT_GT(window.prompt_s, 0);
  EXPECT_GT(window.decode_s, 0);
  EXPECT_GE(window.overhead_s(), 0);
  EXPECT_DOUBLE_EQ(window.prompt_s + window.decode_s + window.overhead_s(), window.wall_s);
  EXPECT_GT(window.decode_tps(), window.generation_tps() / 2);
  batch.insert({tokens("hello")}, {.max_tokens = {5}});
  batch.close();
  EXPECT_FALSE(batch.has_work());
  EXPECT_TRUE(batch.next_generated().empty());
  EXPECT_EQ(batch.stats().generation_tokens, 17);
  EXPECT_EQ(batch.memory().held_bytes, 0);
  EXPECT_THROW(batch.insert({tokens("hello")}), Error);
  batch.close();
  BatchGenerator moved = std::move(batch);
  EXPECT_FALSE(moved.has_work());
}

TEST_F(ApiBatch, BatchGenerateFromCachesAndTokens) {
  const std::string begin = "a prompt that many share, ";
  PromptCache cache;
  generate(*model, begin, {.max_tokens = 1, .prompt_cache = &cache});
  cache.trim(1);
  const int held = cache.tokens();
  std::vector<BatchPrompt> prompts;
  for (int i = 0; i < 5; ++i) {
    prompts.push_back({"number " + std::to_string(i), {.max_tokens = 6}});
    prompts.back().options.prompt_cache = i == 4 ? nullptr : &cache;
    if (i == 2) prompts[i].tokens = tokens(prompts[i].prompt);
    if (i == 2) prompts[i].prompt = "not read";
  }
  prompts[1].options.repetition_penalty = 1.2f;
  prompts[3].options.ngram_draft_tokens = 4;
  BatchOptions options{.max_sequences = 2, .return_prompt_caches = true};
  auto results = batch_generate(*model, prompts, options);
  for (int i = 0; i < 5; ++i) {
    auto& r = results[i];
    EXPECT_EQ(r.error, "");
    if (i == 1) continue;
    EXPECT_EQ(r.tokens, alone((i == 4 ? "" : begin) + "number " + std::to_string(i), 6)) << i;
    ASSERT_TRUE(r.prompt_cache);
    EXPECT_EQ(r.prompt_cache->tokens(), (i == 4 ? 0 : held) + 8 + 5);
  }
  EXPECT_EQ(cache.tokens(), held);
  BatchPrompt on{"", {.max_tokens = 3, .prompt_cache = &*results[0].prompt_cache}, {results[0].tokens.back()}};
  const auto whole = alone(begin + "number 0", 9);
  EXPECT_EQ(batch_generate(*model, std::vector<BatchPrompt>{on})[0].tokens, std::vector<int>(whole.end() - 3, whole.end()));
  EXPECT_EQ(batch_generate(*model, {std::string("hello")})[0].generation_tokens, 128);
  EXPECT_FALSE(batch_generate(*model, {std::string("hello")}, {.max_tokens = 2})[0].prompt_cache);
}

}  // namespace
}  // namespace mlxlm
