// A text file under construction, gzip where its name ends in .gz.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "kvshare/status.h"

namespace kvshare::trace {

class LineFile {
 public:
  // An existing file is replaced.
  static Result<std::unique_ptr<LineFile>> Create(const std::string& path);
  ~LineFile();
  LineFile(const LineFile&) = delete;
  LineFile& operator=(const LineFile&) = delete;

  Status Write(std::string_view text);
  Status Flush();  // what was written is in the file, and a reader can take it from there
  Status Close();  // once; without it the file may be incomplete

 private:
  LineFile(std::string path, void* file) : path_(std::move(path)), file_(file) {}
  Status Failed() const;

  std::string path_;
  void* file_;
};

}  // namespace kvshare::trace
