// Seeded random messages of the wire with every field set, and a text form in which two messages can be compared whole.
#pragma once

#include <random>
#include <string>
#include <variant>

#include "libkvshare/codec/messages.h"
#include "protocol/limits.h"

namespace kvshare::testing {

inline constexpr std::size_t kRequestKinds = std::variant_size_v<codec::Request>;
inline constexpr std::size_t kReplyKinds = std::variant_size_v<codec::Reply>;

// `kind` is the index in the variant.
codec::Request RandomRequest(std::mt19937_64& rng, std::size_t kind);
codec::Reply RandomReply(std::mt19937_64& rng, std::size_t kind);

// Every field in order, numbers exactly. Equal texts mean equal messages.
std::string Describe(const codec::Request& request);
std::string Describe(const codec::Reply& reply);

}  // namespace kvshare::testing
