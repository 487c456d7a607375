// NPY version 1.0 (NumPy's NEP 1): a float32 matrix written row block by row block.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>

#include "kvshare/status.h"

namespace kvshare::kvctl {

// The bytes before the data of a float32 [rows, cols] array in C order: a multiple of 64.
std::string NpyHeader(std::int64_t rows, std::int64_t cols);

class NpyWriter {
 public:
  // InvalidArgument when the file cannot be written.
  static Result<NpyWriter> Open(const std::string& path, std::int64_t rows, std::int64_t cols);

  // Any number of whole rows.
  Status Append(std::span<const float> values);
  // ResourceExhausted when the file could not be completed. Requires that all rows were appended.
  Status Close();

 private:
  struct Closer {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  NpyWriter(std::string path, std::FILE* file, std::int64_t left) : path_(std::move(path)), file_(file), left_(left) {}

  std::string path_;
  std::unique_ptr<std::FILE, Closer> file_;
  std::int64_t left_;  // values still to come
};

}  // namespace kvshare::kvctl
