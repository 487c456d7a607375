// The bytes of a saved anchor, and of the list that says which anchors a pool has (docs/formats/anchors.md gives every
// one). No I/O. Both decoders take bytes that nobody vouches for, and say why they refuse them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "anchors/anchor_pool.h"
#include "libkvshare/core/hash.h"

namespace kvshare::anchors {

// Whose anchors these are. They hold KV, so all that makes KV comparable must be equal; and they were learnt from what
// one session's agents read, so nobody else may find them.
struct AnchorOwner {
  Digest space;  // Model::space()
  Digest scope;  // ScopeOf(session)
  int layers = 0;
  std::int64_t width = 0;  // num_kv_heads * head_dim
};

// The digest that stands for a session: its name may hold what a file's name must not tell.
Digest ScopeOf(std::string_view session);

// Why saved anchors were not used.
enum class AnchorFault : std::uint8_t {
  kNone,
  kDamaged,       // torn, changed, not ours, or out of bounds
  kOtherVersion,  // of this format
  kOtherSpace,    // other weights, tokenizer, adapter, RoPE, layout or numerics
  kOtherScope,    // another session's
  kUnreadable,    // the disk failed
};
inline constexpr std::size_t kAnchorFaults = 6;
std::string_view AnchorFaultName(AnchorFault fault);  // "" for kNone

// Requires the owner's shape, names of at most kMaxAnchorName bytes and at most kMaxAnchorAgents offsets, each as long
// as the base.
inline constexpr std::size_t kMaxAnchorName = 1024;
inline constexpr std::size_t kMaxAnchorAgents = 4096;
std::vector<std::byte> EncodeAnchor(const Anchor& anchor, const AnchorOwner& owner);
// The size of what EncodeAnchor gives.
std::size_t AnchorRecordBytes(const Anchor& anchor);
// `anchor` is set where the result is kNone. Its `used` is the list's to say.
AnchorFault DecodeAnchor(std::span<const std::byte> bytes, const AnchorOwner& owner, Anchor* anchor);

// One anchor of a pool, as the list has it.
struct ListedAnchor {
  std::uint64_t serial = 0;   // ascending in the list
  std::uint64_t version = 0;  // names the record
  std::int64_t used = 0;
  std::uint64_t bytes = 0;  // of the record
  Digest checksum;          // that the record ends with
};
inline constexpr std::size_t kMaxListedAnchors = std::size_t{1} << 20;
std::vector<std::byte> EncodeAnchorList(std::span<const ListedAnchor> list, const AnchorOwner& owner);
AnchorFault DecodeAnchorList(std::span<const std::byte> bytes, const AnchorOwner& owner,
                             std::vector<ListedAnchor>* list);

}  // namespace kvshare::anchors
