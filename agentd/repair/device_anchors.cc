#include "agentd/repair/device_anchors.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "anchors/q8.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {

Result<std::shared_ptr<const DeviceAnchors::Copy>> DeviceAnchors::Get(const anchors::Anchor& anchor,
                                                                      const anchors::Anchor::Values& values) {
  // Other values may lie today where some lay that are gone.
  const auto known = copies_.find(values.get());
  if (known != copies_.end() && known->second.values.lock() == values) {
    known->second.used = ++uses_;
    return known->second.copy;
  }
  if (known != copies_.end()) Forget(known);
  Result<std::shared_ptr<const Copy>> copy = Upload(anchor, values);
  if (!copy.ok() && copy.status().code() == StatusCode::kResourceExhausted && bytes_ > 0) {
    Clear();
    copy = Upload(anchor, values);
  }
  KVS_RETURN_IF_ERROR(copy.status());
  const std::size_t size = (*copy)->memory->size();
  const std::size_t most = std::min(max_bytes_, (backend_->free_bytes() + size + bytes_) / 4);
  if (size > most) return copy;
  MakeRoom(size, most);
  copies_[values.get()] = {.values = values, .copy = *copy, .used = ++uses_};
  bytes_ += size;
  return copy;
}

void DeviceAnchors::Clear() {
  copies_.clear();
  bytes_ = 0;
}

void DeviceAnchors::Forget(Copies::iterator kept) {
  bytes_ -= kept->second.copy->memory->size();
  copies_.erase(kept);
}

// For so many more, `most` in all: what is no anchor's any more goes, then what was used longest ago.
void DeviceAnchors::MakeRoom(std::size_t bytes, std::size_t most) {
  for (auto kept = copies_.begin(); kept != copies_.end();) {
    const auto next = std::next(kept);
    if (kept->second.values.expired()) Forget(kept);
    kept = next;
  }
  while (!copies_.empty() && bytes_ + bytes > most) {
    Forget(std::min_element(copies_.begin(), copies_.end(),
                            [](const auto& a, const auto& b) { return a.second.used < b.second.used; }));
  }
}

Result<std::shared_ptr<const DeviceAnchors::Copy>> DeviceAnchors::Upload(const anchors::Anchor& anchor,
                                                                         const anchors::Anchor::Values& values) {
  const auto width = static_cast<std::size_t>(anchor.width);
  const std::size_t blocks = anchors::Q8Blocks(width), rows = values->size() / blocks;
  const std::size_t codes = (rows * width + 63) / 64 * 64;  // scales begin behind them, aligned
  std::vector<std::byte> bytes(codes + rows * blocks * sizeof(std::uint16_t));
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t b = 0; b < blocks; ++b) {
      const anchors::Q8Block& from = (*values)[row * blocks + b];
      const std::size_t first = b * anchors::kQ8Values;
      std::memcpy(bytes.data() + row * width + first, from.codes.data(), std::min(anchors::kQ8Values, width - first));
      std::memcpy(bytes.data() + codes + (row * blocks + b) * sizeof(from.scale), &from.scale, sizeof(from.scale));
    }
  }
  auto copy = std::make_shared<Copy>();
  KVS_ASSIGN_OR_RETURN(copy->memory, backend_->Allocate(bytes.size()));
  KVS_RETURN_IF_ERROR(backend_->Upload(copy->memory->data(), bytes.data(), bytes.size()));
  copy->kv = {reinterpret_cast<const std::int8_t*>(copy->memory->data()),
              reinterpret_cast<const std::uint16_t*>(copy->memory->data() + codes)};
  return std::shared_ptr<const Copy>(std::move(copy));
}

}  // namespace kvshare::agentd
