// numpy's .npy files of float32 matrices: what transformers' logits are kept in.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "kvshare/status.h"

namespace kvshare::testing {

struct NpyMatrix {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<float> values;
};

// A little-endian, C-ordered float32 array of two dimensions; InvalidArgument for any other.
Result<NpyMatrix> ReadNpy(const std::filesystem::path& path);

}  // namespace kvshare::testing
