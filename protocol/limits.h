// What a frame may hold. Readers refuse more, writers never send it. The parts add up to less than a frame, so that a
// message within its own limits always fits (8 MiB of text beside 2^20 tokens of 4 bytes).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvshare::wire {

inline constexpr std::size_t kMaxFrameBytes = std::size_t{16} << 20;
inline constexpr std::size_t kMaxTextBytes = std::size_t{8} << 20;   // a text, or the messages of a chat
inline constexpr std::size_t kMaxToolsBytes = std::size_t{4} << 20;  // the tools of a chat
inline constexpr std::size_t kMaxTokens = std::size_t{1} << 20;      // ids of one message
inline constexpr std::uint32_t kMaxCredit = 1u << 20;                // chunks of one grant
inline constexpr std::size_t kMaxNameBytes = 256;                    // agent, session, model, reason, ...
inline constexpr std::size_t kMaxStops = 64;
inline constexpr std::size_t kMaxStopBytes = 4096;
inline constexpr std::size_t kMaxErrorBytes = 4096;
inline constexpr std::size_t kMaxMissReasons = 256;
inline constexpr std::size_t kMaxAgents = 16384;
inline constexpr std::size_t kMaxAuditDepths = 8;
inline constexpr std::size_t kMaxSpans = 16384;
inline constexpr std::size_t kMaxLeasePages = kMaxTokens / 64;
inline constexpr std::size_t kMaxEntries = 10000;
inline constexpr std::size_t kMaxBounds = 64;        // of a histogram
inline constexpr std::size_t kMaxPathBytes = 107;    // of a unix socket
inline constexpr std::size_t kMaxTicketBytes = 320;  // a ZeroMQ identity of 255, and what seals it
// Ten years. Keeps deadlines far from the end of std::chrono's nanoseconds.
inline constexpr std::int64_t kMaxTimeoutMs = std::int64_t{10} * 366 * 24 * 3600 * 1000;

// The verifier's limits. The deepest message is Reply > Stats > AgentTotals > Totals; no request has more than four
// tables, and the largest reply has two for each agent.
inline constexpr std::uint32_t kMaxDepth = 8;
inline constexpr std::uint32_t kMaxRequestTables = 16;
inline constexpr std::uint32_t kMaxReplyTables = 2 * kMaxAgents + kMaxMissReasons + 2 * kMaxAuditDepths + 21;

}  // namespace kvshare::wire
