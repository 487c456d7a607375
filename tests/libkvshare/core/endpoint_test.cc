#include "libkvshare/core/endpoint.h"

#include <gtest/gtest.h>

namespace kvshare {
namespace {

bool Connects(std::string_view text) { return ParseEndpoint(text, EndpointUse::kConnect).ok(); }
bool Listens(std::string_view text) { return ParseEndpoint(text, EndpointUse::kListen).ok(); }

TEST(EndpointTest, ReadsBothForms) {
  const Result<Endpoint> ipc = ParseEndpoint("ipc:///run/kvshare.sock", EndpointUse::kConnect);
  ASSERT_TRUE(ipc.ok());
  EXPECT_EQ(ipc->transport, Transport::kIpc);
  EXPECT_EQ(ipc->path, "/run/kvshare.sock");
  const Result<Endpoint> tcp = ParseEndpoint("tcp://[::1]:5555", EndpointUse::kConnect);
  ASSERT_TRUE(tcp.ok());
  EXPECT_EQ(tcp->transport, Transport::kTcp);
  EXPECT_EQ(tcp->host, "[::1]");
  EXPECT_EQ(tcp->port, 5555);
}

TEST(EndpointTest, APathMayHave107Bytes) {
  EXPECT_TRUE(Connects("ipc://" + std::string(107, 'a')));
  const Status status = ParseEndpoint("ipc://" + std::string(108, 'a'), EndpointUse::kConnect).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("107"), std::string::npos) << status.message();
}

TEST(EndpointTest, RefusesWhatCannotBeOne) {
  for (const char* text : {"",
                           "ipc://",
                           "ipc://@abstract",
                           "ipc://*",
                           "ipc:///tmp/",
                           "/run/kvshare.sock",
                           "tcp://",
                           "tcp://host",
                           "tcp://:5555",
                           "tcp://host:",
                           "tcp://host:0",
                           "tcp://host:65536",
                           "tcp://host:-1",
                           "tcp://host:5x",
                           "tcp://*:5555",
                           "tcp://host:*",
                           "tcp://a b:1",
                           "tcp://[::1:5555",
                           "tcp://[]:1",
                           "inproc://x",
                           "http://localhost:80",
                           "IPC:///x"}) {
    const Status status = ParseEndpoint(text, EndpointUse::kConnect).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << text;
  }
  EXPECT_FALSE(Connects(std::string_view("ipc://a\0b", 9)));
}

TEST(EndpointTest, ListenersMayLeavePortAndInterfaceOpen) {
  EXPECT_TRUE(Listens("tcp://127.0.0.1:*"));
  EXPECT_TRUE(Listens("tcp://127.0.0.1:0"));
  EXPECT_TRUE(Listens("tcp://*:5555"));
  EXPECT_FALSE(Listens("tcp://127.0.0.1:65536"));
}

}  // namespace
}  // namespace kvshare
