// Rewrites of checkpoint names and tensors. Reference: the sanitize functions of mlx_lm/models
#include <charconv>
#include <optional>
#include <stdexcept>

#include <mlx/ops.h>

#include "base/error.h"
#include "base/text_util.h"
#include "weights/names.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

using arch::Rule;

/** What `*` and `{e}` of a pattern matched. */
struct Match {
  std::vector<std::string> stars;
  int index = -1;
};

/** Each `*` takes as little as it can. Going back to the last star alone is enough: a longer earlier one never leaves more to match. */
std::optional<Match> match(std::string_view pattern, std::string_view text) {
  struct Star {
    std::size_t begin, length;
  };
  std::vector<Star> stars;
  std::size_t p = 0, t = 0, after_star = 0;
  int index = -1, index_at_star = -1;
  while (p < pattern.size() || t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      stars.push_back({t, 0});
      after_star = ++p;
      index_at_star = index;
      continue;
    }
    if (pattern.substr(p).starts_with("{e}")) {
      constexpr std::size_t most_digits = 9;  // fits an int
      std::size_t end = t;
      while (end < text.size() && end - t < most_digits && text[end] >= '0' && text[end] <= '9') ++end;
      if (end > t) {
        std::from_chars(text.data() + t, text.data() + end, index);
        p += 3;
        t = end;
        continue;
      }
    } else if (p < pattern.size() && t < text.size() && pattern[p] == text[t]) {
      ++p;
      ++t;
      continue;
    }
    if (stars.empty() || ++stars.back().length > text.size() - stars.back().begin) return std::nullopt;
    p = after_star;
    t = stars.back().begin + stars.back().length;
    index = index_at_star;
  }
  Match m;
  m.index = index;
  for (const auto& star : stars) m.stars.emplace_back(text.substr(star.begin, star.length));
  return m;
}

std::string fill(std::string_view pattern, const Match& m) {
  std::string out;
  std::size_t star = 0;
  for (const char c : pattern) {
    if (c == '*')
      out += m.stars.at(star++);
    else
      out += c;
  }
  return out;
}

void drop(Tensors& tensors, const Rule& rule) {
  std::erase_if(tensors, [&](const auto& item) { return glob_match(rule.from, item.first); });
}

/** `to(name)` for every tensor. Two names that become one contradict each other. */
template <class To>
void rename_all(Tensors& tensors, To&& to) {
  Tensors renamed;
  for (const auto& [name, value] : tensors) {
    const std::string target = to(name);
    if (!renamed.emplace(target, value).second)
      throw Error(Code::bad_weights, shown_name(name), "stands for " + shown_name(target) + ", which is there too");
  }
  tensors = std::move(renamed);
}

void rename(Tensors& tensors, const Rule& rule) {
  rename_all(tensors, [&](const std::string& name) {
    const auto m = match(rule.from, name);
    return m ? fill(rule.to, *m) : name;
  });
}

void strip_prefix(Tensors& tensors, const Rule& rule) {
  rename_all(tensors, [&](const std::string& name) { return name.starts_with(rule.from) ? name.substr(rule.from.size()) : name; });
}

void stack(Tensors& tensors, const Rule& rule) {
  std::map<std::string, std::map<int, std::string>> groups;
  for (const auto& [name, value] : tensors) {
    const auto m = match(rule.from, name);
    if (!m || m->index < 0) continue;
    const auto [at, added] = groups[fill(rule.to, *m)].emplace(m->index, name);
    if (!added)
      throw Error(Code::bad_weights, shown_name(name), "is expert " + std::to_string(m->index) + " as is " + shown_name(at->second));
  }
  for (const auto& [target, members] : groups) {
    if (tensors.contains(target)) throw Error(Code::bad_weights, shown_name(target), "stands beside single experts");
    std::vector<mx::array> parts;
    for (const auto& [index, name] : members) {
      if (index != static_cast<int>(parts.size())) {
        throw Error(Code::bad_weights, shown_name(target),
                    "expert " + std::to_string(parts.size()) + " is missing before " + shown_name(name));
      }
      const mx::array& part = tensors.at(name);
      if (!parts.empty() && (part.shape() != parts[0].shape() || part.dtype() != parts[0].dtype())) {
        throw Error(Code::bad_weights, shown_name(name), "has another shape or dtype than expert 0");
      }
      parts.push_back(part);
    }
    tensors.insert_or_assign(target, mx::stack(parts));
    for (const auto& [index, name] : members) tensors.erase(name);
  }
}

void conv_to_nlc(Tensors& tensors, const Rule& rule) {
  for (auto& [name, value] : tensors) {
    if (glob_match(rule.from, name) && value.ndim() == 3 && value.shape(1) == 1 && value.shape(2) != 1) value = mx::moveaxis(value, 2, 1);
  }
}

/** Whether the name or the axes of some tensor show that the checkpoint is as its authors published it. */
bool as_published(const Tensors& tensors, const std::string& sign) {
  for (const auto& [name, value] : tensors) {
    if (match(sign, name) && (value.ndim() != 3 || value.shape(2) != 1)) return true;
  }
  return false;
}

void add_one(Tensors& tensors, const Rule& rule) {
  if (!as_published(tensors, rule.to)) return;
  for (auto& [name, value] : tensors) {
    if (glob_match(rule.from, name) && value.ndim() == 1) value = mx::add(value, mx::array(1.f, value.dtype()));
  }
}

void split_gate_up(Tensors& tensors, const Rule& rule) {
  std::vector<std::pair<std::string, Match>> found;
  for (const auto& [name, value] : tensors) {
    if (auto m = match(rule.from, name)) found.emplace_back(name, std::move(*m));
  }
  for (const auto& [name, m] : found) {
    const mx::array both = tensors.at(name);
    if (both.ndim() != 3 || both.shape(1) % 2 != 0) throw Error(Code::bad_weights, shown_name(name), "wanted three axes, the second even");
    const int half = both.shape(1) / 2;
    tensors.erase(name);
    for (const int part : {0, 1}) {
      std::string to = fill(rule.to, m);
      to.replace(to.find("{part}"), std::string_view("{part}").size(), part == 0 ? "gate_proj" : "up_proj");
      const auto rows = mx::slice(both, {0, part * half, 0}, {both.shape(0), (part + 1) * half, both.shape(2)});
      if (!tensors.emplace(to, mx::contiguous(rows)).second) throw Error(Code::bad_weights, shown_name(name), "stands beside its parts");
    }
  }
}

void swap_axes(Tensors& tensors, const Rule& rule) {
  rename_all(tensors, [&](const std::string& name) {
    const auto m = match(rule.from, name);
    if (!m) return name;
    auto& value = tensors.at(name);
    if (value.ndim() != 3) throw Error(Code::bad_weights, shown_name(name), "wanted three axes");
    value = mx::contiguous(mx::swapaxes(value, 1, 2));
    return fill(rule.to, *m);
  });
}

void multiply(Tensors& tensors, const Rule& rule) {
  if (!as_published(tensors, rule.to)) return;
  for (auto& [name, value] : tensors) {
    if (!glob_match(rule.from, name)) continue;
    if (rule.factors.size() == 1) {
      value = mx::multiply(value, mx::array(rule.factors[0].value, value.dtype()));
      continue;
    }
    int64_t rows = 0;
    for (const auto& factor : rule.factors) rows += factor.rows;
    if (value.ndim() == 0 || value.shape(0) != rows) {
      throw Error(Code::bad_weights, shown_name(name), "wanted " + std::to_string(rows) + " rows");
    }
    std::vector<float> by_row;
    for (const auto& factor : rule.factors) by_row.insert(by_row.end(), factor.rows, factor.value);
    mx::Shape column(value.ndim(), 1);
    column[0] = value.shape(0);
    value = mx::multiply(value, mx::astype(mx::array(by_row.data(), column, mx::float32), value.dtype()));
  }
}

mx::array dequant_fp8(const mx::array& packed, const mx::array& scale_inv, const std::string& name) {
  constexpr int block = 128;
  const auto bad = [&](const char* problem) { throw Error(Code::bad_weights, shown_name(name), problem); };
  if (packed.dtype() != mx::uint8) bad("has inverse scales but is not fp8");
  if (packed.ndim() != 2 || scale_inv.ndim() != 2 || packed.size() == 0) bad("fp8 blocks of other than two axes");
  if (!mx::issubdtype(scale_inv.dtype(), mx::floating)) bad("fp8 scales that are no floats");
  const int m = packed.shape(0), n = packed.shape(1);
  if (m > INT32_MAX - block || n > INT32_MAX - block) bad("fp8 blocks of too large an axis");
  const int down = (block - m % block) % block, right = (block - n % block) % block;
  const int bm = (m + down) / block, bn = (n + right) / block;
  if (scale_inv.shape(0) != bm || scale_inv.shape(1) != bn) bad("fp8 scales do not fit 128x128 blocks");
  auto w = mx::pad(mx::from_fp8(packed, mx::bfloat16), {{0, down}, {0, right}});
  w = mx::reshape(w, {bm, block, bn, block}) * mx::reshape(scale_inv, {bm, 1, bn, 1});
  return mx::astype(mx::slice(mx::reshape(w, {m + down, n + right}), {0, 0}, {m, n}), mx::bfloat16);
}

void dequant_blocks(Tensors& tensors, const Rule& rule) {
  std::vector<std::string> done;
  for (const auto& [name, value] : tensors) {
    constexpr std::string_view suffix = "_scale_inv";
    if (!name.ends_with(suffix)) continue;
    const std::string weight = name.substr(0, name.size() - suffix.size());
    const auto it = tensors.find(weight);
    if (!glob_match(rule.from, weight) || it == tensors.end()) continue;
    it->second = dequant_fp8(it->second, value, weight);
    done.push_back(name);
  }
  for (const auto& name : done) tensors.erase(name);
}

const arch::Mla* mla_of_layer(const arch::Model& model, const std::string& name) {
  const auto m = match("*." + model.layers_at + ".{e}.*", name);
  if (!m || m->index < 0 || m->index >= static_cast<int>(model.layers.size())) return nullptr;
  for (const auto& step : model.layers[m->index]) {
    for (const auto& op : step.ops) {
      if (const auto* mla = std::get_if<arch::Mla>(&op)) return mla;
    }
  }
  return nullptr;
}

void put_quantized(Tensors& tensors, const std::string& path, const mx::array& w, int group_size, int bits) {
  const auto parts = mx::quantize(w, group_size, bits);
  tensors.insert_or_assign(path + ".weight", parts.at(0));
  tensors.insert_or_assign(path + ".scales", parts.at(1));
  tensors.insert_or_assign(path + ".biases", parts.at(2));
}

void absorb_one(Tensors& tensors, const std::string& path, const arch::Mla& mla) {
  const std::string at = path.substr(0, path.size() - std::string_view("kv_b_proj").size());
  mx::array w = tensors.at(path + ".weight");
  int bits = 0, group_size = 0;
  if (const auto scales = tensors.find(path + ".scales"); scales != tensors.end()) {
    const auto biases = tensors.find(path + ".biases");
    if (biases == tensors.end() || w.ndim() != 2 || scales->second.ndim() != 2 || scales->second.shape(1) == 0) {
      throw Error(Code::bad_weights, shown_name(path), "quantized without matching scales and biases");
    }
    const auto whole_bits = int64_t(w.shape(1)) * 32 / mla.kv_lora;
    group_size = mla.kv_lora / scales->second.shape(1);
    if (whole_bits < 2 || whole_bits > 8 || group_size < 1)
      throw Error(Code::bad_weights, shown_name(path), "codes and scales do not fit its shape");
    bits = static_cast<int>(whole_bits);
    w = mx::dequantize(w, scales->second, biases->second, group_size, bits);
  }
  if (w.ndim() != 2 || w.shape(0) != mla.heads * (mla.nope_dim + mla.v_dim) || w.shape(1) != mla.kv_lora) {
    throw Error(Code::bad_weights, shown_name(path) + ".weight",
                "wanted " + std::to_string(mla.heads * (mla.nope_dim + mla.v_dim)) + " rows of " + std::to_string(mla.kv_lora));
  }
  w = mx::reshape(w, {mla.heads, mla.nope_dim + mla.v_dim, mla.kv_lora});
  const auto k = mx::contiguous(mx::swapaxes(mx::slice(w, {0, 0, 0}, {mla.heads, mla.nope_dim, mla.kv_lora}), 1, 2));
  const auto v = mx::contiguous(mx::slice(w, {0, mla.nope_dim, 0}, {mla.heads, mla.nope_dim + mla.v_dim, mla.kv_lora}));
  for (const char* leaf : {".weight", ".scales", ".biases"}) tensors.erase(path + leaf);
  if (bits > 0) {
    put_quantized(tensors, at + "embed_q", k, group_size, bits);
    put_quantized(tensors, at + "unembed_out", v, group_size, bits);
  } else {
    tensors.insert_or_assign(at + "embed_q.weight", k);
    tensors.insert_or_assign(at + "unembed_out.weight", v);
  }
}

void absorb_mla(Tensors& tensors, const arch::Model& model) {
  std::vector<std::string> paths;
  for (const auto& [name, value] : tensors) {
    if (name.ends_with(".kv_b_proj.weight")) paths.push_back(name.substr(0, name.size() - std::string_view(".weight").size()));
  }
  for (const auto& path : paths) {
    if (const auto* mla = mla_of_layer(model, path)) absorb_one(tensors, path, *mla);
  }
}

void apply(Tensors& tensors, const Rule& rule, const arch::Model& model) {
  switch (rule.kind) {
    case Rule::drop:
      return drop(tensors, rule);
    case Rule::rename:
      return rename(tensors, rule);
    case Rule::stack:
      return stack(tensors, rule);
    case Rule::conv_ncl_to_nlc:
      return conv_to_nlc(tensors, rule);
    case Rule::dequant_blocks:
      return dequant_blocks(tensors, rule);
    case Rule::absorb_mla:
      return absorb_mla(tensors, model);
    case Rule::strip_prefix:
      return strip_prefix(tensors, rule);
    case Rule::add_one:
      return add_one(tensors, rule);
    case Rule::split_gate_up:
      return split_gate_up(tensors, rule);
    case Rule::swap_axes:
      return swap_axes(tensors, rule);
    case Rule::multiply:
      return multiply(tensors, rule);
  }
}

}  // namespace

void apply_rules(Tensors& tensors, const arch::Model& model) {
  for (const auto& rule : model.rules) {
    try {
      apply(tensors, rule, model);
    } catch (const std::invalid_argument& e) {  // MLX on shapes that it refuses
      throw Error(Code::bad_weights, "rule for " + rule.from, shown_name(e.what()));
    }
  }
}

}  // namespace mlxlm::weights
