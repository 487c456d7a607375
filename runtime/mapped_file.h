// A file mapped read-only. A model file must not change while it is mapped: a file cut short under a mapping ends the
// process at the next touch, as with every program that maps its models.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "kvshare/status.h"

namespace kvshare::runtime {

class MappedFile {
 public:
  // NotFound when there is no such file, InvalidArgument when it is not a regular file or cannot be read. An empty file
  // maps to no bytes.
  static Result<std::unique_ptr<MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }

 private:
  MappedFile(std::string path, const std::byte* data, std::size_t size)
      : path_(std::move(path)), data_(data), size_(size) {}

  std::string path_;
  const std::byte* data_;
  std::size_t size_;
};

// The whole of a small text file. NotFound when absent; InvalidArgument when larger than `max_bytes` or unreadable.
Result<std::string> ReadTextFile(const std::string& path, std::size_t max_bytes);

}  // namespace kvshare::runtime
