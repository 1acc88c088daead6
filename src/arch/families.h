// The builders that the registry knows: config.json -> description, one a family.
#pragma once

#include "arch/pieces.h"

namespace mlxlm::arch {

Model deepseek_v3(const Config& c);
Model falcon_h1(const Config& c);
Model gemma3(const Config& c);  // the vision model's text tower
Model gemma3_text(const Config& c);
Model lfm2(const Config& c);
Model llama(const Config& c);
Model llama4(const Config& c);  // the vision model's text tower
Model llama4_text(const Config& c);
Model nemotron_h(const Config& c);
Model phi3(const Config& c);
Model qwen2(const Config& c);
Model qwen3(const Config& c);
Model qwen3_5(const Config& c);  // the text model of those that also see; with and without experts
Model qwen3_moe(const Config& c);
Model qwen3_next(const Config& c);
Model smollm3(const Config& c);

}  // namespace mlxlm::arch
