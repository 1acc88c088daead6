// Answers two questions at a time, and a third that comes in while they are being answered.
#include <iostream>

#include <mlxlm/batch_generator.h>

int main(int argc, char** argv) try {
  auto model = mlxlm::load(argc > 1 ? argv[1] : "");
  const auto prompt = [&](const std::string& question) { return model.encode(model.chat_prompt(question), false); };

  mlxlm::BatchGeneratorOptions options;
  options.each.max_tokens = 24;
  mlxlm::BatchGenerator batch(model, options);
  batch.insert({prompt("What is the capital of France?"), prompt("Name a color.")});

  std::map<mlxlm::BatchGenerator::Uid, std::string> answers;
  for (int step = 0; batch.has_work(); ++step) {
    if (step == 4) {
      mlxlm::InsertLists lists;
      // A sampler of one's own: the most likely token, as without it.
      lists.samplers.push_back([](std::span<const float> logprobs) {
        int best = 0;
        for (int i = 1; i < static_cast<int>(logprobs.size()); ++i) best = logprobs[i] > logprobs[best] ? i : best;
        return best;
      });
      batch.insert({prompt("Say hello.")}, lists);
    }
    for (const auto& response : batch.next().responses) {
      answers[response.uid] += response.text;
      if (!response.finish_reason.empty()) std::cout << response.uid << ": " << answers[response.uid] << "\n";
    }
  }
  std::cout << batch.stats().generation_tps() << " tokens/s\n";
  return 0;
} catch (const std::exception& e) {
  std::cerr << "error: " << e.what() << "\n";
  return 1;
}
