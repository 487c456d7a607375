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
// tensors are refused.
Result<TensorMap> ParseSafetensors(std::span<const std::byte> file);

// The format gives each byte behind the header to a tensor; bytes that no tensor claims, between them or at the end,
// may be what one of them should have. `tensors`: what `file` was parsed to. Apart from ParseSafetensors, because a
// tensor that is missing is worth telling before the hole it leaves. InvalidArgument says where they are.
Status CheckEveryByteClaimed(std::span<const std::byte> file, const TensorMap& tensors);

}  // namespace kvshare::runtime
