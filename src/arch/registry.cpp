// The table of architectures, and the checks that every description passes.
#include "arch/registry.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "arch/families.h"
#include "base/error.h"
#include "base/text_util.h"
#include "base/utf8.h"

namespace mlxlm::arch {
namespace {

struct Entry {
  std::string_view name;
  Build build;
};

// Sorted by name. Names that mlx_lm remaps (MODEL_REMAPPING in mlx_lm/utils.py) stand here beside their target.
constexpr Entry table[] = {
    {"deepseek_v3", deepseek_v3},
    {"falcon_h1", falcon_h1},
    {"gemma3", gemma3},
    {"gemma3_text", gemma3_text},
    {"iquestcoder", llama},
    {"joyai_llm_flash", deepseek_v3},
    {"kimi_k2", deepseek_v3},
    {"lfm2", lfm2},
    {"llama", llama},
    {"llama4", llama4},
    {"llama4_text", llama4_text},
    {"mistral", llama},
    {"nemotron_h", nemotron_h},
    {"phi3", phi3},
    {"qwen2", qwen2},
    {"qwen3", qwen3},
    {"qwen3_5", qwen3_5},
    {"qwen3_5_moe", qwen3_5},
    {"qwen3_moe", qwen3_moe},
    {"qwen3_next", qwen3_next},
    {"smollm3", smollm3},
    {"xverse", llama},
};

static_assert(std::ranges::is_sorted(table, {}, &Entry::name));

/** Throws for what no checkpoint can mean, and for sizes whose products leave the integers that later rooms compute with. */
class Check {
 public:
  Check(const Config& c, const Model& m) : c_(c), width_(m.width) {
    size("vocab_size", m.vocab, 1 << 26);
    size("hidden_size", m.width, max_hidden);
    count(m.vocab, m.width);
  }

  void operator()(const Attention& a) {
    heads(a.heads, a.head_dim);
    if (a.kv_heads < 1 || a.heads % a.kv_heads != 0) {
      c_.fail("num_key_value_heads", got(a.kv_heads) + ", wanted a divisor of " + std::to_string(a.heads) + " heads");
    }
    if (a.rope) rotation(*a.rope, a.head_dim);
    if (a.chunk) size("attention_chunk_size", *a.chunk, 1 << 30);
    if (!std::isfinite(a.temperature)) c_.fail("attn_scale", "wanted a finite number");
    count(width_, 4.0 * a.heads * a.head_dim);
  }
  void operator()(const Mla& a) {
    heads(a.heads, a.nope_dim);
    size("v_head_dim", a.v_dim, max_head_dim);
    size("kv_lora_rank", a.kv_lora, max_hidden);
    if (a.q_lora != 0) size("q_lora_rank", a.q_lora, max_hidden);
    if (a.rope) rotation(*a.rope, a.rope_dim);
    count(double(width_) + a.q_lora + a.kv_lora, double(a.heads) * (a.nope_dim + a.rope_dim + a.v_dim));
  }
  void operator()(const Glu& f) { feed_forward("intermediate_size", f.hidden); }
  void operator()(const Mlp& f) { feed_forward("intermediate_size", f.hidden); }
  void operator()(const Moe& f) {
    size("num_experts", f.experts, 1 << 16);
    size("moe_intermediate_size", f.hidden, max_hidden);
    if (f.shared_hidden != 0) feed_forward("n_shared_experts", f.shared_hidden);
    if (f.latent != 0) size("moe_latent_size", f.latent, max_hidden);
    if (f.top_k < 1 || f.top_k > f.experts) {
      c_.fail("num_experts_per_tok", got(f.top_k) + ", wanted 1 to " + std::to_string(f.experts) + " experts");
    }
    groups(f);
    count(f.experts, 3.0 * f.hidden * (f.latent != 0 ? f.latent : width_));
  }
  void operator()(const Mamba2& f) {
    size("mamba_num_heads", f.heads, max_heads);
    size("mamba_head_dim", f.head_dim, max_head_dim);
    size("ssm_state_size", f.state, max_head_dim);
    size("conv_kernel", f.conv, 1024);
    if (f.groups < 1 || f.heads % f.groups != 0) {
      c_.fail("n_groups", got(f.groups) + ", wanted a divisor of " + std::to_string(f.heads) + " heads");
    }
    count(width_, 3.0 * f.heads * f.head_dim + 2.0 * f.groups * f.state);
  }
  void operator()(const ShortConv& f) {
    taps("conv_L_cache", f.conv);
    count(width_, 4.0 * f.width);
  }
  void operator()(const GatedDelta& f) {
    size("linear_num_key_heads", f.key_heads, max_heads);
    size("linear_num_value_heads", f.value_heads, max_heads);
    size("linear_key_head_dim", f.key_dim, max_head_dim);
    size("linear_value_head_dim", f.value_dim, max_head_dim);
    taps("linear_conv_kernel_dim", f.conv);
    if (f.value_heads % f.key_heads != 0) {
      c_.fail("linear_num_value_heads", got(f.value_heads) + ", wanted a multiple of " + std::to_string(f.key_heads) + " key heads");
    }
    count(width_, 2.0 * f.key_heads * f.key_dim + 3.0 * f.value_heads * f.value_dim);
  }

 private:
  static std::string got(int value) { return "got " + std::to_string(value); }
  void size(std::string_view key, int value, int most) const {
    if (value < 1 || value > most) c_.fail(key, got(value) + ", wanted 1 to " + std::to_string(most));
  }
  void heads(int heads, int head_dim) const {
    size("num_attention_heads", heads, max_heads);
    size("head_dim", head_dim, max_head_dim);
  }
  /** One tap would leave nothing to remember, which the caches of the reference cannot hold. */
  void taps(std::string_view key, int value) const {
    if (value < 2 || value > 1024) c_.fail(key, got(value) + ", wanted 2 to 1024");
  }
  void feed_forward(std::string_view key, int hidden) {
    size(key, hidden, 16 * max_hidden);
    count(width_, 3.0 * hidden);
  }
  void rotation(const Rope& r, int head_dim) const {
    if (r.dims < 2 || r.dims % 2 != 0 || r.dims > head_dim) {
      c_.fail("head_dim", "got " + std::to_string(r.dims) + " rotated of " + std::to_string(head_dim) + ", wanted an even part of them");
    }
  }
  void groups(const Moe& f) const {
    if (f.groups < 1 || f.experts % f.groups != 0 || (f.groups > 1 && f.experts / f.groups < 2)) {
      c_.fail("n_group",
              got(f.groups) + ", wanted a divisor of " + std::to_string(f.experts) + " experts that leaves groups of two or more");
    }
    if (f.groups_kept < 1 || f.groups_kept > f.groups || int64_t(f.groups_kept) * (f.experts / f.groups) < f.top_k) {
      c_.fail("topk_group", got(f.groups_kept) + " of " + std::to_string(f.groups) + " groups, wanted enough for " +
                                std::to_string(f.top_k) + " experts");
    }
  }
  /** A bound on all parameters together. */
  void count(double a, double b) {
    constexpr double most = 1e15;
    parameters_ += a * b;
    if (parameters_ > most) throw Error(Code::bad_config, c_.where(), "the sizes give more than 10^15 parameters");
  }

  const Config& c_;
  int width_;
  double parameters_ = 0;
};

void check(const Config& c, const Model& m) {
  Check check_op(c, m);
  if (m.layers.empty()) c.fail("num_hidden_layers", "gives no layers");
  for (const auto& layer : m.layers) {
    for (const auto& step : layer) {
      for (const auto& op : step.ops) std::visit(check_op, op);
    }
  }
}

std::string shortened(const std::string& name) {
  return name.size() <= 60 ? name : to_valid_utf8(name.substr(0, 57)) + "...";
}

}  // namespace

Model build(const Config& config) {
  const std::string type = config.text("model_type", "");
  if (type.empty()) config.fail("model_type", "missing, wanted the name of an architecture");
  if (config.has("model_file")) {
    throw Error(Code::unsupported, config.where(), "model_file: got Python code of an own architecture, which only mlx_lm can run");
  }
  const auto* entry = std::ranges::lower_bound(table, type, {}, &Entry::name);
  if (entry == std::end(table) || entry->name != type) {
    const auto near = nearest_names(type, architectures());
    throw Error(Code::unsupported, config.where() + ": model_type: got '" + shortened(type) + "', no such architecture; " +
                                       (near.empty() ? "known: " + join(architectures()) : "nearest: " + join(near)));
  }
  Model m = entry->build(config);
  m.model_type = type;
  check(config, m);
  return m;
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (const auto& entry : table) names.emplace_back(entry.name);
  return names;
}

}  // namespace mlxlm::arch
