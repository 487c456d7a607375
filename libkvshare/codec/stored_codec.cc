#include "libkvshare/codec/stored_codec.h"

#include <chrono>
#include <utility>

namespace kvshare::codec::internal {
namespace {

using flatbuffers::FlatBufferBuilder;
using flatbuffers::Offset;

Status CheckLayout(const KvLayoutInfo& layout) {
  for (std::int64_t value : {std::int64_t{layout.num_layers}, std::int64_t{layout.num_kv_heads},
                             std::int64_t{layout.head_dim}, std::int64_t{layout.page_tokens}, layout.page_bytes}) {
    if (value < 0) return InvalidArgument("a KV layout with a negative size");
  }
  return CheckName("the KV layout's dtype", layout.dtype);
}

// Readers turn these into addresses: nothing negative leaves here.
Status CheckLease(std::int64_t tokens, std::chrono::milliseconds ttl, std::size_t pages) {
  if (tokens < 0) return InvalidArgument("a lease of a negative number of tokens");
  if (ttl.count() < 0 || ttl.count() > wire::kMaxTimeoutMs) return InvalidArgument("a lease's ttl out of range");
  return CheckSize("number of a lease's pages", pages, wire::kMaxLeasePages);
}

Status CheckPage(const LeasePage& page) {
  if (page.offset < 0 || page.start < 0 || page.valid_tokens < 0) {
    return InvalidArgument("a leased page with a negative number");
  }
  return OkStatus();
}

Status CheckEntry(const Entry& entry) {
  for (const std::string* name : {&entry.key, &entry.parent, &entry.tier, &entry.source}) {
    KVS_RETURN_IF_ERROR(CheckName("a name in an entry", *name));
  }
  return OkStatus();
}

}  // namespace

Result<Offset<wire::KvLayout>> WriteLayout(FlatBufferBuilder& builder, const KvLayoutInfo& layout) {
  KVS_RETURN_IF_ERROR(CheckLayout(layout));
  const auto dtype = WriteString(builder, layout.dtype);
  return wire::CreateKvLayout(builder, layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.page_tokens,
                              layout.page_bytes, dtype);
}

Status ReadLayout(const wire::KvLayout* in, KvLayoutInfo* out) {
  *out = KvLayoutInfo{};
  if (in == nullptr) return OkStatus();
  out->num_layers = in->num_layers();
  out->num_kv_heads = in->num_kv_heads();
  out->head_dim = in->head_dim();
  out->page_tokens = in->page_tokens();
  out->page_bytes = in->page_bytes();
  KVS_RETURN_IF_ERROR(ReadName("KV layout's dtype", in->dtype(), &out->dtype));
  return CheckLayout(*out);
}

Result<Offset<wire::Leased>> WriteLease(FlatBufferBuilder& builder, const LeaseInfo& lease) {
  KVS_RETURN_IF_ERROR(CheckLease(lease.tokens, lease.ttl, lease.pages.size()));
  KVS_ASSIGN_OR_RETURN(const auto layout, WriteLayout(builder, lease.layout));
  std::vector<wire::LeasePage> pages;
  pages.reserve(lease.pages.size());
  for (const LeasePage& page : lease.pages) {
    KVS_RETURN_IF_ERROR(CheckPage(page));
    pages.emplace_back(page.offset, page.start, page.generation, page.valid_tokens, 0);
  }
  const auto page_vector = builder.CreateVectorOfStructs(pages);
  return wire::CreateLeased(builder, lease.id, lease.tokens, lease.ttl.count(), layout, page_vector);
}

Result<LeaseInfo> ReadLease(const wire::Leased& in) {
  LeaseInfo lease{.id = in.id(), .tokens = in.tokens(), .ttl = std::chrono::milliseconds(in.ttl_ms())};
  KVS_RETURN_IF_ERROR(CheckLease(lease.tokens, lease.ttl, in.pages() == nullptr ? 0 : in.pages()->size()));
  KVS_RETURN_IF_ERROR(ReadLayout(in.layout(), &lease.layout));
  if (in.pages() == nullptr) return lease;
  KVS_RETURN_IF_ERROR(CheckAligned("a lease's pages", in.pages()));
  lease.pages.reserve(in.pages()->size());
  for (const wire::LeasePage* page : *in.pages()) {
    lease.pages.push_back({.offset = page->offset(),
                           .start = page->start(),
                           .valid_tokens = page->valid_tokens(),
                           .generation = page->generation()});
    KVS_RETURN_IF_ERROR(CheckPage(lease.pages.back()));
  }
  return lease;
}

Result<Offset<wire::Entries>> WriteEntries(FlatBufferBuilder& builder, const EntryList& list) {
  KVS_RETURN_IF_ERROR(CheckSize("number of entries", list.entries.size(), wire::kMaxEntries));
  std::vector<Offset<wire::Entry>> offsets;
  offsets.reserve(list.entries.size());
  for (const Entry& entry : list.entries) {
    KVS_RETURN_IF_ERROR(CheckEntry(entry));
    KVS_RETURN_IF_ERROR(CheckSize("entry's number of tokens", entry.ids.size(), wire::kMaxTokens));
    const auto key = WriteString(builder, entry.key);
    const auto parent = WriteString(builder, entry.parent);
    // Few tiers and sources, many entries.
    const auto tier = entry.tier.empty() ? 0 : builder.CreateSharedString(entry.tier);
    const auto source = entry.source.empty() ? 0 : builder.CreateSharedString(entry.source);
    const auto ids = WriteTokens(builder, entry.ids);
    offsets.push_back(wire::CreateEntry(builder, key, parent, tier, source, entry.start, entry.tokens, entry.bytes,
                                        entry.hits, entry.idle_ms, entry.leases, entry.pinned, ids));
  }
  return wire::CreateEntries(builder, builder.CreateVector(offsets));
}

Result<EntryList> ReadEntries(const wire::Entries& in) {
  EntryList list;
  if (in.entries() == nullptr) return list;
  KVS_RETURN_IF_ERROR(CheckSize("number of entries", in.entries()->size(), wire::kMaxEntries));
  list.entries.reserve(in.entries()->size());
  for (const wire::Entry* from : *in.entries()) {
    Entry& entry = list.entries.emplace_back();
    KVS_RETURN_IF_ERROR(ReadName("entry's key", from->key(), &entry.key));
    KVS_RETURN_IF_ERROR(ReadName("entry's parent", from->parent(), &entry.parent));
    KVS_RETURN_IF_ERROR(ReadName("entry's tier", from->tier(), &entry.tier));
    KVS_RETURN_IF_ERROR(ReadName("entry's source", from->source(), &entry.source));
    entry.start = from->start();
    entry.tokens = from->tokens();
    entry.bytes = from->bytes();
    entry.hits = from->hits();
    entry.idle_ms = from->idle_ms();
    entry.leases = from->leases();
    entry.pinned = from->pinned();
    KVS_RETURN_IF_ERROR(ReadTokens("entry's number of tokens", from->ids(), &entry.ids));
  }
  return list;
}

}  // namespace kvshare::codec::internal
