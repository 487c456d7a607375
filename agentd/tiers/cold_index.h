// ColdIndex: the small durable map from names to slots, in RocksDB; the one place that knows RocksDB.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvshare/status.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

// Applied whole or not at all; what is deleted and put is put.
struct IndexBatch {
  std::vector<Digest> deletes;
  std::vector<std::pair<Digest, std::string>> puts;
  bool empty() const { return deletes.empty() && puts.empty(); }
};

// Thread-safe. What Apply has accepted survives kill -9; what Sync has, a power cut. Not to be used after a fork.
class ColdIndex {
 public:
  using Visitor = std::function<void(std::string_view key, std::string_view value)>;

  // DataLoss for anything that RocksDB finds wrong, and, unless `create`, where there is no index: the caller makes it
  // anew. (RocksDB itself takes a directory that lost its CURRENT file for an empty one.)
  static Result<std::unique_ptr<ColdIndex>> Open(const std::string& directory, bool create);
  // Visits an index that nobody has open, without changing it. Stops early when `visit` returns false.
  static Status ReadOnly(const std::string& directory,
                         const std::function<bool(std::string_view key, std::string_view value)>& visit);
  virtual ~ColdIndex() = default;

  // DataLoss when some of it cannot be read.
  virtual Status ForEach(const Visitor& visit) = 0;
  // ResourceExhausted when the disk is full, Unavailable otherwise: nothing was applied.
  virtual Status Apply(const IndexBatch& batch) = 0;
  virtual Status Sync() = 0;
  virtual Status Clear() = 0;
  // After a failed Apply: asks RocksDB to try again.
  virtual void Resume() = 0;
};

}  // namespace kvshare::agentd
