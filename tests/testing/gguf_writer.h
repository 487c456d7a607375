// Writes GGUF files, right ones and wrong ones: the counterpart of runtime/gguf.h for tests.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tests/testing/tiny_model.h"

namespace kvshare::testing {

class GgufWriter {
 public:
  explicit GgufWriter(std::uint32_t version = 3) : version_(version) {}

  void AddString(std::string_view key, std::string_view value);
  void AddU32(std::string_view key, std::uint32_t value);
  void AddF32(std::string_view key, float value);
  void AddBool(std::string_view key, bool value);
  void AddStrings(std::string_view key, const std::vector<std::string>& values);
  void AddInts(std::string_view key, const std::vector<std::int32_t>& values);
  // Bytes after the key's name as they are: a type and a value, or what pretends to be one.
  void AddRaw(std::string_view key, std::string_view bytes);
  // `shape` outermost first; `type` is ggml's number.
  void AddTensor(std::string_view name, const std::vector<std::int64_t>& shape, std::uint32_t type, std::string bytes);

  // The file, tensors aligned to 32 bytes in the order they were added.
  std::string Finish() const;

 private:
  struct Tensor {
    std::string entry;  // up to its offset
    std::string bytes;
  };
  std::uint32_t version_;
  std::uint64_t num_values_ = 0;
  std::string values_;
  std::vector<Tensor> tensors_;
};

// Integers as GGUF and safetensors write them.
std::string LittleEndian32(std::uint32_t value);
std::string LittleEndian64(std::uint64_t value);

// TinyWeights(options) as a GGUF file of F32 tensors with the tiny tokenizer and template: the same model as
// WriteTinyModel's. For llama the rows of q and k stand in llama.cpp's order.
std::string TinyGguf(const TinyModelOptions& options);

}  // namespace kvshare::testing
