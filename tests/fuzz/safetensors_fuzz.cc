// A safetensors file of any bytes.
#include "runtime/safetensors.h"
#include "tests/fuzz/seeded.h"
#include "tests/testing/tiny_model.h"

namespace kvshare {
namespace {

std::vector<std::string> Seeds() {
  const std::map<std::string, testing::TinyTensor> tensors = {
      {"a", {{2, 3}, {1, 2, 3, 4, 5, 6}}}, {"b", {{4}, {1, 2, 3, 4}}}, {"c", {{0, 5}, {}}}, {"d", {{}, {7}}}};
  return {testing::SafetensorsBytes(tensors, true), testing::SafetensorsBytes(tensors, false)};
}

}  // namespace
}  // namespace kvshare

KVS_FUZZ_SEEDS(kvshare::Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kvshare;
  const std::vector<std::uint8_t> bytes(data, data + size);
  const auto tensors = runtime::ParseSafetensors(std::as_bytes(std::span(bytes)));
  if (!tensors.ok()) return 0;
  (void)runtime::CheckEveryByteClaimed(std::as_bytes(std::span(bytes)), *tensors);
  std::vector<float> values;
  for (const auto& [name, tensor] : *tensors) {
    if (tensor.shape.size() > 2) continue;
    values.resize(tensor.bytes.size());  // at least as many as there are values
    runtime::DecodeRows(tensor, 0, tensor.rows(), values.data());
  }
  return 0;
}
