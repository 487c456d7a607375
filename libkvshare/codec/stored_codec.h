// What replies say of stored KV: leases, their layout, entries.
#pragma once

#include "libkvshare/codec/fields.h"

namespace kvshare::codec::internal {

Result<flatbuffers::Offset<wire::KvLayout>> WriteLayout(flatbuffers::FlatBufferBuilder& builder,
                                                        const KvLayoutInfo& layout);
// Null: all zero, from a daemon that does not say.
Status ReadLayout(const wire::KvLayout* in, KvLayoutInfo* out);

Result<flatbuffers::Offset<wire::Leased>> WriteLease(flatbuffers::FlatBufferBuilder& builder, const LeaseInfo& lease);
Result<LeaseInfo> ReadLease(const wire::Leased& in);

Result<flatbuffers::Offset<wire::Entries>> WriteEntries(flatbuffers::FlatBufferBuilder& builder, const EntryList& list);
Result<EntryList> ReadEntries(const wire::Entries& in);

}  // namespace kvshare::codec::internal
