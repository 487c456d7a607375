#include "tests/testing/npy.h"

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

namespace kvshare::testing {

Result<NpyMatrix> ReadNpy(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  constexpr std::size_t kPrefix = 10;  // magic, version 1.0, u16 header length
  const auto bad = [&](const char* why) { return InvalidArgument(path.string() + ": " + why); };
  if (bytes.size() < kPrefix || bytes.compare(0, 8, std::string("\x93NUMPY\x01\x00", 8)) != 0)
    return bad("not .npy 1.0");
  std::uint16_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data() + 8, sizeof header_bytes);
  const std::string header = bytes.substr(kPrefix, header_bytes);
  long rows = 0, cols = 0;
  const auto shape = header.find("'shape': (");
  if (header.find("'<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos ||
      shape == std::string::npos || std::sscanf(header.c_str() + shape, "'shape': (%ld, %ld)", &rows, &cols) != 2) {
    return bad("not a float32 matrix");
  }
  NpyMatrix matrix{rows, cols, {}};
  const std::size_t begin = kPrefix + header_bytes, size = bytes.size() - begin;
  if (rows < 0 || cols < 0 || size != static_cast<std::size_t>(rows * cols) * sizeof(float)) return bad("wrong size");
  matrix.values.resize(static_cast<std::size_t>(rows * cols));
  std::memcpy(matrix.values.data(), bytes.data() + begin, size);
  return matrix;
}

}  // namespace kvshare::testing
