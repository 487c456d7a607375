// The messages of the wire as plain structs: what client and server think in. protocol/kvshare.fbs says what each
// means.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare::codec {

// ---- requests ----

struct Hello {
  std::string client;  // the library and its version, for the daemon's log
};
struct Ping {};
struct Tokenize {
  std::string text;
};
struct Detokenize {
  std::vector<TokenId> ids;
};
struct Generate {
  GenerateRequest request;
  std::uint32_t credit = 0;  // chunks the client has room for
};
struct Cancel {
  std::uint64_t target = 0;  // correlation id of the Generate
};
struct GetStats {};
struct Credit {
  std::uint64_t target = 0;
  std::uint32_t chunks = 0;
};

struct Release {
  std::uint64_t lease = 0;
};
struct Unpin {
  std::string key;
};
struct Prefetch {
  LookupRequest lookup;
};
struct Drain {};

using Request = std::variant<Hello, Ping, Tokenize, Detokenize, RenderRequest, Generate, Cancel, ExplainRequest,
                             GetStats, Credit, LookupRequest, AcquireRequest, Release, PinRequest, Unpin, Prefetch,
                             EvictRequest, EntriesRequest, Drain>;

// ---- replies ----

// What a daemon takes; all zero from one that does not say.
struct Limits {
  std::uint64_t text_bytes = 0;
  std::uint64_t tokens = 0;
  std::uint64_t name_bytes = 0;
  std::uint64_t streams = 0;
};
struct HelloAck {
  ServerInfo info;
  std::uint64_t max_frame_bytes = 0;
  Limits limits;
  std::uint16_t protocol_version = 0;
  std::uint32_t hash_version = 0;
  KvLayoutInfo layout;
  std::string memory_socket;  // empty: no memory is shared
  std::vector<std::uint8_t> memory_ticket;
};
struct Pong {
  std::optional<ServerInfo> info;
};
struct Tokens {
  std::vector<TokenId> ids;
};
struct Text {
  std::string text;
};
struct Accepted {
  std::uint64_t request_id = 0;
};

struct Count {
  std::int64_t count = 0;
};
struct EntryList {
  std::vector<Entry> entries;
};
struct Ack {};

// A Status stands for the wire's Error and is never OK.
using Reply = std::variant<HelloAck, Pong, Tokens, Text, RenderReply, Accepted, TokenChunk, GenerateReply, Explanation,
                           Stats, Status, Match, LeaseInfo, PinInfo, Count, EntryList, Ack>;

}  // namespace kvshare::codec
