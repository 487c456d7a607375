// KVCOMM on one moved chunk, where the model computes: whether its anchors resemble it, its correction, and what it
// teaches. Of a device whose memory the host does not read, one distance for each anchor crosses before the first
// token, and pages after it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "agentd/repair/device_anchors.h"
#include "anchors/anchor_pool.h"
#include "kernels/backend.h"
#include "kernels/paged_kv.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

// Tokens that stand side by side in some pages. The tables are the caller's.
struct KvRun {
  std::span<const kernels::PageIndex> pages;
  int first = 0;              // page row of the first token in pages[0]
  std::int64_t position = 0;  // at which its key is rotated
  std::int64_t tokens = 0;
};

class ChunkCorrection {
 public:
  virtual ~ChunkCorrection() = default;
  // AnchorPool::Shareable. To be called before Write, and no anchor registered in between.
  virtual Result<bool> Shareable() = 0;
  // Writes the corrected tokens to to[t], keys rotated at `position` + t.
  virtual Status Write(std::span<const kernels::KvSlot> to, std::int64_t position) = 0;
};

// Of tokens that are stored as `stored` says. All must outlive it. Where the host does not read the backend's memory:
// requires device_kv(), what that asks for (kernels/device_kv.h), and `cache`; else that may be null. ResourceExhausted
// where a device has no room for the anchors.
std::unique_ptr<ChunkCorrection> NewChunkCorrection(kernels::Backend& backend, DeviceAnchors* cache,
                                                    const kernels::KvPages& pages, const kernels::RopeTable& rope,
                                                    const KvRun& stored, anchors::AnchorPool* pool,
                                                    std::string placeholder, std::string agent);

// Registers with `pool` that the tokens of `stored` would have been those of `computed`. Where the host does not read
// the pages they are copied to it first. Returns the backend's failure, if it has any.
Status TeachChunk(kernels::Backend& backend, const kernels::KvPages& pages, const kernels::RopeTable& rope,
                  const KvRun& stored, const KvRun& computed, const std::string& content, anchors::AnchorPool* pool,
                  const std::string& placeholder, const std::string& agent);

}  // namespace kvshare::agentd
