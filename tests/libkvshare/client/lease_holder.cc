// A client of its own process, for tests that kill it or fork it.
//
//   lease_holder ENDPOINT hold N    leases N prompts, says "held", and lives until its input ends
//   lease_holder ENDPOINT fork     uses one client before and after fork(); exit 0 when parent and child were served
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "kvshare/client.h"

namespace {

using kvshare::Client;
using kvshare::Lease;
using kvshare::Result;

int Fail(const kvshare::Status& status) {
  std::fprintf(stderr, "lease_holder: %s\n", status.message().c_str());
  return 1;
}

int Hold(Client& client, int count) {
  std::vector<Lease> leases;
  for (int i = 0; i < count; ++i) {
    Result<Lease> lease = client.Acquire({.prompt = kvshare::TextPrompt{"prompt " + std::to_string(i)}});
    if (!lease.ok()) return Fail(lease.status());
    if (const auto page = lease->PageBytes(0); !page.ok()) return Fail(page.status());
    leases.push_back(*std::move(lease));
  }
  std::puts("held");
  std::fflush(stdout);
  char ignored = 0;
  return ::read(STDIN_FILENO, &ignored, 1) < 0 ? 1 : 0;
}

int Serve(Client& client) {
  const auto pong = client.Ping(std::chrono::seconds(20));
  if (!pong.ok()) return Fail(pong.status());
  const Result<Lease> lease = client.Acquire({.prompt = kvshare::TextPrompt{"forked"}});
  if (!lease.ok()) return Fail(lease.status());
  const auto page = lease->PageBytes(0);
  if (!page.ok()) return Fail(page.status());
  return lease->Valid() ? 0 : 1;
}

int Fork(std::unique_ptr<Client> client) {
  Result<Lease> before = client->Acquire({.prompt = kvshare::TextPrompt{"parent"}});
  if (!before.ok()) return Fail(before.status());
  const pid_t child = ::fork();
  if (child < 0) return 1;
  if (child == 0) {
    int served = Serve(*client);
    // The parent's lease can be read here, and is not this process's to give back.
    if (!before->Valid() || before->Release().ok()) served = 1;
    client.reset();
    ::_exit(served);
  }
  int ended = 0;
  if (::waitpid(child, &ended, 0) != child || !WIFEXITED(ended) || WEXITSTATUS(ended) != 0) return 1;
  if (Serve(*client) != 0) return 1;
  const kvshare::Status released = before->Release();
  return released.ok() ? 0 : Fail(released);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  Result<std::unique_ptr<Client>> client = kvshare::Connect({.endpoint = argv[1]});
  if (!client.ok()) return Fail(client.status());
  const std::string what = argv[2];
  if (what == "fork") return Fork(*std::move(client));
  return Hold(**client, argc > 3 ? std::atoi(argv[3]) : 1);
}
