// A program outside the house: the public C++ headers and libkvshare.so are all it has.
#include <kvshare/client.h>
#include <kvshare/session.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  auto client = kvshare::Connect({.endpoint = argv[1]});
  if (!client.ok()) {
    std::cerr << client.status().message() << "\n";
    return 1;
  }
  kvshare::Session session(client->get(), {.agent = "consumer"});
  kvshare::Context context;
  context.Append("user", std::string(400, 'a'));
  const auto reply = session.GenerateAll(context, {.max_tokens = 2});
  const auto lease = session.Acquire(context);
  if (!reply.ok() || !lease.ok()) {
    const kvshare::Status& status = reply.ok() ? lease.status() : reply.status();
    std::cerr << kvshare::StatusCodeName(status.code()) << ": " << status.message() << "\n";
    return 1;
  }
  const auto page = lease->PageBytes(0);
  if (!page.ok() || !lease->Valid()) {
    std::cerr << "the stored prompt cannot be read: " << page.status().message() << "\n";
    return 1;
  }
  std::cout << "tokens " << lease->tokens() << " bytes " << page->size() << "\n";
  return 0;
}
