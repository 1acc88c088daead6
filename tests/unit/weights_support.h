// Files written by hand for the tests of the weights room.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"

namespace mlxlm::tests {

namespace fs = std::filesystem;

/** A folder of its own for each test, removed at the end. */
class TempFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ =
        fs::temp_directory_path() / (std::string("mlxlm_") + info->test_suite_name() + "_" + info->name() + std::to_string(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }
  fs::path write(const std::string& name, const std::string& content) const {
    const auto path = folder_ / name;
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }
  fs::path folder_;
};

template <class T>
std::string bytes_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(T));
}
template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

/** A .safetensors file with any header. */
inline std::string safetensors(const std::string& header, const std::string& data) {
  return bytes_of<uint64_t>(header.size()) + header + data;
}

/** Sanitizers multiply times and keep memory of their own. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif

/** A bound that tells linear from quadratic on any machine. */
inline std::chrono::seconds bound(int seconds) {
  return std::chrono::seconds(sanitized ? 40 * seconds : seconds);
}

/** One line with every part in it, from an Error with this code. */
template <class Act>
void expect_error(Code code, const std::vector<std::string>& parts, Act&& act) {
  try {
    act();
    ADD_FAILURE() << "no error, wanted one with '" << parts.back() << "'";
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_EQ(e.code(), code) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_LT(message.size(), 1000u) << message;
    for (const auto& part : parts) EXPECT_NE(message.find(part), std::string::npos) << "got '" << message << "', wanted '" << part << "'";
  }
}

}  // namespace mlxlm::tests
