// DeviceAnchors: KVCOMM's anchors in the memory of a backend that the host does not read, in the form in which
// kernels/device_kv.h takes them. They are the same bytes as in host memory and are kept from one use to the next:
// copying all of a place's anchors costs more than computing the chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "anchors/anchor_pool.h"
#include "kernels/backend.h"
#include "kernels/device_kv.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

class DeviceAnchors {
 public:
  // Values that are there. The memory is theirs as long as somebody holds them.
  struct Copy {
    kernels::CodedKv kv;
    std::unique_ptr<kernels::Buffer> memory;  // codes, then scales
  };

  // Keeps at most `max_bytes`, and at most a quarter of what would be free without it: steps need memory too. The
  // backend must outlive it and all copies.
  DeviceAnchors(kernels::Backend* backend, std::size_t max_bytes) : backend_(backend), max_bytes_(max_bytes) {}

  // One of the anchor's own. ResourceExhausted where the device has no room for it.
  Result<std::shared_ptr<const Copy>> Get(const anchors::Anchor& anchor, const anchors::Anchor::Values& values);

  // Of what is kept.
  std::size_t bytes() const { return bytes_; }
  void Clear();

 private:
  struct Kept {
    std::weak_ptr<const std::vector<anchors::Q8Block>> values;
    std::shared_ptr<const Copy> copy;
    std::uint64_t used = 0;
  };
  using Copies = std::map<const void*, Kept>;  // by where the values lie in host memory

  Result<std::shared_ptr<const Copy>> Upload(const anchors::Anchor& anchor, const anchors::Anchor::Values& values);
  void Forget(Copies::iterator kept);
  void MakeRoom(std::size_t bytes, std::size_t most);

  kernels::Backend* const backend_;
  const std::size_t max_bytes_;
  Copies copies_;
  std::size_t bytes_ = 0;
  std::uint64_t uses_ = 0;
};

}  // namespace kvshare::agentd
