// A golden file of tests/data/parity and the model that it is about. Format: parity/make_goldens.py.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <mlx/array.h>

#include "base/json.h"
#include "model/causal_model.h"

namespace mlxlm::tests {

namespace mx = mlx::core;
namespace fs = std::filesystem;

struct Golden {
  std::string name;
  json info;  // config, dtype, seed, crc32, ...
  weights::Tensors answers;

  std::vector<int> tokens(const std::string& key) const;
  /** float32 [R, V]. */
  std::vector<std::vector<float>> rows(const std::string& key) const;
};

/** Names of all golden files, sorted. */
std::vector<std::string> golden_names();
Golden load_golden(const std::string& name);
/** A golden's name as that of a test. */
std::string test_name(const testing::TestParamInfo<std::string>& info);

/** The same tensors that make_goldens.py gave the reference, through the rules and the quantization that the golden names. */
struct Checkpoint {
  arch::Model description;
  weights::Tensors tensors;
  std::map<std::string, plan::Quant> quant;  // what weights::check found
  weights::LowRanks adapters{};
  bool quantize_activations = false;
};
/** `config` and `info` as in Golden. Throws what the rooms throw. */
Checkpoint make_checkpoint(const json& config, const json& info);
std::unique_ptr<model::CausalModel> make_model(Checkpoint checkpoint);

/** crc32 over the data of all tensors, by sorted name. */
uint32_t checksum(const weights::Tensors& tensors);

/** One row, int32 [1, L]. */
mx::array batch_of(const std::vector<int>& tokens);
/** x [B, L, V] -> float32 rows of sequence b. */
std::vector<std::vector<float>> to_rows(const mx::array& logits, int b = 0);
std::vector<float> last_row(const mx::array& logits, int b = 0);
/** Row r of logits [R, V]. */
std::vector<float> row_of(const mx::array& logits, int r);

/** Largest |a - b| as a part of the spread (max - min) of b; infinite when a value is not finite or lengths differ. */
double difference(const std::vector<float>& a, const std::vector<float>& b);
int argmax(const std::vector<float>& row);
/** How far the best value stands above the second, as a part of the spread. */
double lead(const std::vector<float>& row);

}  // namespace mlxlm::tests
