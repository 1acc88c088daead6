// Files come whole or not at all, memory ends on the thread that asked, and whoever needs it gets it back.
#include <atomic>
#include <chrono>
#include <thread>

#include <gtest/gtest.h>
#include <unistd.h>

#include "base/files.h"
#include "engine/prefix_writer.h"

namespace mlxlm::engine {
namespace {

namespace fs = std::filesystem;

class PrefixWriterTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("mlxlm-writer-" + std::to_string(::getpid()));
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  /** Whoever ends elsewhere than here is counted. */
  struct Memory {
    explicit Memory(PrefixWriterTest& test, std::string text) : test(test), text(std::move(text)) { ++test.alive_; }
    ~Memory() {
      --test.alive_;
      test.elsewhere_ += std::this_thread::get_id() != test.here_;
    }
    PrefixWriterTest& test;
    std::string text;
  };
  PrefixWriter::Job job(const std::string& name, std::size_t bytes) {
    std::string text(bytes, ' ');
    for (std::size_t i = 0; i < bytes; ++i) text[i] = static_cast<char>('a' + (i * i + bytes) % 23);
    auto memory = std::make_shared<Memory>(*this, std::move(text));
    const std::span<const std::byte> all(reinterpret_cast<const std::byte*>(memory->text.data()), bytes);
    const auto half = bytes / 2;
    return {name, "start of " + name, {all.first(half), {}, all.subspan(half)}, memory, static_cast<int64_t>(bytes)};
  }
  std::string content(const PrefixWriter::Job& job) const {
    auto all = job.start;
    for (const auto& piece : job.rest) all.append(reinterpret_cast<const char*>(piece.data()), piece.size());
    return all;
  }
  std::size_t files() const {
    std::size_t count = 0;
    for (const auto& item : fs::directory_iterator(folder_)) count += item.path().filename() != ".lock";
    return count;
  }

  fs::path folder_;
  std::atomic<int> alive_ = 0, elsewhere_ = 0;
  const std::thread::id here_ = std::this_thread::get_id();
};

TEST_F(PrefixWriterTest, WritesWhatLiesInPieces) {
  std::vector<std::string> wanted;
  {
    PrefixWriter writer(folder_, 1 << 30);
    for (int i = 0; i < 4; ++i) {
      auto one = job("prefix-" + std::to_string(i) + ".safetensors", 1 + 300000u * i);
      wanted.push_back(content(one));
      writer.add(std::move(one));
    }
    writer.finish();
    EXPECT_EQ(writer.held_bytes(), 0);
    EXPECT_EQ(alive_, 0);
    const auto done = writer.take_done();
    ASSERT_EQ(done.size(), 4u);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(done[i].bytes, static_cast<int64_t>(wanted[i].size()));
  }
  for (int i = 0; i < 4; ++i) EXPECT_EQ(read_text_file(folder_ / ("prefix-" + std::to_string(i) + ".safetensors")), wanted[i]);
  EXPECT_EQ(elsewhere_, 0);
}

/** Another process has the folder: nothing can be written, and memory is given back at once all the same. */
TEST_F(PrefixWriterTest, GivesMemoryBack) {
  auto other = std::make_unique<FolderLock>(folder_);
  ASSERT_TRUE(other->held());
  PrefixWriter writer(folder_, 1 << 30);
  for (int i = 0; i < 3; ++i) writer.add(job("prefix-" + std::to_string(i) + ".safetensors", 1000));
  EXPECT_EQ(writer.held_bytes(), 3000);
  writer.shrink_to(2999);
  EXPECT_EQ(writer.held_bytes(), 2000);
  EXPECT_EQ(alive_, 2);
  EXPECT_EQ(writer.take_done().at(0).name, "prefix-2.safetensors") << "the latest";
  const auto start = std::chrono::steady_clock::now();
  writer.shrink_to(0);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1)) << "the lock is waited for for two";
  EXPECT_EQ(writer.held_bytes(), 0);
  EXPECT_EQ(alive_, 0);
  EXPECT_EQ(elsewhere_, 0);
  other.reset();
  writer.add(job("prefix-9.safetensors", 1000));
  writer.finish();
  EXPECT_EQ(files(), 1u) << "it goes on";
}

/** Given up in the middle of a file: nothing of it is left. */
TEST_F(PrefixWriterTest, LeavesNoHalfFile) {
  PrefixWriter writer(folder_, int64_t{1} << 30);
  writer.add(job("prefix-0.safetensors", 64 << 20));
  const auto is_begun = [&] { return fs::exists(folder_ / ("prefix-0.safetensors.tmp" + std::to_string(::getpid()))); };
  for (int i = 0; i < 2000 && !is_begun(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  writer.shrink_to(0);
  EXPECT_EQ(alive_, 0);
  writer.finish();
  const auto done = writer.take_done();
  ASSERT_EQ(done.size(), 1u);
  EXPECT_EQ(done[0].bytes, 0);
  EXPECT_TRUE(done[0].problem.empty());
  EXPECT_EQ(files(), 0u);
}

TEST_F(PrefixWriterTest, FailuresAreTold) {
  PrefixWriter writer(folder_, 1 << 20);
  writer.add(job("prefix-0.safetensors", 2 << 20));
  writer.add(job("no/such/folder", 10));
  writer.add(job("prefix-1.safetensors", 1000));
  writer.finish();
  const auto done = writer.take_done();
  ASSERT_EQ(done.size(), 3u);
  EXPECT_FALSE(done[0].problem.empty());
  EXPECT_FALSE(done[1].problem.empty());
  EXPECT_GT(done[2].bytes, 1000);
  EXPECT_EQ(alive_, 0);
  EXPECT_EQ(elsewhere_, 0);
  EXPECT_EQ(files(), 1u);
}

TEST_F(PrefixWriterTest, TheEndWritesWhatWaits) {
  {
    PrefixWriter writer(folder_, 1 << 30);
    for (int i = 0; i < 3; ++i) writer.add(job("prefix-" + std::to_string(i) + ".safetensors", 1 << 20));
  }
  EXPECT_EQ(files(), 3u);
  EXPECT_EQ(alive_, 0);
}

}  // namespace
}  // namespace mlxlm::engine
