// What every kvshare::Client shares, whatever it talks to. Knows no ZeroMQ, so that the in-process client need not.
#include <utility>

#include "kvshare/client.h"
#include "libkvshare/core/endpoint.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare {

Status ValidateEndpoint(std::string_view endpoint) { return ParseEndpoint(endpoint, EndpointUse::kConnect).status(); }

Result<GenerateReply> Client::GenerateAll(const GenerateRequest& request) {
  KVS_ASSIGN_OR_RETURN(const std::unique_ptr<TokenStream> stream, Generate(request));
  while (true) {
    KVS_ASSIGN_OR_RETURN(const std::optional<TokenChunk> chunk, stream->Next());
    if (!chunk.has_value()) return stream->reply();
  }
}

}  // namespace kvshare
