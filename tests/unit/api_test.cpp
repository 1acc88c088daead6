// The public API on a tiny checkpoint that the test writes: load, encode, generate, stream, and what is said about bad folders.
#include <map>

#include "unit/api_support.h"

namespace mlxlm {
namespace {

TEST_F(Api, EncodesAndDecodes) {
  const auto model = open();
  for (const std::string text : {"", "hello", "a b\n\tc", "h\xc3\xa9llo \xe2\x82\xac"}) {
    const auto tokens = model.encode(text);
    EXPECT_EQ(tokens.size(), text.size());  // one a byte
    EXPECT_EQ(model.decode(tokens), text);
  }
  EXPECT_EQ(model.encode("x<end>").back(), kEos);
}

TEST_F(Api, ChatPromptWithAndWithoutATemplate) {
  EXPECT_EQ(open().chat_prompt("hi", "be brief"), "hi");
  write(folder / "chat_template.jinja",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}");
  const auto model = open();
  EXPECT_EQ(model.chat_prompt("hi"), "[user]hi[assistant]");
  EXPECT_EQ(model.chat_prompt("hi", "be brief"), "[system]be brief[user]hi[assistant]");
}

TEST_F(Api, GeneratesTheSameTextEachTime) {
  auto model = open();
  const GenerateOptions options{.max_tokens = 12};
  const auto text = generate(model, "hello", options);
  EXPECT_FALSE(text.empty());
  EXPECT_EQ(generate(model, "hello", options), text);
  auto again = open();
  EXPECT_EQ(generate(again, "hello", options), text);
  // Chunks of the prompt make no difference.
  auto chunked = options;
  chunked.prefill_step_size = 2;
  EXPECT_EQ(generate(model, "hello", chunked), text);
}

TEST_F(Api, StreamsOneResponseAToken) {
  auto model = open();
  const GenerateOptions options{.max_tokens = 9};
  std::string text;
  std::vector<int> tokens;
  std::vector<GenerationResponse> responses;
  const auto last = stream_generate(model, "hello", options, [&](const GenerationResponse& r) {
    text += r.text;
    tokens.push_back(r.token);
    responses.push_back(r);
    return true;
  });
  ASSERT_EQ(responses.size(), 9u);
  EXPECT_EQ(text, generate(model, "hello", options));
  for (std::size_t i = 0; i < responses.size(); ++i) {
    const auto& r = responses[i];
    EXPECT_EQ(r.prompt_tokens, 5);
    EXPECT_EQ(r.generation_tokens, static_cast<int>(i + 1));
    EXPECT_EQ(r.finish_reason, i + 1 == responses.size() ? "length" : "");
    EXPECT_TRUE(r.token >= 0 && r.token < kVocab);
    EXPECT_LE(r.logprob, 0.f);
    EXPECT_GE(r.logprob, -std::log(float(kVocab)) - 0.1f);  // the best of 260
  }
  EXPECT_EQ(last.finish_reason, "length");
  EXPECT_EQ(last.generation_tokens, 9);
  EXPECT_GT(last.prompt_tps, 0);
  EXPECT_GT(last.generation_tps, 0);
  EXPECT_GT(last.peak_memory_gb, 0);
}

TEST_F(Api, ACallbackEndsIt) {
  auto model = open();
  int calls = 0;
  const auto last = stream_generate(model, "hello", {.max_tokens = 50}, [&](const GenerationResponse&) { return ++calls < 3; });
  EXPECT_EQ(calls, 3);
  EXPECT_EQ(last.generation_tokens, 3);
  EXPECT_NE(last.finish_reason, "length");
}

TEST_F(Api, AnExceptionOfTheCallbackLeavesTheModelUsable) {
  auto model = open();
  const auto text = generate(model, "hello", {.max_tokens = 6});
  EXPECT_THROW(
      stream_generate(model, "hello", {.max_tokens = 6}, [](const GenerationResponse&) -> bool { throw std::runtime_error("mine"); }),
      std::runtime_error);
  EXPECT_EQ(generate(model, "hello", {.max_tokens = 6}), text);
}

TEST_F(Api, EndsAtTheEndToken) {
  auto model = open();
  GenerateOptions options{.max_tokens = 20};
  options.logit_bias[kEos] = 1e4f;
  const auto last = stream_generate(model, "hello", options, [](const GenerationResponse&) { return true; });
  EXPECT_EQ(last.finish_reason, "stop");
  EXPECT_EQ(last.generation_tokens, 1);
  EXPECT_EQ(generate(model, "hello", options), "");
}

TEST_F(Api, EndsAtAStopString) {
  auto model = open();
  GenerateOptions options{.max_tokens = 10};
  options.logit_bias['x'] = 1e4f;
  EXPECT_EQ(generate(model, "hello", options), "xxxxxxxxxx");
  options.stop = {"xxx"};
  EXPECT_EQ(generate(model, "hello", options), "");
  options.logit_bias = {};
  const auto text = generate(model, "hello", {.max_tokens = 10});
  options.stop = {text.substr(text.size() / 2, 1)};
  EXPECT_EQ(generate(model, "hello", options), text.substr(0, text.find(options.stop[0])));
}

TEST_F(Api, ASeedRepeatsASample) {
  auto model = open();
  const auto sample = [&](uint64_t seed) { return generate(model, "hello", {.max_tokens = 24, .temperature = 1.5f, .seed = seed}); };
  EXPECT_EQ(sample(1), sample(1));
  EXPECT_NE(sample(1), sample(2));
  EXPECT_EQ(generate(model, "hello", {.max_tokens = 8, .temperature = 1.5f, .top_k = 1, .seed = 3}),
            generate(model, "hello", {.max_tokens = 8}));
}

TEST_F(Api, ABoundedCacheGoesOn) {
  auto model = open();
  EXPECT_EQ(generate(model, "hello", {.max_tokens = 5, .max_kv_size = 64}), generate(model, "hello", {.max_tokens = 5}));
  const auto last = stream_generate(model, "hello", {.max_tokens = 40, .max_kv_size = 8}, [](const GenerationResponse&) { return true; });
  EXPECT_GE(last.generation_tokens, 1);
}

TEST_F(Api, BadRequestsAreRefused) {
  auto model = open();
  const auto keep_on = [](const GenerationResponse&) { return true; };
  EXPECT_THROW(stream_generate(model, "", {}, keep_on), Error);
  EXPECT_THROW(generate(model, "hello", {.max_tokens = 4, .temperature = -1.f}), Error);
  EXPECT_THROW(generate(model, "hello", {.max_tokens = 4, .temperature = 1.f, .top_k = -1}), Error);
  EXPECT_FALSE(generate(model, "hello", {.max_tokens = 4}).empty());  // and it still works
}

TEST_F(Api, AModelMoves) {
  auto first = open();
  const auto text = generate(first, "hello", {.max_tokens = 4});
  auto second = std::move(first);
  EXPECT_EQ(generate(second, "hello", {.max_tokens = 4}), text);
  second = open();
  EXPECT_EQ(generate(second, "hello", {.max_tokens = 4}), text);
}

// ---- folders -------------------------------------------------------------------------------------------------------

TEST_F(Api, AMissingFolder) {
  const auto path = folder / "no" / "such" / "model";
  EXPECT_NE(refusal(path, Code::not_found).find("no/such/model"), std::string::npos);
}

TEST_F(Api, AnEmptyFolder) {
  fs::create_directories(folder / "empty");
  EXPECT_NE(refusal(folder / "empty", Code::not_found).find("config.json"), std::string::npos);
}

TEST_F(Api, AFolderWithoutWeights) {
  fs::remove(folder / "model.safetensors");
  EXPECT_NE(refusal(folder, Code::not_found).find("safetensors"), std::string::npos);
}

TEST_F(Api, AFolderWithoutATokenizer) {
  fs::remove(folder / "tokenizer.json");
  EXPECT_NE(refusal(folder, Code::not_found).find("tokenizer"), std::string::npos);
}

TEST_F(Api, BadConfigs) {
  for (const std::string text : {"", "{", "[]", "null", "{}", R"({"model_type": 3})", R"({"model_type": "llama"})"}) {
    write(folder / "config.json", text);
    refusal(folder, Code::bad_config);
  }
  auto unknown = tiny_config();
  unknown["model_type"] = "no_such_architecture";
  write(folder / "config.json", unknown.dump());
  EXPECT_NE(refusal(folder, Code::unsupported).find("no_such_architecture"), std::string::npos);
}

TEST_F(Api, BadWeights) {
  const auto size = fs::file_size(folder / "model.safetensors");
  for (const auto shorter : {size - 1, size / 2, uintmax_t{9}, uintmax_t{4}, uintmax_t{0}}) {
    write_weights(folder, tiny_config());
    fs::resize_file(folder / "model.safetensors", shorter);
    EXPECT_NE(refusal(folder, Code::bad_weights).find("model.safetensors"), std::string::npos);
  }
  auto wider = tiny_config();
  wider["intermediate_size"] = 64;
  write_weights(folder, wider);
  EXPECT_NE(refusal(folder, Code::bad_weights).find("mlp."), std::string::npos);
  auto deeper = tiny_config();
  deeper["num_hidden_layers"] = 3;
  write_weights(folder, deeper);  // one layer too many
  EXPECT_NE(refusal(folder, Code::bad_weights).find("layers.2"), std::string::npos);
  write_weights(folder, tiny_config());
  write(folder / "config.json", deeper.dump());  // one layer missing
  EXPECT_NE(refusal(folder, Code::bad_weights).find("layers.2"), std::string::npos);
}

}  // namespace
}  // namespace mlxlm
