// A tokenizer with one token a byte, for tests that need one.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include <unistd.h>

#include "base/json.h"
#include "base/utf8.h"
#include "text/tokenizer.h"

namespace mlxlm::tests {

constexpr int byte_eos = 257;

/** The tokenizer.json: GPT-2's printable stand-in of each byte is its token; `eos` ends the text. */
inline json byte_tokenizer_json(int eos = byte_eos) {
  json vocab = json::object();
  char32_t extra = 256;
  for (int b = 0; b < 256; ++b) {
    const bool kept = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    std::string name;
    append_utf8(name, kept ? static_cast<char32_t>(b) : extra++);
    vocab[name] = b;
  }
  vocab["Ġunused"] = 256;
  const json level{{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  json end{{"id", eos}, {"content", "<end>"}, {"special", true}};
  for (const char* flag : {"normalized", "lstrip", "rstrip", "single_word"}) end[flag] = false;
  return {{"version", "1.0"},
          {"added_tokens", json::array({end})},
          {"normalizer", nullptr},
          {"pre_tokenizer", level},
          {"post_processor", nullptr},
          {"decoder", level},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", json::array()}}}};
}

/** The files of the tokenizer in a model's folder. */
inline void write_byte_tokenizer(const std::filesystem::path& folder, int eos = byte_eos) {
  std::ofstream(folder / "tokenizer.json") << byte_tokenizer_json(eos).dump();
  std::ofstream(folder / "tokenizer_config.json") << R"({"eos_token": "<end>"})";
}

inline text::Tokenizer byte_tokenizer(int eos = byte_eos) {
  const auto folder = std::filesystem::temp_directory_path() / ("mlxlm-tokenizer-" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  write_byte_tokenizer(folder, eos);
  auto loaded = text::Tokenizer::from_folder(folder, {{"eos_token_id", eos}});
  std::filesystem::remove_all(folder);
  return loaded;
}

}  // namespace mlxlm::tests
