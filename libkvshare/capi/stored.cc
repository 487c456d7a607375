// The C interface: stored KV by name.
#include "libkvshare/capi/capi.h"
#include "libkvshare/core/status_macros.h"

struct kvs_lease {
  kvshare::Lease lease;
};

namespace kvshare::capi {
namespace {

constexpr std::int64_t kDefaultTtlMs = 30000;

Status Lookup(kvs_client* client, const kvs_prompt* prompt, kvs_match* match) {
  KVS_RETURN_IF_ERROR(CheckClient(client));
  KVS_ASSIGN_OR_RETURN(PromptParts parts, ReadPrompt(prompt));
  KVS_ASSIGN_OR_RETURN(const Match found, client->client->Lookup({.prompt = std::move(parts.prompt),
                                                                  .agent = std::move(parts.agent),
                                                                  .session = std::move(parts.session)}));
  kvs_match out{};
  out.prompt_tokens = found.prompt_tokens;
  out.prefix_tokens = found.prefix_tokens;
  out.host_tokens = found.host_tokens;
  out.cold_tokens = found.cold_tokens;
  out.chunk_tokens = found.chunk_tokens;
  return WriteStruct(out, "match", match);
}

Status Acquire(kvs_client* client, const kvs_prompt* prompt, int64_t ttl_ms, kvs_lease** lease) {
  KVS_RETURN_IF_ERROR(CheckClient(client));
  if (lease == nullptr) return InvalidArgument("lease is NULL");
  if (ttl_ms < 0) return InvalidArgument("ttl_ms is negative");
  KVS_ASSIGN_OR_RETURN(PromptParts parts, ReadPrompt(prompt));
  const std::chrono::milliseconds ttl(ttl_ms == 0 ? kDefaultTtlMs : ttl_ms);
  KVS_ASSIGN_OR_RETURN(Lease acquired, client->client->Acquire({.prompt = std::move(parts.prompt),
                                                                .agent = std::move(parts.agent),
                                                                .session = std::move(parts.session),
                                                                .ttl = ttl}));
  if (!acquired) return NotFound("nothing of the prompt is stored");
  *lease = new kvs_lease{.lease = std::move(acquired)};
  return OkStatus();
}

Status Describe(const kvs_lease* lease, kvs_lease_info* info) {
  if (lease == nullptr) return InvalidArgument("lease is NULL");
  const KvLayoutInfo& layout = lease->lease.layout();
  kvs_lease_info out{};
  out.tokens = lease->lease.tokens();
  out.num_pages = static_cast<int64_t>(lease->lease.pages().size());
  out.page_bytes = layout.page_bytes;
  out.page_tokens = layout.page_tokens;
  out.num_layers = layout.num_layers;
  out.num_kv_heads = layout.num_kv_heads;
  out.head_dim = layout.head_dim;
  CopyName(layout.dtype, out.dtype);
  return WriteStruct(out, "info", info);
}

Status Page(const kvs_lease* lease, size_t index, kvs_page* page) {
  if (lease == nullptr) return InvalidArgument("lease is NULL");
  KVS_ASSIGN_OR_RETURN(const std::span<const std::byte> bytes, lease->lease.PageBytes(index));
  const LeasePage& from = lease->lease.pages()[index];
  kvs_page out{};
  out.data = bytes.data();
  out.bytes = bytes.size();
  out.start = from.start;
  out.valid_tokens = from.valid_tokens;
  out.generation = from.generation;
  return WriteStruct(out, "page", page);
}

}  // namespace
}  // namespace kvshare::capi

extern "C" {

kvs_status kvs_lookup(kvs_client* client, const kvs_prompt* prompt, kvs_match* match) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Lookup(client, prompt, match); });
}

kvs_status kvs_acquire(kvs_client* client, const kvs_prompt* prompt, int64_t ttl_ms, kvs_lease** lease) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Acquire(client, prompt, ttl_ms, lease); });
}

kvs_status kvs_lease_describe(const kvs_lease* lease, kvs_lease_info* info) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Describe(lease, info); });
}

kvs_status kvs_lease_page(const kvs_lease* lease, size_t index, kvs_page* page) {
  return kvshare::capi::Guarded([&] { return kvshare::capi::Page(lease, index, page); });
}

int kvs_lease_valid(const kvs_lease* lease, size_t index) {
  return lease != nullptr && lease->lease.Valid(index) ? 1 : 0;
}

void kvs_release(kvs_lease* lease) {
  kvshare::capi::Guarded([&] {
    delete lease;
    return kvshare::OkStatus();
  });
}

}  // extern "C"
