// A tokenizer with one token a byte, for tests that need one.
#pragma once

#include <filesystem>
#include <fstream>

#include <unistd.h>

#include "base/utf8.h"
#include "text/tokenizer.h"

namespace mlxlm::tests {

/** GPT-2's printable stand-in of each byte is its token; `eos` ends the text. */
inline text::Tokenizer byte_tokenizer(int eos = 257) {
  json vocab = json::object();
  char32_t extra = 256;
  for (int b = 0; b < 256; ++b) {
    const bool kept = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    std::string name;
    append_utf8(name, kept ? static_cast<char32_t>(b) : extra++);
    vocab[name] = b;
  }
  const json level{{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  const json added{{{"id", eos},
                    {"content", "<end>"},
                    {"special", true},
                    {"normalized", false},
                    {"lstrip", false},
                    {"rstrip", false},
                    {"single_word", false}}};
  const json tokenizer{{"version", "1.0"},
                       {"added_tokens", added},
                       {"normalizer", nullptr},
                       {"pre_tokenizer", level},
                       {"post_processor", nullptr},
                       {"decoder", level},
                       {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", json::array()}}}};
  const auto folder = std::filesystem::temp_directory_path() / ("mlxlm-tokenizer-" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  std::ofstream(folder / "tokenizer.json") << tokenizer.dump();
  std::ofstream(folder / "tokenizer_config.json") << R"({"eos_token": "<end>"})";
  auto loaded = text::Tokenizer::from_folder(folder, {{"eos_token_id", eos}});
  std::filesystem::remove_all(folder);
  return loaded;
}

}  // namespace mlxlm::tests
