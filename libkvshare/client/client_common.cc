// What every kvshare::Client shares, whatever it talks to. Knows no ZeroMQ, so that the in-process client need not.
#include <string>
#include <utility>

#include "kvshare/client.h"
#include "libkvshare/core/endpoint.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare {

Status ValidateEndpoint(std::string_view endpoint) { return ParseEndpoint(endpoint, EndpointUse::kConnect).status(); }

namespace {
Status NotOffered(const char* call) { return Unimplemented(std::string("this client has no ") + call); }
}  // namespace

Result<Match> Client::Lookup(const LookupRequest&) { return NotOffered("Lookup"); }
Result<Lease> Client::Acquire(const AcquireRequest&) { return NotOffered("Acquire"); }
Result<PinInfo> Client::Pin(const PinRequest&) { return NotOffered("Pin"); }
Status Client::Unpin(const std::string&) { return NotOffered("Unpin"); }
Result<std::int64_t> Client::Prefetch(const LookupRequest&) { return NotOffered("Prefetch"); }
Result<std::int64_t> Client::Evict(const EvictRequest&) { return NotOffered("Evict"); }
Result<std::vector<Entry>> Client::Entries(const EntriesRequest&) { return NotOffered("Entries"); }
Status Client::Drain() { return NotOffered("Drain"); }

Result<GenerateReply> Client::GenerateAll(const GenerateRequest& request) {
  KVS_ASSIGN_OR_RETURN(const std::unique_ptr<TokenStream> stream, Generate(request));
  while (true) {
    KVS_ASSIGN_OR_RETURN(const std::optional<TokenChunk> chunk, stream->Next());
    if (!chunk.has_value()) return stream->reply();
  }
}

}  // namespace kvshare
