// Runs the C program capi_test.c against a real server; the service behind it echoes.
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>

#include <array>
#include <string>

#include "agentd/server/router_server.h"
#include "tests/testing/echo_service.h"
#include "tests/testing/temp_dir.h"

extern char** environ;

namespace kvshare {
namespace {

TEST(CapiTest, ACProgramIsServed) {
  kvshare::testing::TempDir dir;
  kvshare::testing::EchoService service;
  ASSERT_TRUE(service.ShareMemory(8).ok());
  const auto server = agentd::StartRouterServer(&service, {.endpoint = "ipc://" + dir.File("d.sock")});
  ASSERT_TRUE(server.ok()) << server.status().message();
  std::string program = KVS_CAPI_PROGRAM, endpoint = (*server)->endpoint();
  const std::array<char*, 3> args = {program.data(), endpoint.data(), nullptr};
  pid_t pid = 0;
  ASSERT_EQ(::posix_spawn(&pid, program.c_str(), nullptr, nullptr, args.data(), environ), 0);
  int ended = 0;
  ASSERT_EQ(::waitpid(pid, &ended, 0), pid);
  EXPECT_TRUE(WIFEXITED(ended) && WEXITSTATUS(ended) == 0) << "see its message above";
  EXPECT_TRUE(service.WaitForLeases(0));
}

}  // namespace
}  // namespace kvshare
