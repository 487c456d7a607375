// GGUF (version 2 and 3, little-endian): typed key-value metadata, a table of tensors, then their bytes
// (github.com/ggml-org/ggml, docs/gguf.md). This reader knows the container only; gguf_model.cc knows what the keys of
// a language model mean.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"
#include "runtime/dequant.h"

namespace kvshare::runtime {

// One metadata value, still in the file. Invariant: `bytes` holds `count` whole values of `type`.
struct GgufValue {
  enum class Type : std::uint32_t {
    kU8 = 0,
    kI8 = 1,
    kU16 = 2,
    kI16 = 3,
    kU32 = 4,
    kI32 = 5,
    kF32 = 6,
    kBool = 7,
    kString = 8,
    kArray = 9,
    kU64 = 10,
    kI64 = 11,
    kF64 = 12
  };
  Type type = Type::kU8;  // of the element where is_array
  bool is_array = false;
  std::uint64_t count = 1;
  std::span<const std::byte> bytes;
};

// Views into the file's bytes, which must outlive it.
class Gguf {
 public:
  // InvalidArgument names what is truncated, out of bounds, duplicate or of an unknown kind; Unimplemented another
  // version or byte order, or a tensor type we cannot decode. Nothing is allocated by a count that the file claims
  // and does not hold.
  static Result<Gguf> Parse(std::span<const std::byte> file);

  bool Has(std::string_view key) const { return values_.find(key) != values_.end(); }

  // InvalidArgument when the key is absent (unless there is a fallback), of another type, or out of range; every
  // message names the key. Integers of any width are read as one kind, floats likewise.
  Result<std::int64_t> GetInt(std::string_view key, std::int64_t lo, std::int64_t hi,
                              std::optional<std::int64_t> fallback = std::nullopt) const;
  Result<double> GetFloat(std::string_view key, std::optional<double> fallback = std::nullopt) const;
  Result<bool> GetBool(std::string_view key, bool fallback) const;
  Result<std::string> GetString(std::string_view key, std::optional<std::string> fallback = std::nullopt) const;
  Result<std::vector<std::string_view>> GetStrings(std::string_view key) const;
  Result<std::vector<std::int64_t>> GetInts(std::string_view key) const;

  // By their names in the file, with dimensions outermost first.
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }

 private:
  Result<const GgufValue*> Find(std::string_view key, bool is_array) const;

  std::map<std::string, GgufValue, std::less<>> values_;
  std::map<std::string, TensorView, std::less<>> tensors_;
};

}  // namespace kvshare::runtime
