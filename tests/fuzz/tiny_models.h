// What the fuzzers of the real engine run on: a tiny model of a family, another one to draft for it, and random numbers.
#pragma once

#include <memory>
#include <random>
#include <string>

#include <gtest/gtest.h>

#include "base/error.h"
#include "cache/quantized.h"
#include "parity/parity_case.h"

namespace mlxlm::tests {

/** The parameter is the name of a golden. */
class TinyModels : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const auto golden = load_golden(GetParam());
    model_ = make_model(make_checkpoint(golden.info.at("config"), golden.info));
    auto other = golden.info;
    other["seed"] = other.at("seed").get<int>() + 1;
    draft_model_ = make_model(make_checkpoint(other.at("config"), other));
    try {
      cache::check_quantization(model_->description(), {4, 32, 0});
    } catch (const Error&) {
      quantizable_ = false;
    }
    vocab_ = model_->description().vocab;
  }
  int pick(int low, int high) { return std::uniform_int_distribution(low, high)(random_); }

  std::mt19937 random_;
  std::unique_ptr<model::CausalModel> model_, draft_model_;
  bool quantizable_ = true;
  int vocab_ = 0;
};

}  // namespace mlxlm::tests
