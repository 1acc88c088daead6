// Names that become paths and URLs, and the lookup in a cache folder.
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>
#include <unistd.h>

#include "base/error.h"
#include "hub/default_model.h"
#include "hub/hub.h"
#include "hub/layout.h"

namespace {

using namespace mlxlm::hub;
namespace fs = std::filesystem;

TEST(Names, Repositories) {
  for (const char* good : {"mlx-community/Llama-3.2-3B-Instruct-4bit", "a/b", "Qwen/Qwen3_0.6B"}) EXPECT_TRUE(is_repo_name(good)) << good;
  for (const char* bad :
       {"", "/", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/b..c", "-a/b", ".a/b", "a b/c", "a/b\n", "a/b?c", "a/b%2f", "a--b/c"}) {
    EXPECT_FALSE(is_repo_name(bad)) << bad;
  }
  EXPECT_FALSE(is_repo_name("a/" + std::string(97, 'b')));
}

TEST(Names, FilesStayInside) {
  for (const char* good : {"config.json", "original/params.json", "a b.json", "..a.json"}) EXPECT_TRUE(is_safe_file(good)) << good;
  for (const char* bad : {"", "/a", "../a", "a/../b", "a/..", "a//b", "./a", "a\\b", "a/", "a\nb"}) EXPECT_FALSE(is_safe_file(bad)) << bad;
  EXPECT_TRUE(is_revision("refs/pr/1"));
  EXPECT_FALSE(is_revision("../main"));
  EXPECT_FALSE(is_revision("a b"));
}

TEST(Names, UrlPath) {
  EXPECT_EQ(url_path("a b/ü.json"), "a%20b/%C3%BC.json");
}

class Cache : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("mlxlm-hub-" + std::to_string(::getpid()));
    fs::remove_all(folder_);
    ::setenv("HF_HUB_CACHE", folder_.c_str(), 1);
    ::setenv("HF_HUB_OFFLINE", "1", 1);
    ::unsetenv("MLXLM_DEFAULT_MODEL");
  }
  void TearDown() override {
    fs::remove_all(folder_);
    ::unsetenv("HF_HUB_CACHE");
    ::unsetenv("HF_HUB_OFFLINE");
  }
  void write(const std::string& name, const std::string& text) {
    const auto path = folder_ / "models--acme--tiny" / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  fs::path folder_;
};

TEST_F(Cache, FindsCompleteSnapshotsOnly) {
  EXPECT_FALSE(find_cached("acme/tiny"));
  write("refs/main", "abc\n");
  write("snapshots/abc/config.json", "{}");
  write("snapshots/abc/tokenizer.json", "{}");
  EXPECT_FALSE(find_cached("acme/tiny"));
  write("snapshots/abc/model-00001-of-00002.safetensors", "");
  EXPECT_TRUE(find_cached("acme/tiny"));
  write("snapshots/abc/model.safetensors.index.json",
        R"({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})");
  EXPECT_FALSE(find_cached("acme/tiny"));
  write("snapshots/abc/model-00002-of-00002.safetensors", "");
  EXPECT_EQ(find_cached("acme/tiny"), folder_ / "models--acme--tiny" / "snapshots" / "abc");
  EXPECT_EQ(find_cached("acme/tiny", "abc"), find_cached("acme/tiny"));
  EXPECT_EQ(resolve("acme/tiny"), *find_cached("acme/tiny"));
  EXPECT_FALSE(find_cached("acme/tiny", "other"));
}

TEST_F(Cache, HostileReferences) {
  write("refs/main", "../../../../etc");
  EXPECT_FALSE(find_cached("acme/tiny"));
}

TEST_F(Cache, ErrorsNameTheModel) {
  for (const char* name : {"acme/none", "./none", "/no/such/folder", "none", "a/b/c", "../..x/y", ""}) {
    try {
      resolve(name);
      FAIL() << name;
    } catch (const mlxlm::Error& e) {
      EXPECT_EQ(e.code(), mlxlm::Code::not_found);
      EXPECT_NE(std::string(e.what()).find(name), std::string::npos) << e.what();
    }
  }
}

TEST_F(Cache, TheDefaultModelCanBeNamed) {
  fs::create_directories(folder_);
  ::setenv("MLXLM_DEFAULT_MODEL", folder_.c_str(), 1);
  EXPECT_EQ(resolve_default(), folder_);
  ::setenv("MLXLM_DEFAULT_MODEL", "/no/such/file.gguf", 1);
  EXPECT_THROW(resolve_default(), mlxlm::Error);
  ::unsetenv("MLXLM_DEFAULT_MODEL");
}

}  // namespace
