// A lease of a daemon's: released over the connection that got it, read in the memory that the daemon shares.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "kvshare/lease.h"
#include "libkvshare/client/connection.h"
#include "libkvshare/client/mapped_pages.h"

namespace kvshare::client_internal {

struct RemoteLeaseParts {
  LeaseInfo info;
  std::weak_ptr<Connection> connection;  // gone: so is the lease
  std::uint64_t link = 0;                // the daemon that gave it
  std::shared_ptr<MappedPages> pages;    // null: not_mapped says why
  Status not_mapped;
  std::chrono::milliseconds timeout{0};  // of Release
};

std::unique_ptr<Lease::Backing> NewRemoteLease(RemoteLeaseParts parts);

}  // namespace kvshare::client_internal
