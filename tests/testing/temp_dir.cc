#include "tests/testing/temp_dir.h"

#include <stdlib.h>

#include <system_error>

#include "libkvshare/core/check.h"

namespace kvshare::testing {

TempDir::TempDir() {
  std::string name = (std::filesystem::temp_directory_path() / "kvshare-test-XXXXXX").string();
  KVS_CHECK(mkdtemp(name.data()) != nullptr);
  path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace kvshare::testing
