// How saved records are written and read: values as they lie in memory, little-endian, a checksum at the end.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libkvshare/core/hash.h"

namespace kvshare::anchors {

static_assert(std::endian::native == std::endian::little, "values are written as they lie in memory");

class ByteWriter {
 public:
  template <typename T>
  void Put(const T& value) {
    Append(&value, sizeof value);
  }
  void Text(std::string_view text) {
    Put(static_cast<std::uint32_t>(text.size()));
    Append(text.data(), text.size());
  }
  template <typename T>
  void Values(const std::vector<T>& values) {
    Append(values.data(), values.size() * sizeof(T));
  }
  void Reserve(std::size_t bytes) { bytes_.reserve(bytes); }
  // With the checksum of all before it.
  std::vector<std::byte> Finish() {
    Put(PlainSha256(bytes_));
    return std::move(bytes_);
  }

 private:
  void Append(const void* data, std::size_t size) {
    const auto* const from = static_cast<const std::byte*>(data);
    bytes_.insert(bytes_.end(), from, from + size);
  }
  std::vector<std::byte> bytes_;
};

// Reads within bounds; after the first failure all that it gives is zero, and ok() is false.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <typename T>
  T Get() {
    T value{};
    const auto from = Take(sizeof value);
    if (ok_) std::memcpy(&value, from.data(), sizeof value);
    return value;
  }
  // Of at most `most` bytes.
  std::string Text(std::size_t most) {
    const auto size = Get<std::uint32_t>();
    if (size > most) ok_ = false;
    const auto from = Take(ok_ ? size : 0);
    return {reinterpret_cast<const char*>(from.data()), from.size()};
  }
  // Nothing where there are not so many.
  template <typename T>
  std::vector<T> Values(std::size_t count) {
    if (count > bytes_.size() / sizeof(T)) ok_ = false;
    const auto from = Take(ok_ ? count * sizeof(T) : 0);
    std::vector<T> values(from.size() / sizeof(T));
    if (!from.empty()) std::memcpy(values.data(), from.data(), from.size());
    return values;
  }
  bool ok() const { return ok_; }
  std::size_t left() const { return bytes_.size(); }

 private:
  std::span<const std::byte> Take(std::size_t size) {
    if (size > bytes_.size()) ok_ = false;
    if (!ok_) return {};
    const auto taken = bytes_.first(size);
    bytes_ = bytes_.subspan(size);
    return taken;
  }
  std::span<const std::byte> bytes_;
  bool ok_ = true;
};

}  // namespace kvshare::anchors
