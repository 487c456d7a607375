#include "libkvshare/core/endpoint.h"

#include <sys/un.h>

#include <algorithm>
#include <charconv>

namespace kvshare {
namespace {

// The kernel's sun_path, less its terminating zero.
constexpr std::size_t kMaxPathBytes = sizeof(sockaddr_un{}.sun_path) - 1;
constexpr std::size_t kMaxHostBytes = 253;  // of a DNS name

Status Wrong(std::string_view text, std::string_view why) {
  return InvalidArgument("endpoint '" + std::string(text) + "': " + std::string(why) +
                         "; use ipc://PATH or tcp://HOST:PORT");
}

bool IsHostCharacter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '_';
}

bool IsHost(std::string_view host, EndpointUse use) {
  if (host.empty() || host.size() > kMaxHostBytes) return false;
  if (host == "*") return use == EndpointUse::kListen;
  if (host.front() == '[') {
    if (host.size() < 4 || host.back() != ']') return false;
    const std::string_view address = host.substr(1, host.size() - 2);
    return address.find(':') != std::string_view::npos &&
           address.find_first_not_of("0123456789abcdefABCDEF:.") == std::string_view::npos;
  }
  return std::all_of(host.begin(), host.end(), IsHostCharacter);
}

}  // namespace

Result<Endpoint> ParseEndpoint(std::string_view text, EndpointUse use) {
  constexpr std::string_view kIpc = "ipc://";
  constexpr std::string_view kTcp = "tcp://";
  if (text.find('\0') != std::string_view::npos) return Wrong("...", "it has a zero byte");
  if (text.substr(0, kIpc.size()) == kIpc) {
    const std::string_view path = text.substr(kIpc.size());
    if (path.empty()) return Wrong(text, "the path is missing");
    // ZeroMQ gives these first characters meanings of their own, which have no file and so no file permissions.
    if (path.front() == '@' || path.front() == '*') return Wrong(text, "a path cannot start with @ or *");
    if (path.back() == '/') return Wrong(text, "the path is a folder");
    if (path.size() > kMaxPathBytes) {
      return Wrong(text, "the path is " + std::to_string(path.size()) + " bytes long and a socket's path holds " +
                             std::to_string(kMaxPathBytes) + "; choose a shorter one");
    }
    Endpoint endpoint;
    endpoint.path = std::string(path);
    return endpoint;
  }
  if (text.substr(0, kTcp.size()) == kTcp) {
    const std::string_view rest = text.substr(kTcp.size());
    const std::size_t colon = rest.rfind(':');
    if (colon == std::string_view::npos) return Wrong(text, "the port is missing");
    const std::string_view host = rest.substr(0, colon);
    std::string_view port = rest.substr(colon + 1);
    if (!IsHost(host, use)) return Wrong(text, "the host is not one");
    if (port == "*" && use == EndpointUse::kListen) port = "0";
    int number = -1;
    const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), number);
    const int lowest = use == EndpointUse::kListen ? 0 : 1;
    if (error != std::errc() || end != port.data() + port.size() || number < lowest || number > 65535) {
      return Wrong(text, "the port is not a number within " + std::to_string(lowest) + "..65535");
    }
    Endpoint endpoint;
    endpoint.transport = Transport::kTcp;
    endpoint.host = std::string(host);
    endpoint.port = number;
    return endpoint;
  }
  return Wrong(text, "neither ipc:// nor tcp://");
}

}  // namespace kvshare
