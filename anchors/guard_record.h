// The bytes of what the guards have learnt (docs/formats/guard.md). No I/O.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <vector>

#include "anchors/anchor_record.h"
#include "anchors/confidence.h"
#include "libkvshare/core/hash.h"

namespace kvshare::anchors {

// Of prompts that are one thread, and of others.
using GuardStates = std::array<Guard::State, 2>;

// `space`: Model::space() of the model whose answers were looked at.
std::vector<std::byte> EncodeGuards(const GuardStates& guards, const Digest& space);
// Bytes that nobody vouches for; `guards` is set where the result is kNone.
AnchorFault DecodeGuards(std::span<const std::byte> bytes, const Digest& space, GuardStates* guards);

// More than EncodeGuards ever gives.
inline constexpr std::int64_t kMaxGuardRecordBytes = 1 << 16;

}  // namespace kvshare::anchors
