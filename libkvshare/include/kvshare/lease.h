// Lease: stored KV that stays where it is while you read it.
//
//   auto lease = client->Acquire({.prompt = kvshare::TextPrompt{text}});
//   for (std::size_t i = 0; i < lease->pages().size(); ++i) {
//     auto bytes = lease->PageBytes(i);              // read-only, in the daemon's memory: nothing was copied
//     if (!bytes.ok()) return Fail(bytes.status());  // over tcp there is no memory to share
//     Use(*bytes);
//     if (!lease->Valid(i)) Discard();               // the lease had ended: what was read may be something else
//   }
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare {

// Move-only; releases when destroyed. One thread at a time. May outlive its Client: then it has ended, and the memory
// stays mapped as long as the lease's object is there.
class Lease {
 public:
  // What stands behind a lease, one for each kind of client. Its destructor releases.
  class Backing {
   public:
    virtual ~Backing() = default;
    virtual const LeaseInfo& info() const = 0;
    virtual Result<std::span<const std::byte>> PageBytes(std::size_t index) const = 0;
    virtual bool Valid(std::size_t index) const = 0;
    virtual Status Release() = 0;  // at most once
  };

  Lease() = default;  // holds nothing
  explicit Lease(std::unique_ptr<Backing> backing);
  Lease(Lease&&) noexcept = default;
  Lease& operator=(Lease&&) noexcept = default;
  ~Lease();

  // False when nothing of the prompt was stored, and after Release.
  explicit operator bool() const { return tokens() > 0; }
  std::uint64_t id() const;
  std::int64_t tokens() const;         // leading tokens of the prompt whose KV is here
  const KvLayoutInfo& layout() const;  // of each page (docs/formats/kv-page.md)
  std::span<const LeasePage> pages() const;
  std::chrono::milliseconds ttl() const;  // since Acquire

  // The page's bytes, layout().page_bytes of them, of which valid_tokens rows mean something. Mapped read-only: writing
  // there ends the process. InvalidArgument beyond pages(), FailedPrecondition where the memory cannot be shared.
  Result<std::span<const std::byte>> PageBytes(std::size_t index) const;
  // Whether the page has held this lease's content all the time until now. Costs a load, no round trip: ask after
  // reading. False beyond pages().
  bool Valid(std::size_t index) const;
  bool Valid() const;  // of all pages

  // Gives back now, and tells whether the lease had lasted (NotFound: it had ended before). Afterwards empty.
  Status Release();

 private:
  const LeaseInfo& info() const;

  std::unique_ptr<Backing> backing_;
};

}  // namespace kvshare
