// Files that are written and read as a whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "anchors/anchor_record.h"

namespace kvshare::agentd {

// What a file is called while it is not finished ends so.
inline constexpr char kUnfinished[] = ".new";

// Whole or not at all under its name; where `sync` is false, as long as the machine does not stop.
bool WriteWhole(const std::string& path, std::span<const std::byte> bytes, bool sync = true);

// `fault` is kUnreadable where the disk failed, and kDamaged where that is no file, or one larger than `max_bytes`.
// Nothing and no fault where there is no such file.
std::optional<std::vector<std::byte>> ReadWhole(const std::string& path, std::int64_t max_bytes,
                                                anchors::AnchorFault* fault);

}  // namespace kvshare::agentd
