// safetensors: u64 header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <span>
#include <string>

#include "kvshare/status.h"
#include "runtime/dequant.h"

namespace kvshare::runtime {

using TensorMap = std::map<std::string, TensorView, std::less<>>;

// The file's tensors; views point into `file`. Tensors of types we cannot decode are refused by name, since one that is
// needed and one that is not look alike here.
// Returns InvalidArgument naming the tensor and the field (dtype, shape, data_offsets) that is wrong; overlapping
// tensors are refused, gaps are not: no byte of theirs is ever read.
Result<TensorMap> ParseSafetensors(std::span<const std::byte> file);

}  // namespace kvshare::runtime
