#include "anchors/guard_record.h"

#include <cmath>

#include "anchors/byte_io.h"

namespace kvshare::anchors {
namespace {

using Magic = std::array<char, 8>;
constexpr Magic kMagic = {'K', 'V', 'S', 'G', 'U', 'A', 'R', 'D'};
constexpr std::uint64_t kVersion = 1;

bool IsMargin(double value) { return value >= 0; }  // infinity too; not a number is none

}  // namespace

std::vector<std::byte> EncodeGuards(const GuardStates& guards, const Digest& space) {
  ByteWriter out;
  out.Put(kMagic);
  out.Put(kVersion);
  out.Put(space);
  for (const Guard::State& guard : guards) {
    out.Put(guard.quantile);
    out.Put(static_cast<std::uint64_t>(guard.least.size()));
    out.Values(guard.least);
    out.Put(static_cast<std::uint64_t>(guard.audits.size()));
    for (const AuditBook::Audit& audit : guard.audits) {
      out.Put(audit.margin);
      out.Put(static_cast<std::uint64_t>(audit.failed));
    }
  }
  return out.Finish();
}

AnchorFault DecodeGuards(std::span<const std::byte> bytes, const Digest& space, GuardStates* guards) {
  ByteReader in(bytes);
  if (in.Get<Magic>() != kMagic) return AnchorFault::kDamaged;
  const auto version = in.Get<std::uint64_t>();
  if (!in.ok() || bytes.size() < sizeof(Digest)) return AnchorFault::kDamaged;
  if (version != kVersion) return AnchorFault::kOtherVersion;
  const auto summed = bytes.first(bytes.size() - sizeof(Digest));
  if (ByteReader(bytes.last(sizeof(Digest))).Get<Digest>() != PlainSha256(summed)) return AnchorFault::kDamaged;
  in = ByteReader(summed.subspan(sizeof(Magic) + sizeof version));
  const auto written_for = in.Get<Digest>();
  if (!in.ok()) return AnchorFault::kDamaged;
  if (written_for != space) return AnchorFault::kOtherSpace;
  // A right checksum does not say that it was us who wrote: the bounds hold all the same.
  GuardStates read;
  for (Guard::State& guard : read) {
    guard.quantile = in.Get<double>();
    guard.least = in.Values<double>(in.Get<std::uint64_t>());
    if (!IsMargin(guard.quantile)) return AnchorFault::kDamaged;
    for (const double least : guard.least) {
      if (!IsMargin(least)) return AnchorFault::kDamaged;
    }
    for (auto left = in.Get<std::uint64_t>(); in.ok() && left > 0; --left) {
      const auto margin = in.Get<double>();
      const auto failed = in.Get<std::uint64_t>();
      if (!IsMargin(margin) || failed > 1) return AnchorFault::kDamaged;
      guard.audits.push_back({.margin = margin, .failed = failed == 1});
    }
  }
  if (!in.ok() || in.left() != 0) return AnchorFault::kDamaged;
  *guards = std::move(read);
  return AnchorFault::kNone;
}

}  // namespace kvshare::anchors
