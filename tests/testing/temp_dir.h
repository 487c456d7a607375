// A directory of a test's own, removed with the object.
#pragma once

#include <filesystem>
#include <string>

namespace kvshare::testing {

class TempDir {
 public:
  // Ends the program when the system's temporary directory cannot be written: no test can do without.
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::string File(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

}  // namespace kvshare::testing
