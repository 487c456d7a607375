#include "tools/kvctl/npy.h"

#include <bit>

#include "libkvshare/core/check.h"

namespace kvshare::kvctl {

static_assert(std::endian::native == std::endian::little, "'<f4' is written as it lies in memory");

std::string NpyHeader(std::int64_t rows, std::int64_t cols) {
  constexpr std::size_t kPrefix = 10;  // magic, version, header length
  std::string dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " +
                     std::to_string(cols) + "), }";
  const std::size_t total = (kPrefix + dict.size() + 1 + 63) / 64 * 64;
  dict.append(total - kPrefix - dict.size() - 1, ' ');
  dict.push_back('\n');
  std::string header("\x93NUMPY\x01\x00", 8);
  header.push_back(static_cast<char>(dict.size() & 0xff));
  header.push_back(static_cast<char>(dict.size() >> 8));
  return header + dict;
}

Result<NpyWriter> NpyWriter::Open(const std::string& path, std::int64_t rows, std::int64_t cols) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) return InvalidArgument(path + ": cannot be written; does its folder exist?");
  NpyWriter writer(path, file, rows * cols);
  const std::string header = NpyHeader(rows, cols);
  if (std::fwrite(header.data(), 1, header.size(), file) != header.size())
    return ResourceExhausted(path + ": cannot be written");
  return writer;
}

Status NpyWriter::Append(std::span<const float> values) {
  left_ -= static_cast<std::int64_t>(values.size());
  KVS_CHECK(left_ >= 0);
  const bool ok = std::fwrite(values.data(), sizeof(float), values.size(), file_.get()) == values.size();
  return ok ? OkStatus() : ResourceExhausted(path_ + ": could not be written; is the disk full?");
}

Status NpyWriter::Close() {
  KVS_CHECK(left_ == 0);
  return std::fclose(file_.release()) == 0 ? OkStatus()
                                           : ResourceExhausted(path_ + ": could not be written; is the disk full?");
}

}  // namespace kvshare::kvctl
