// A typed view of config.json that remembers which keys were read.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace mlxlm::arch {

/** Reader of one JSON object. A missing required key, or a wrong type, throws Error(bad_config):
 *  "config.json: num_hidden_layers: missing, wanted an integer". Integers out of [-2^31, 2^31) throw too.
 *  Numbers are finite, except in lists, where {"__float__": "Infinity"} stands for what JSON cannot say.
 *  JSON null counts as absent. Copies share the record of read keys. */
class Config {
 public:
  /** `where` names the source in messages. */
  explicit Config(json object, std::string where = "config.json");

  int integer(std::string_view key) const;
  int integer(std::string_view key, int fallback) const;
  /** As integer(), and throws unless the value is at least 1 (a size). */
  int positive(std::string_view key) const;
  int positive(std::string_view key, int fallback) const;
  float real(std::string_view key) const;
  float real(std::string_view key, float fallback) const;
  bool flag(std::string_view key, bool fallback) const;
  std::string text(std::string_view key, std::string_view fallback) const;
  std::optional<int> maybe_integer(std::string_view key) const;
  std::optional<float> maybe_real(std::string_view key) const;
  std::vector<int> integers(std::string_view key) const;         // absent = empty
  std::vector<float> reals(std::string_view key) const;          // absent = empty
  std::vector<std::string> strings(std::string_view key) const;  // absent = empty
  bool has(std::string_view key) const;                          // present and not null; counts as read
  /** A nested object as a Config whose reads are recorded under "key.". Absent = an empty one. */
  Config sub(std::string_view key) const;
  /** The same reader (place, record of reads) over another object. */
  Config with_object(json object) const;
  /** Marks keys as knowingly without effect here. */
  void ignore(std::initializer_list<std::string_view> keys) const;

  const json& object() const { return *object_; }
  const std::string& where() const { return where_; }
  /** Keys never asked for, sorted, without those every config carries (architectures, torch_dtype, ...). */
  std::vector<std::string> unread_keys() const;
  /** Throws Error(bad_config): "where: key: got, wanted". */
  [[noreturn]] void fail(std::string_view key, std::string_view problem) const;

 private:
  const json* find(std::string_view key) const;
  std::shared_ptr<const json> object_;
  std::string where_;
  std::string prefix_;
  std::shared_ptr<std::set<std::string>> read_;
};

}  // namespace mlxlm::arch
