#include "runtime/safetensors.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "libkvshare/core/status_macros.h"
#include "runtime/json.h"

namespace kvshare::runtime {
namespace {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr std::size_t kMaxDims = 8;

Result<std::vector<std::int64_t>> ParseShape(const Json& entry) {
  const Json* shape = FindField(entry, "shape");
  if (shape == nullptr || !shape->is_array() || shape->size() > kMaxDims) {
    return InvalidArgument("shape must be a list of at most " + std::to_string(kMaxDims) + " sizes");
  }
  std::vector<std::int64_t> dims;
  for (const Json& dim : *shape) {
    if (!dim.is_number_integer() || dim.get<std::int64_t>() < 0) {
      return InvalidArgument("shape holds something that is not a size");
    }
    dims.push_back(dim.get<std::int64_t>());
  }
  return dims;
}

Result<TensorView> ParseEntry(const Json& entry, std::span<const std::byte> data) {
  if (!entry.is_object()) return InvalidArgument("is not described by an object");
  TensorView tensor;
  KVS_ASSIGN_OR_RETURN(const std::string dtype, GetString(entry, "dtype"));
  tensor.type = FindSafetensorsType(dtype);
  if (tensor.type == nullptr) return Unimplemented("dtype '" + dtype + "' is not supported (F32, F16, BF16 are)");
  KVS_ASSIGN_OR_RETURN(tensor.shape, ParseShape(entry));

  const Json* offsets = FindField(entry, "data_offsets");
  if (offsets == nullptr || !offsets->is_array() || offsets->size() != 2 || !(*offsets)[0].is_number_integer() ||
      !(*offsets)[1].is_number_integer()) {
    return InvalidArgument("data_offsets must be two integers");
  }
  const auto begin = (*offsets)[0].get<std::int64_t>(), end = (*offsets)[1].get<std::int64_t>();
  const std::string range = "data_offsets " + std::to_string(begin) + ".." + std::to_string(end);
  if (begin < 0 || end < begin) return InvalidArgument(range + " are not in order");
  if (static_cast<std::uint64_t>(end) > data.size()) {
    return InvalidArgument(range + " reach beyond the " + std::to_string(data.size()) +
                           " data bytes that the file has");
  }
  KVS_ASSIGN_OR_RETURN(const std::uint64_t bytes, TensorBytes(*tensor.type, tensor.shape));
  if (bytes != static_cast<std::uint64_t>(end - begin)) {
    return InvalidArgument("shape " + ShapeText(tensor.shape) + " of " + dtype + " takes " + std::to_string(bytes) +
                           " bytes, but " + range + " give " + std::to_string(end - begin));
  }
  tensor.bytes = data.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(bytes));
  return tensor;
}

}  // namespace

Result<TensorMap> ParseSafetensors(std::span<const std::byte> file) {
  std::uint64_t header_bytes = 0;
  if (file.size() < sizeof header_bytes) {
    return InvalidArgument("truncated: " + std::to_string(file.size()) + " bytes cannot hold a safetensors header");
  }
  std::memcpy(&header_bytes, file.data(), sizeof header_bytes);
  file = file.subspan(sizeof header_bytes);
  if (header_bytes > kMaxHeaderBytes || header_bytes > file.size()) {
    return InvalidArgument("the header's length is given as " + std::to_string(header_bytes) +
                           " bytes, which the file does not have or the format does not allow");
  }
  const auto text = file.first(static_cast<std::size_t>(header_bytes));
  const auto header = ParseJsonObject({reinterpret_cast<const char*>(text.data()), text.size()});
  if (!header.ok()) return header.status().WithContext("header");
  const auto data = file.subspan(text.size());

  TensorMap tensors;
  std::vector<std::tuple<const std::byte*, const std::byte*, std::string_view>> ranges;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") continue;
    auto tensor = ParseEntry(entry, data);
    if (!tensor.ok()) return tensor.status().WithContext("tensor '" + name + "'");
    const auto it = tensors.emplace(name, std::move(*tensor)).first;
    const auto& bytes = it->second.bytes;
    if (!bytes.empty()) ranges.emplace_back(bytes.data(), bytes.data() + bytes.size(), it->first);
  }
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (std::get<0>(ranges[i]) < std::get<1>(ranges[i - 1])) {
      return InvalidArgument("data_offsets of tensors '" + std::string(std::get<2>(ranges[i - 1])) + "' and '" +
                             std::string(std::get<2>(ranges[i])) + "' overlap");
    }
  }
  return tensors;
}

Status CheckEveryByteClaimed(std::span<const std::byte> file, const TensorMap& tensors) {
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), sizeof header_bytes);
  const std::byte* end = file.data() + sizeof header_bytes + header_bytes;
  std::map<const std::byte*, const TensorMap::value_type*> by_place;
  for (const auto& tensor : tensors) {
    if (!tensor.second.bytes.empty()) by_place.emplace(tensor.second.bytes.data(), &tensor);
  }
  for (const auto& [begin, tensor] : by_place) {
    if (begin != end) {
      return InvalidArgument(std::to_string(begin - end) + " bytes before tensor '" + tensor->first +
                             "' belong to no tensor");
    }
    end = begin + tensor->second.bytes.size();
  }
  if (const auto left = file.data() + file.size() - end; left != 0) {
    return InvalidArgument("the file is " + std::to_string(left) + " bytes longer than its tensors");
  }
  return OkStatus();
}

}  // namespace kvshare::runtime
