// Typed reads of config.json with errors that name the key.
#include "arch/config.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace mlxlm::arch {
namespace {

std::string shown(const json& value) {
  if (value.is_array() || value.is_object()) return (value.is_array() ? "a list of " : "an object of ") + std::to_string(value.size());
  std::string text = to_text(value);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

/** A number, or transformers' spelling of one that JSON lacks: {"__float__": "Infinity"}. */
std::optional<double> number(const json& value) {
  if (value.is_number()) return value.get<double>();
  if (!value.is_object() || value.size() != 1 || !value.contains("__float__")) return std::nullopt;
  const json& tag = value["__float__"];
  if (tag == "Infinity") return std::numeric_limits<double>::infinity();
  if (tag == "-Infinity") return -std::numeric_limits<double>::infinity();
  return std::nullopt;
}

/** The nearest float; what is out of its range becomes the largest one, or infinity if it was infinite. */
float to_float(double value) {
  constexpr double largest = std::numeric_limits<float>::max();
  return static_cast<float>(std::isinf(value) ? value : std::clamp(value, -largest, largest));
}

std::optional<int> whole_number(const json& value) {
  const auto real = number(value);
  if (!real || std::nearbyint(*real) != *real) return std::nullopt;
  if (*real < std::numeric_limits<int>::min() || *real > std::numeric_limits<int>::max()) return std::nullopt;
  return static_cast<int>(*real);
}

/** Keys that every config carries and that mean nothing to inference here. */
const std::set<std::string>& common_keys() {
  static const std::set<std::string> keys = {"architectures",
                                             "torch_dtype",
                                             "dtype",
                                             "transformers_version",
                                             "_name_or_path",
                                             "use_cache",
                                             "bos_token_id",
                                             "eos_token_id",
                                             "pad_token_id",
                                             "quantization",
                                             "quantization_config",
                                             "auto_map",
                                             "initializer_range",
                                             "attention_dropout",
                                             "hidden_dropout",
                                             "model_type",
                                             "pretraining_tp",
                                             "id2label",
                                             "label2id",
                                             "sep_token_id",
                                             "is_encoder_decoder",
                                             "output_attentions",
                                             "output_hidden_states",
                                             "return_dict"};
  return keys;
}

}  // namespace

Config::Config(json object, std::string where)
    : object_(std::make_shared<const json>(std::move(object))), where_(std::move(where)), read_(std::make_shared<std::set<std::string>>()) {
  if (!object_->is_object()) throw Error(Code::bad_config, where_, "got " + shown(*object_) + ", wanted a JSON object");
}

void Config::fail(std::string_view key, std::string_view problem) const {
  throw Error(Code::bad_config, where_ + ": " + prefix_ + std::string(key), problem);
}

const json* Config::find(std::string_view key) const {
  read_->insert(prefix_ + std::string(key));
  const auto it = object_->find(std::string(key));
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

std::optional<int> Config::maybe_integer(std::string_view key) const {
  const json* value = find(key);
  if (value == nullptr) return std::nullopt;
  const auto integer = whole_number(*value);
  if (!integer) fail(key, "got " + shown(*value) + ", wanted an integer" + (value->is_number() ? " of 32 bits" : ""));
  return integer;
}

int Config::integer(std::string_view key) const {
  const auto value = maybe_integer(key);
  if (!value) fail(key, "missing, wanted an integer");
  return *value;
}

int Config::integer(std::string_view key, int fallback) const {
  return maybe_integer(key).value_or(fallback);
}

int Config::positive(std::string_view key) const {
  const int value = integer(key);
  if (value < 1) fail(key, "got " + std::to_string(value) + ", wanted at least 1");
  return value;
}

int Config::positive(std::string_view key, int fallback) const {
  return has(key) ? positive(key) : fallback;
}

std::optional<float> Config::maybe_real(std::string_view key) const {
  const json* value = find(key);
  if (value == nullptr) return std::nullopt;
  const auto real = number(*value);
  if (!real || !std::isfinite(*real)) fail(key, "got " + shown(*value) + ", wanted a finite number");
  return to_float(*real);
}

float Config::real(std::string_view key) const {
  const auto value = maybe_real(key);
  if (!value) fail(key, "missing, wanted a number");
  return *value;
}

float Config::real(std::string_view key, float fallback) const {
  return maybe_real(key).value_or(fallback);
}

bool Config::flag(std::string_view key, bool fallback) const {
  const json* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) fail(key, "got " + shown(*value) + ", wanted true or false");
  return value->get<bool>();
}

std::string Config::text(std::string_view key, std::string_view fallback) const {
  const json* value = find(key);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) fail(key, "got " + shown(*value) + ", wanted a string");
  return value->get<std::string>();
}

std::vector<int> Config::integers(std::string_view key) const {
  const json* value = find(key);
  std::vector<int> list;
  if (value == nullptr) return list;
  if (!value->is_array()) fail(key, "got " + shown(*value) + ", wanted a list of integers");
  for (const auto& item : *value) {
    const auto integer = whole_number(item);
    if (!integer) fail(key, "got " + shown(item) + " in the list, wanted an integer");
    list.push_back(*integer);
  }
  return list;
}

std::vector<float> Config::reals(std::string_view key) const {
  const json* value = find(key);
  std::vector<float> list;
  if (value == nullptr) return list;
  if (!value->is_array()) fail(key, "got " + shown(*value) + ", wanted a list of numbers");
  for (const auto& item : *value) {
    const auto real = number(item);
    if (!real || std::isnan(*real)) fail(key, "got " + shown(item) + " in the list, wanted a number");
    list.push_back(to_float(*real));
  }
  return list;
}

std::vector<std::string> Config::strings(std::string_view key) const {
  const json* value = find(key);
  std::vector<std::string> list;
  if (value == nullptr) return list;
  if (!value->is_array()) fail(key, "got " + shown(*value) + ", wanted a list of strings");
  for (const auto& item : *value) {
    if (!item.is_string()) fail(key, "got " + shown(item) + " in the list, wanted a string");
    list.push_back(item.get<std::string>());
  }
  return list;
}

bool Config::has(std::string_view key) const {
  return find(key) != nullptr;
}

Config Config::sub(std::string_view key) const {
  const json* value = find(key);
  if (value != nullptr && !value->is_object()) fail(key, "got " + shown(*value) + ", wanted an object");
  Config nested(value == nullptr ? json::object() : *value, where_);
  nested.prefix_ = prefix_ + std::string(key) + ".";
  nested.read_ = read_;
  return nested;
}

Config Config::with_object(json object) const {
  Config other(std::move(object), where_);
  other.prefix_ = prefix_;
  other.read_ = read_;
  return other;
}

void Config::ignore(std::initializer_list<std::string_view> keys) const {
  for (const auto key : keys) read_->insert(prefix_ + std::string(key));
}

std::vector<std::string> Config::unread_keys() const {
  std::set<std::string> unread;
  for (const auto& [key, value] : object_->items()) {
    if (value.is_null()) continue;  // as good as absent
    if (!read_->contains(prefix_ + key)) {
      if (!common_keys().contains(key)) unread.insert(prefix_ + key);
      continue;
    }
    const std::string below = prefix_ + key + ".";
    const auto first = read_->lower_bound(below);
    if (!value.is_object() || first == read_->end() || !first->starts_with(below)) continue;
    for (auto& inner : sub(key).unread_keys()) unread.insert(std::move(inner));
  }
  return {unread.begin(), unread.end()};
}

}  // namespace mlxlm::arch
