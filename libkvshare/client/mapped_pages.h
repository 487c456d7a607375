// MappedPages: the daemon's KV memory in this process, read-only, and the connection that owns this process's leases.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvshare/status.h"
#include "libkvshare/codec/codec.h"

namespace kvshare::client_internal {

// Thread-safe. The memory stays mapped as long as this object lives, also when the daemon has gone.
class MappedPages {
 public:
  // Claims the memory behind `socket` with `ticket`. Unavailable when nobody answers there in time, FailedPrecondition
  // when the daemon refuses, or hands out something that is not safe to map.
  static Result<std::shared_ptr<MappedPages>> Claim(const std::string& socket, const std::vector<std::uint8_t>& ticket,
                                                    std::chrono::steady_clock::time_point deadline);
  ~MappedPages();
  MappedPages(const MappedPages&) = delete;
  MappedPages& operator=(const MappedPages&) = delete;

  std::int64_t page_bytes() const { return page_bytes_; }
  // Whether a page of `page_bytes` lies at `offset`.
  bool Holds(std::int64_t offset, std::int64_t page_bytes) const;
  // Requires Holds. Generation: as of now; what was read of the page before the call was read before the load.
  std::span<const std::byte> Page(std::int64_t offset) const;
  std::uint64_t Generation(std::int64_t offset) const;
  // Asks on the socket that gave the memory, which wakes fewer threads than ZeroMQ does. nullopt: this way is taken by
  // another thread, too narrow for it, or gone, and the caller asks by ZeroMQ. Whatever a question that was given up is
  // answered with, the daemon takes back.
  std::optional<Result<codec::Reply>> Ask(const codec::Request& request,
                                          std::chrono::steady_clock::time_point deadline);
  // Sends what has no answer. False when it could not be sent.
  bool Post(const codec::Request& request);
  // Tells the daemon that nothing is leased any more. The memory stays.
  void CloseLink();

 private:
  MappedPages() = default;
  Status Connect(const std::string& socket, std::chrono::steady_clock::time_point deadline);
  bool Send(const codec::Frame& frame);
  std::optional<Result<codec::Reply>> WaitReply(std::uint64_t correlation,
                                                std::chrono::steady_clock::time_point deadline);
  Status Map(int memory_fd, int generations_fd);

  int link_ = -1;
  std::atomic<bool> broken_ = false;  // nothing is said on the link any more
  std::mutex asking_;                 // one exchange at a time; guards the rest of these
  std::uint64_t last_correlation_ = 0;
  bool late_ = false;  // an answer that nobody waits for may be on its way
  std::vector<std::uint8_t> reply_;
  const std::byte* memory_ = nullptr;
  const std::byte* generations_ = nullptr;
  std::int64_t num_pages_ = 0;
  std::int64_t page_bytes_ = 0;
};

}  // namespace kvshare::client_internal
