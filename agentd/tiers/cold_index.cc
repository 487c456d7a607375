#include "agentd/tiers/cold_index.h"

#include <rocksdb/db.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>

#include <cerrno>
#include <cstdarg>
#include <cstring>
#include <exception>

#include "agentd/tiers/record.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

// RocksDB's own log is no help to an operator and grows without bound of ours; its errors reach us as statuses.
class NoLog : public rocksdb::Logger {
 public:
  using rocksdb::Logger::Logv;
  void Logv(const char*, va_list) override {}
};

rocksdb::Slice SliceOf(std::string_view text) { return {text.data(), text.size()}; }
std::string_view ViewOf(const rocksdb::Slice& slice) { return {slice.data(), slice.size()}; }

Status WriteError(const rocksdb::Status& status) {
  const std::string message = "the cold tier's index: " + status.ToString();
  return status.IsNoSpace() ? ResourceExhausted(message) : Unavailable(message);
}

// Damage; or a machine that has no room, memory or descriptors for an index that may well be sound.
Status OpenError(const std::string& directory, const rocksdb::Status& status) {
  const std::string message = directory + ": " + status.ToString();
  bool wanting = status.IsNoSpace() || status.IsMemoryLimit();
  for (const int error : {EDQUOT, EMFILE, ENFILE, ENOMEM}) {
    wanting = wanting || message.find(std::strerror(error)) != std::string::npos;
  }
  return wanting ? ResourceExhausted(message) : DataLoss(message);
}

// Entries are few hundred bytes and read once, at the start: small buffers, no cache, no compression.
rocksdb::Options Settings() {
  rocksdb::Options options;
  options.paranoid_checks = true;
  options.compression = rocksdb::kNoCompression;
  options.write_buffer_size = std::size_t{1} << 20;
  options.max_total_wal_size = std::uint64_t{2} << 20;
  options.target_file_size_base = std::uint64_t{8} << 20;
  options.max_bytes_for_level_base = std::uint64_t{32} << 20;
  options.max_manifest_file_size = std::size_t{1} << 20;
  options.max_open_files = 64;
  options.max_background_jobs = 2;
  options.allow_fallocate = false;  // a log of 1 MiB should not take 1.1 MiB from the first byte on
  options.stats_dump_period_sec = 0;
  options.stats_persist_period_sec = 0;
  options.keep_log_file_num = 1;
  options.info_log = std::make_shared<NoLog>();
  // A kill may leave the log's end torn. Damage anywhere else fails Open, and the slabs' headers then give back what
  // RocksDB's default, stopping at the first bad record, would silently forget.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  rocksdb::BlockBasedTableOptions table;
  table.no_block_cache = true;
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return options;
}

class RocksIndex : public ColdIndex {
 public:
  explicit RocksIndex(rocksdb::DB* db) : db_(db) {}
  ~RocksIndex() override { static_cast<void>(db_->Close()); }

  Status ForEach(const Visitor& visit) override {
    const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(ReadAll()));
    for (it->SeekToFirst(); it->Valid(); it->Next()) visit(ViewOf(it->key()), ViewOf(it->value()));
    return it->status().ok() ? OkStatus() : DataLoss("the cold tier's index: " + it->status().ToString());
  }

  Status Apply(const IndexBatch& batch) override {
    rocksdb::WriteBatch writes;
    rocksdb::Status status;
    for (const Digest& key : batch.deletes) {
      if (status.ok()) status = writes.Delete(SliceOf(KeyOf(key)));
    }
    for (const auto& [key, value] : batch.puts) {
      if (status.ok()) status = writes.Put(SliceOf(KeyOf(key)), SliceOf(value));
    }
    if (status.ok()) status = db_->Write(rocksdb::WriteOptions(), &writes);
    return status.ok() ? OkStatus() : WriteError(status);
  }

  Status Sync() override {
    const rocksdb::Status status = db_->SyncWAL();
    return status.ok() ? OkStatus() : WriteError(status);
  }

  Status Clear() override {
    rocksdb::WriteBatch writes;
    const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(ReadAll()));
    rocksdb::Status status;
    for (it->SeekToFirst(); it->Valid() && status.ok(); it->Next()) status = writes.Delete(it->key());
    if (status.ok()) status = it->status();
    if (status.ok()) status = db_->Write(rocksdb::WriteOptions(), &writes);
    return status.ok() ? OkStatus() : WriteError(status);
  }

  void Resume() override { static_cast<void>(db_->Resume()); }

  static rocksdb::ReadOptions ReadAll() {
    rocksdb::ReadOptions options;
    options.verify_checksums = true;
    options.readahead_size = std::size_t{1} << 20;
    return options;
  }

 private:
  const std::unique_ptr<rocksdb::DB> db_;
};

}  // namespace

Result<std::unique_ptr<ColdIndex>> ColdIndex::Open(const std::string& directory, bool create) {
  // RocksDB reports by status; what its allocations and the standard library throw ends here.
  try {
    rocksdb::DB* db = nullptr;
    rocksdb::Options options = Settings();
    options.create_if_missing = create;
    const rocksdb::Status status = rocksdb::DB::Open(options, directory, &db);
    if (!status.ok()) return OpenError(directory, status);
    return std::unique_ptr<ColdIndex>(std::make_unique<RocksIndex>(db));
  } catch (const std::exception& error) {
    return DataLoss(directory + ": " + error.what());
  }
}

Status ColdIndex::ReadOnly(const std::string& directory,
                           const std::function<bool(std::string_view key, std::string_view value)>& visit) {
  try {
    rocksdb::DB* opened = nullptr;
    const rocksdb::Status status = rocksdb::DB::OpenForReadOnly(Settings(), directory, &opened);
    if (!status.ok()) return DataLoss(directory + ": " + status.ToString());
    const std::unique_ptr<rocksdb::DB> db(opened);
    const std::unique_ptr<rocksdb::Iterator> it(db->NewIterator(RocksIndex::ReadAll()));
    for (it->SeekToFirst(); it->Valid(); it->Next()) {
      if (!visit(ViewOf(it->key()), ViewOf(it->value()))) return OkStatus();
    }
    return it->status().ok() ? OkStatus() : DataLoss(directory + ": " + it->status().ToString());
  } catch (const std::exception& error) {
    return DataLoss(directory + ": " + error.what());
  }
}

}  // namespace kvshare::agentd
