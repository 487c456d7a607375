// Stats <-> the wire: the largest of the replies.
#pragma once

#include "libkvshare/codec/fields.h"

namespace kvshare::codec::internal {

Result<flatbuffers::Offset<wire::Stats>> WriteStats(flatbuffers::FlatBufferBuilder& builder, const Stats& stats);
Result<Stats> ReadStats(const wire::Stats& in);

}  // namespace kvshare::codec::internal
