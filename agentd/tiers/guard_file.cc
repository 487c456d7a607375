#include "agentd/tiers/guard_file.h"

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <system_error>
#include <utility>

#include "agentd/tiers/whole_file.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kSpaceDigits = 32;

}  // namespace

Digest GuardSpace(const Digest& space, const std::optional<double>& repaired_share) {
  if (!repaired_share.has_value()) return space;
  const auto millionths = static_cast<std::uint64_t>(std::llround(*repaired_share * 1e6));
  return DigestBuilder("guard").Child(space).U64(millionths).Finish();
}

GuardFile::GuardFile(std::string directory, const Digest& space)
    : directory_(std::move(directory)),
      space_(space),
      path_(directory_ + "/" + space.Hex().substr(0, kSpaceDigits) + ".guard") {}

std::optional<anchors::GuardStates> GuardFile::Load(anchors::AnchorFault* fault) const {
  const auto bytes = ReadWhole(path_, anchors::kMaxGuardRecordBytes, fault);
  if (!bytes.has_value()) return std::nullopt;
  anchors::GuardStates guards;
  *fault = anchors::DecodeGuards(*bytes, space_, &guards);
  if (*fault != anchors::AnchorFault::kNone) return std::nullopt;
  return guards;
}

bool GuardFile::Save(const anchors::GuardStates& guards) const {
  std::error_code error;
  std::filesystem::create_directories(directory_, error);
  return !error && WriteWhole(path_, anchors::EncodeGuards(guards, space_), /*sync=*/false);
}

}  // namespace kvshare::agentd
