#include "anchors/anchor_record.h"

#include <array>
#include <memory>
#include <string>
#include <utility>

#include "anchors/byte_io.h"
#include "libkvshare/core/check.h"

namespace kvshare::anchors {
namespace {

using Magic = std::array<char, 8>;
constexpr Magic kAnchorMagic = {'K', 'V', 'S', 'A', 'N', 'C', 'H', 'R'};
constexpr Magic kListMagic = {'K', 'V', 'S', 'A', 'N', 'C', 'H', 'L'};
constexpr std::uint32_t kVersion = 2;  // 1 had bfloat16 values
constexpr std::size_t kBeginningBytes = sizeof(Magic) + 2 * 4 + 8 + 2 * sizeof(Digest);
constexpr std::size_t kListedBytes = 4 * 8 + sizeof(Digest);
// Far above any model and prompt; their product fits 64 bits.
static_assert(AnchorOptions{}.max_agents <= kMaxAnchorAgents);
constexpr std::uint64_t kMaxLayers = 4096, kMaxTokens = 1 << 24, kMaxWidth = 1 << 20;

void PutBeginning(const Magic& magic, const AnchorOwner& owner, ByteWriter* out) {
  out->Put(magic);
  out->Put(kVersion);
  out->Put(static_cast<std::uint32_t>(owner.layers));
  out->Put(static_cast<std::uint64_t>(owner.width));
  out->Put(owner.space);
  out->Put(owner.scope);
}

// What both kinds begin and end with; leaves in `body` what is between.
AnchorFault ReadEnds(std::span<const std::byte> bytes, const Magic& magic, const AnchorOwner& owner, ByteReader* body) {
  ByteReader in(bytes);
  if (in.Get<Magic>() != magic) return AnchorFault::kDamaged;
  const auto version = in.Get<std::uint32_t>();
  if (!in.ok() || bytes.size() < sizeof(Digest)) return AnchorFault::kDamaged;
  // Another version may have its checksum elsewhere.
  if (version != kVersion) return AnchorFault::kOtherVersion;
  const auto summed = bytes.first(bytes.size() - sizeof(Digest));
  if (ByteReader(bytes.last(sizeof(Digest))).Get<Digest>() != PlainSha256(summed)) return AnchorFault::kDamaged;
  in = ByteReader(summed.subspan(sizeof(Magic) + sizeof version));
  const auto layers = in.Get<std::uint32_t>();
  const auto width = in.Get<std::uint64_t>();
  const auto space = in.Get<Digest>(), scope = in.Get<Digest>();
  if (!in.ok()) return AnchorFault::kDamaged;
  if (space != owner.space || layers != static_cast<std::uint32_t>(owner.layers) ||
      width != static_cast<std::uint64_t>(owner.width)) {
    return AnchorFault::kOtherSpace;
  }
  if (scope != owner.scope) return AnchorFault::kOtherScope;
  if (layers < 1 || layers > kMaxLayers || width < 1 || width > kMaxWidth) return AnchorFault::kDamaged;
  *body = in;
  return AnchorFault::kNone;
}

}  // namespace

Digest ScopeOf(std::string_view session) { return DigestBuilder("anchor scope").Text(session).Finish(); }

std::string_view AnchorFaultName(AnchorFault fault) {
  constexpr std::string_view kNames[kAnchorFaults] = {
      "", "damaged", "other_version", "other_space", "other_scope", "unreadable"};
  return kNames[static_cast<std::size_t>(fault)];
}

std::size_t AnchorRecordBytes(const Anchor& anchor) {
  constexpr std::size_t kTextHead = sizeof(std::uint32_t);
  std::size_t bytes = kBeginningBytes + 4 * sizeof(std::uint64_t) + anchor.bytes() + sizeof(Digest);
  bytes += 2 * kTextHead + anchor.placeholder.size() + anchor.content.size();
  for (const auto& [agent, offset] : anchor.offsets) bytes += kTextHead + agent.size();
  return bytes;
}

std::vector<std::byte> EncodeAnchor(const Anchor& anchor, const AnchorOwner& owner) {
  KVS_CHECK(anchor.layers == owner.layers && anchor.width == owner.width && anchor.tokens > 0);
  KVS_CHECK(anchor.offsets.size() <= kMaxAnchorAgents);
  KVS_CHECK(anchor.placeholder.size() <= kMaxAnchorName && anchor.content.size() <= kMaxAnchorName);
  ByteWriter out;
  out.Reserve(AnchorRecordBytes(anchor));
  PutBeginning(kAnchorMagic, owner, &out);
  out.Put(anchor.serial);
  out.Put(anchor.version);
  out.Put(static_cast<std::uint64_t>(anchor.tokens));
  out.Put(static_cast<std::uint64_t>(anchor.offsets.size()));
  out.Text(anchor.placeholder);
  out.Text(anchor.content);
  for (const auto& [agent, offset] : anchor.offsets) {
    KVS_CHECK(offset->size() == anchor.base->size() && agent.size() <= kMaxAnchorName);
    out.Text(agent);
  }
  out.Values(*anchor.base);
  for (const auto& [agent, offset] : anchor.offsets) out.Values(*offset);
  return out.Finish();
}

AnchorFault DecodeAnchor(std::span<const std::byte> bytes, const AnchorOwner& owner, Anchor* anchor) {
  ByteReader in({});
  const AnchorFault fault = ReadEnds(bytes, kAnchorMagic, owner, &in);
  if (fault != AnchorFault::kNone) return fault;
  // A right checksum says that somebody wrote these bytes on purpose, not that it was us: the bounds hold all the same.
  Anchor read{.layers = owner.layers, .width = owner.width};
  read.serial = in.Get<std::uint64_t>();
  read.version = in.Get<std::uint64_t>();
  const auto tokens = in.Get<std::uint64_t>();
  const auto agents = in.Get<std::uint64_t>();
  if (!in.ok() || read.serial == 0 || read.version == 0 || tokens < 1 || tokens > kMaxTokens || agents < 1 ||
      agents > kMaxAnchorAgents) {
    return AnchorFault::kDamaged;
  }
  read.tokens = static_cast<std::int64_t>(tokens);
  read.placeholder = in.Text(kMaxAnchorName);
  read.content = in.Text(kMaxAnchorName);
  std::vector<std::string> names;
  for (std::uint64_t i = 0; i < agents && in.ok(); ++i) {
    names.push_back(in.Text(kMaxAnchorName));
    if (i > 0 && names[i] <= names[i - 1]) return AnchorFault::kDamaged;
  }
  const std::size_t blocks =
      static_cast<std::size_t>(owner.layers) * 2 * tokens * Q8Blocks(static_cast<std::size_t>(owner.width));
  if (!in.ok() || in.left() / sizeof(Q8Block) / (agents + 1) != blocks ||
      in.left() != blocks * sizeof(Q8Block) * (agents + 1)) {
    return AnchorFault::kDamaged;
  }
  bool sound = true;
  const auto shared = [&] {
    std::vector<Q8Block> values = in.Values<Q8Block>(blocks);
    sound = sound && AreQ8(values);
    return std::make_shared<const std::vector<Q8Block>>(std::move(values));
  };
  read.base = shared();
  for (std::string& name : names) read.offsets.emplace(std::move(name), shared());
  if (!sound) return AnchorFault::kDamaged;
  *anchor = std::move(read);
  return AnchorFault::kNone;
}

std::vector<std::byte> EncodeAnchorList(std::span<const ListedAnchor> list, const AnchorOwner& owner) {
  KVS_CHECK(list.size() <= kMaxListedAnchors);
  ByteWriter out;
  PutBeginning(kListMagic, owner, &out);
  out.Put(static_cast<std::uint64_t>(list.size()));
  for (const ListedAnchor& listed : list) {
    out.Put(listed.serial);
    out.Put(listed.version);
    out.Put(listed.used);
    out.Put(listed.bytes);
    out.Put(listed.checksum);
  }
  return out.Finish();
}

AnchorFault DecodeAnchorList(std::span<const std::byte> bytes, const AnchorOwner& owner,
                             std::vector<ListedAnchor>* list) {
  ByteReader in({});
  const AnchorFault fault = ReadEnds(bytes, kListMagic, owner, &in);
  if (fault != AnchorFault::kNone) return fault;
  const auto count = in.Get<std::uint64_t>();
  if (!in.ok() || count > kMaxListedAnchors || in.left() != count * kListedBytes) return AnchorFault::kDamaged;
  std::vector<ListedAnchor> read(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < read.size(); ++i) {
    read[i].serial = in.Get<std::uint64_t>();
    read[i].version = in.Get<std::uint64_t>();
    read[i].used = in.Get<std::int64_t>();
    read[i].bytes = in.Get<std::uint64_t>();
    read[i].checksum = in.Get<Digest>();
    if (read[i].serial <= (i == 0 ? 0 : read[i - 1].serial) || read[i].version == 0 || read[i].used < 0) {
      return AnchorFault::kDamaged;
    }
  }
  *list = std::move(read);
  return AnchorFault::kNone;
}

}  // namespace kvshare::anchors
