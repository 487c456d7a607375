#include "runtime/gguf.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "libkvshare/core/status_macros.h"

namespace kvshare::runtime {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read as it lies in memory");

using Type = GgufValue::Type;

constexpr std::uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr std::uint64_t kMaxNameBytes = 65535;
constexpr std::uint32_t kMaxDims = 4;  // GGML_MAX_DIMS

// Bytes of a value of fixed size; 0 for strings, arrays and unknown types.
std::size_t FixedSize(Type type) {
  switch (type) {
    case Type::kU8:
    case Type::kI8:
    case Type::kBool: return 1;
    case Type::kU16:
    case Type::kI16: return 2;
    case Type::kU32:
    case Type::kI32:
    case Type::kF32: return 4;
    case Type::kU64:
    case Type::kI64:
    case Type::kF64: return 8;
    default: return 0;
  }
}

// Walks the file; every read is checked against its end.
class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> file) : file_(file) {}

  std::size_t position() const { return position_; }
  std::size_t left() const { return file_.size() - position_; }

  template <typename T>
  Status Read(T* out, const char* what) {
    if (left() < sizeof(T)) return Truncated(what, sizeof(T));
    std::memcpy(out, file_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return OkStatus();
  }

  Status Take(std::uint64_t bytes, const char* what, std::span<const std::byte>* out) {
    if (bytes > left()) return Truncated(what, bytes);
    *out = file_.subspan(position_, static_cast<std::size_t>(bytes));
    position_ += static_cast<std::size_t>(bytes);
    return OkStatus();
  }

  Status ReadString(const char* what, std::string_view* out) {
    std::uint64_t size = 0;
    std::span<const std::byte> bytes;
    KVS_RETURN_IF_ERROR(Read(&size, what));
    KVS_RETURN_IF_ERROR(Take(size, what, &bytes));
    *out = {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
    return OkStatus();
  }

  std::span<const std::byte> Since(std::size_t begin) const { return file_.subspan(begin, position_ - begin); }

 private:
  Status Truncated(const char* what, std::uint64_t bytes) const {
    return InvalidArgument("truncated: " + std::string(what) + " at byte " + std::to_string(position_) + " needs " +
                           std::to_string(bytes) + " bytes, the file has " + std::to_string(left()) + " more");
  }

  std::span<const std::byte> file_;
  std::size_t position_ = 0;
};

Status ReadName(Cursor* cursor, const char* what, std::string* out) {
  std::string_view name;
  KVS_RETURN_IF_ERROR(cursor->ReadString(what, &name));
  if (name.empty() || name.size() > kMaxNameBytes) {
    return InvalidArgument(std::string(what) + " has " + std::to_string(name.size()) + " bytes, outside 1..65535");
  }
  *out = name;
  return OkStatus();
}

Status ReadValue(Cursor* cursor, GgufValue* out) {
  std::uint32_t type = 0;
  KVS_RETURN_IF_ERROR(cursor->Read(&type, "a value's type"));
  if (type == static_cast<std::uint32_t>(Type::kArray)) {
    out->is_array = true;
    KVS_RETURN_IF_ERROR(cursor->Read(&type, "an array's type"));
    KVS_RETURN_IF_ERROR(cursor->Read(&out->count, "an array's length"));
  }
  out->type = static_cast<Type>(type);
  const std::size_t begin = cursor->position();
  if (out->type == Type::kString) {
    // Each string takes 8 bytes at least, so that a lying count ends at the file's end.
    for (std::uint64_t i = 0; i < out->count; ++i) {
      std::string_view ignored;
      KVS_RETURN_IF_ERROR(cursor->ReadString("a string", &ignored));
    }
  } else {
    const std::size_t size = FixedSize(out->type);
    if (size == 0) return InvalidArgument("value type " + std::to_string(type) + " is unknown or nests arrays");
    if (out->count > cursor->left() / size) {
      return InvalidArgument("truncated: an array of " + std::to_string(out->count) + " values does not fit the file");
    }
    std::span<const std::byte> ignored;
    KVS_RETURN_IF_ERROR(cursor->Take(out->count * size, "a value", &ignored));
  }
  out->bytes = cursor->Since(begin);
  return OkStatus();
}

struct TensorEntry {
  std::string name;
  TensorView view;
  std::uint64_t offset = 0;  // from the start of the data section
};

Status ReadTensorEntry(Cursor* cursor, TensorEntry* out) {
  std::uint32_t num_dims = 0, type = 0;
  KVS_RETURN_IF_ERROR(cursor->Read(&num_dims, "a tensor's number of dimensions"));
  if (num_dims < 1 || num_dims > kMaxDims) return InvalidArgument(std::to_string(num_dims) + " dimensions, not 1..4");
  for (std::uint32_t d = 0; d < num_dims; ++d) {
    std::uint64_t dim = 0;
    KVS_RETURN_IF_ERROR(cursor->Read(&dim, "a tensor's dimension"));
    if (dim < 1 || dim > (std::uint64_t{1} << 62)) return InvalidArgument("a dimension is " + std::to_string(dim));
    out->view.shape.push_back(static_cast<std::int64_t>(dim));
  }
  std::reverse(out->view.shape.begin(), out->view.shape.end());  // ggml writes the innermost dimension first
  KVS_RETURN_IF_ERROR(cursor->Read(&type, "a tensor's type"));
  KVS_RETURN_IF_ERROR(cursor->Read(&out->offset, "a tensor's offset"));
  out->view.type = FindGgufType(type);
  if (out->view.type == nullptr) {
    return Unimplemented("ggml type " + std::to_string(type) +
                         " is not supported (F32, F16, BF16, Q4_0, Q4_1, Q8_0 are)");
  }
  return OkStatus();
}

// The integer or boolean at `p`; false for other types.
bool LoadInt(Type type, const std::byte* p, std::int64_t* out) {
  const auto load = [p, out]<typename T>(T value) {
    std::memcpy(&value, p, sizeof value);
    if constexpr (std::is_same_v<T, std::uint64_t>) {
      if (value > static_cast<std::uint64_t>(INT64_MAX)) value = static_cast<std::uint64_t>(INT64_MAX);
    }
    *out = static_cast<std::int64_t>(value);
    return true;
  };
  switch (type) {
    case Type::kU8: return load(std::uint8_t{});
    case Type::kI8: return load(std::int8_t{});
    case Type::kU16: return load(std::uint16_t{});
    case Type::kI16: return load(std::int16_t{});
    case Type::kU32: return load(std::uint32_t{});
    case Type::kI32: return load(std::int32_t{});
    case Type::kU64: return load(std::uint64_t{});
    case Type::kI64: return load(std::int64_t{});
    default: return false;
  }
}

std::string Key(std::string_view key) { return "key '" + std::string(key) + "'"; }

}  // namespace

Result<Gguf> Gguf::Parse(std::span<const std::byte> file) {
  Cursor cursor(file);
  std::uint32_t magic = 0, version = 0;
  std::uint64_t num_tensors = 0, num_values = 0;
  KVS_RETURN_IF_ERROR(cursor.Read(&magic, "the magic number"));
  if (magic != kMagic) return InvalidArgument("not a GGUF file: it does not begin with 'GGUF'");
  KVS_RETURN_IF_ERROR(cursor.Read(&version, "the version"));
  if (version != 2 && version != 3) {
    const char* hint = (version & 0xffffu) == 0 ? " (is it a big-endian file?)" : "";
    return Unimplemented("GGUF version " + std::to_string(version) + " is not supported (2 and 3 are)" + hint);
  }
  KVS_RETURN_IF_ERROR(cursor.Read(&num_tensors, "the number of tensors"));
  KVS_RETURN_IF_ERROR(cursor.Read(&num_values, "the number of keys"));

  Gguf gguf;
  for (std::uint64_t i = 0; i < num_values; ++i) {
    std::string key;
    GgufValue value;
    KVS_RETURN_IF_ERROR(ReadName(&cursor, "a key's name", &key));
    KVS_RETURN_IF_ERROR(ReadValue(&cursor, &value).WithContext(Key(key)));
    if (!gguf.values_.emplace(key, value).second) return InvalidArgument(Key(key) + " stands twice");
  }
  std::vector<TensorEntry> entries;
  for (std::uint64_t i = 0; i < num_tensors; ++i) {
    TensorEntry entry;
    KVS_RETURN_IF_ERROR(ReadName(&cursor, "a tensor's name", &entry.name));
    KVS_RETURN_IF_ERROR(ReadTensorEntry(&cursor, &entry).WithContext("tensor '" + entry.name + "'"));
    entries.push_back(std::move(entry));
  }

  KVS_ASSIGN_OR_RETURN(const std::int64_t alignment, gguf.GetInt("general.alignment", 1, 1 << 20, 32));
  if (!std::has_single_bit(static_cast<std::uint64_t>(alignment))) {
    return InvalidArgument("key 'general.alignment' is not a power of two");
  }
  const auto align = static_cast<std::uint64_t>(alignment);
  const std::uint64_t data_begin = (cursor.position() + align - 1) / align * align;
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
  std::uint64_t previous_end = data_begin;
  for (TensorEntry& entry : entries) {
    const std::string who = "tensor '" + entry.name + "'";
    const auto bytes = TensorBytes(*entry.view.type, entry.view.shape);
    if (!bytes.ok()) return bytes.status().WithContext(who);
    if (entry.offset % align != 0) return InvalidArgument(who + " is not aligned to " + std::to_string(align));
    // Offset and size are at most 2^62 each: the sum does not wrap.
    if (entry.offset > std::uint64_t{1} << 62) return InvalidArgument(who + " has an offset beyond any file");
    const std::uint64_t begin = data_begin + entry.offset, end = begin + *bytes;
    if (end > file.size()) {
      return InvalidArgument("truncated: " + who + " needs bytes " + std::to_string(begin) + ".." +
                             std::to_string(end) + ", the file has " + std::to_string(file.size()));
    }
    if (begin < previous_end) return InvalidArgument(who + " overlaps the tensor before it");
    previous_end = end;
    entry.view.bytes = file.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(*bytes));
    if (!gguf.tensors_.emplace(entry.name, std::move(entry.view)).second) return InvalidArgument(who + " stands twice");
  }
  return gguf;
}

Result<const GgufValue*> Gguf::Find(std::string_view key, bool is_array) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return InvalidArgument(Key(key) + " is missing");
  if (it->second.is_array != is_array) {
    return InvalidArgument(Key(key) + (is_array ? " must be an array" : " must not be an array"));
  }
  return &it->second;
}

Result<std::int64_t> Gguf::GetInt(std::string_view key, std::int64_t lo, std::int64_t hi,
                                  std::optional<std::int64_t> fallback) const {
  if (fallback.has_value() && !Has(key)) return *fallback;
  KVS_ASSIGN_OR_RETURN(const GgufValue* value, Find(key, false));
  std::int64_t number = 0;
  if (!LoadInt(value->type, value->bytes.data(), &number)) return InvalidArgument(Key(key) + " must be an integer");
  if (number < lo || number > hi) {
    return InvalidArgument(Key(key) + " is " + std::to_string(number) + ", outside " + std::to_string(lo) + ".." +
                           std::to_string(hi));
  }
  return number;
}

Result<double> Gguf::GetFloat(std::string_view key, std::optional<double> fallback) const {
  if (fallback.has_value() && !Has(key)) return *fallback;
  KVS_ASSIGN_OR_RETURN(const GgufValue* value, Find(key, false));
  double number = 0;
  if (value->type == Type::kF32) {
    float narrow = 0;
    std::memcpy(&narrow, value->bytes.data(), sizeof narrow);
    number = narrow;
  } else if (value->type == Type::kF64) {
    std::memcpy(&number, value->bytes.data(), sizeof number);
  } else {
    return InvalidArgument(Key(key) + " must be a floating-point number");
  }
  if (!std::isfinite(number)) return InvalidArgument(Key(key) + " is not a finite number");
  return number;
}

Result<bool> Gguf::GetBool(std::string_view key, bool fallback) const {
  if (!Has(key)) return fallback;
  KVS_ASSIGN_OR_RETURN(const GgufValue* value, Find(key, false));
  if (value->type != Type::kBool) return InvalidArgument(Key(key) + " must be a boolean");
  return value->bytes[0] != std::byte{0};
}

Result<std::string> Gguf::GetString(std::string_view key, std::optional<std::string> fallback) const {
  if (fallback.has_value() && !Has(key)) return *fallback;
  KVS_ASSIGN_OR_RETURN(const GgufValue* value, Find(key, false));
  if (value->type != Type::kString) return InvalidArgument(Key(key) + " must be a string");
  const auto text = value->bytes.subspan(8);  // its length, checked by Parse, stands before it
  return std::string(reinterpret_cast<const char*>(text.data()), text.size());
}

Result<std::vector<std::string_view>> Gguf::GetStrings(std::string_view key) const {
  KVS_ASSIGN_OR_RETURN(const GgufValue* value, Find(key, true));
  if (value->type != Type::kString) return InvalidArgument(Key(key) + " must be an array of strings");
  std::vector<std::string_view> strings(static_cast<std::size_t>(value->count));
  Cursor cursor(value->bytes);
  for (std::string_view& text : strings) KVS_RETURN_IF_ERROR(cursor.ReadString("a string", &text));
  return strings;
}

Result<std::vector<std::int64_t>> Gguf::GetInts(std::string_view key) const {
  KVS_ASSIGN_OR_RETURN(const GgufValue* value, Find(key, true));
  const std::size_t size = FixedSize(value->type);
  std::vector<std::int64_t> numbers(size == 0 ? 0 : static_cast<std::size_t>(value->count));
  std::int64_t probe = 0;
  const std::byte zeros[8] = {};
  if (!LoadInt(value->type, zeros, &probe)) return InvalidArgument(Key(key) + " must be an array of integers");
  for (std::size_t i = 0; i < numbers.size(); ++i) LoadInt(value->type, value->bytes.data() + i * size, &numbers[i]);
  return numbers;
}

}  // namespace kvshare::runtime
