// Loads a model, asks it one question and prints the answer as it comes.
#include <iostream>

#include <mlxlm/mlxlm.h>

int main(int argc, char** argv) try {
  auto model = mlxlm::load(argc > 1 ? argv[1] : "");  // a folder, a .gguf file, org/name, or "" = the default model
  const auto prompt = model.chat_prompt(argc > 2 ? argv[2] : "Why is the sky blue?");

  mlxlm::GenerateOptions options;
  options.max_tokens = 64;
  const auto last = mlxlm::stream_generate(model, prompt, options, [](const mlxlm::GenerationResponse& piece) {
    std::cout << piece.text << std::flush;
    return true;  // false stops
  });
  std::cout << "\n" << last.generation_tps << " tokens/s\n";
  return 0;
} catch (const std::exception& e) {
  std::cerr << "error: " << e.what() << "\n";
  return 1;
}
