// The cold tier's bandwidth beside its limit, in one run: records of 2 MiB through the tier, through bare pre-allocated
// O_DIRECT slab files, and through plain RocksDB with FIFO compaction. The three take turns, so that whatever else the
// machine does meets them alike; medians are printed, and the tier's share of the bare file.
//
//   tiers_bench [DIRECTORY] [MIB PER RUN] [ROUNDS] [RECORD KIB] [THREADS]
//
// "bare slab, N threads" is the limit at the tier's own number of I/O threads, "bare slab, 1 thread" what one gets.
#include <fcntl.h>
#include <rocksdb/db.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/tiers/aligned_buffer.h"
#include "agentd/tiers/cold_tier.h"
#include "agentd/tiers/record.h"

namespace kvshare::agentd {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct Setup {
  fs::path directory;
  std::size_t record_bytes = 2 << 20;
  std::size_t records = 512;
  int threads = 3;
};

struct Bandwidth {
  double write = 0;  // GB/s of payload
  double read = 0;
};

double GbPerSecond(const Setup& setup, Clock::time_point start) {
  const std::chrono::duration<double> took = Clock::now() - start;
  return static_cast<double>(setup.records * setup.record_bytes) / took.count() / 1e9;
}

// Everybody writes from, and reads into, as many buffers in turn: KV comes from a pool, not from a cache line that the
// last write left warm. Reads visit records in random order.
constexpr std::size_t kBuffers = 32;

std::vector<std::unique_ptr<AlignedBuffer>> Buffers(std::size_t count, std::size_t bytes) {
  std::mt19937_64 rng(1);
  std::vector<std::unique_ptr<AlignedBuffer>> buffers;
  for (std::size_t i = 0; i < count; ++i) {
    buffers.push_back(std::make_unique<AlignedBuffer>(bytes));
    for (std::byte& byte : buffers.back()->bytes()) byte = static_cast<std::byte>(rng());
  }
  return buffers;
}

std::vector<std::size_t> RandomOrder(std::size_t n) {
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), std::mt19937_64(2));
  return order;
}

void Fail(const std::string& what) {
  std::fprintf(stderr, "tiers_bench: %s\n", what.c_str());
  std::exit(1);
}

// The limit: as many bytes per record as a slot has, into a file that has its blocks already.
Bandwidth BareSlab(const Setup& setup, int threads) {
  const std::string path = (setup.directory / "bare.slab").string();
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600);
  const std::size_t slot = SlotBytes(setup.record_bytes);
  if (fd < 0 || fallocate(fd, 0, 0, static_cast<off_t>(slot * setup.records)) != 0) Fail(path + ": no direct I/O here");
  const auto buffers = Buffers(kBuffers, slot);
  const auto run = [&](auto transfer) {
    const auto start = Clock::now();
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        for (std::size_t i = static_cast<std::size_t>(t); i < setup.records; i += static_cast<std::size_t>(threads)) {
          if (transfer(i, buffers[i % kBuffers]->bytes()) != static_cast<ssize_t>(slot)) Fail(path + ": I/O failed");
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    return GbPerSecond(setup, start);
  };
  Bandwidth result;
  result.write = run(
      [&](std::size_t i, auto bytes) { return pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(i * slot)); });
  const std::vector<std::size_t> order = RandomOrder(setup.records);
  result.read = run([&](std::size_t i, auto bytes) {
    return pread(fd, bytes.data(), bytes.size(), static_cast<off_t>(order[i] * slot));
  });
  close(fd);
  fs::remove(path);
  return result;
}

Bandwidth Tier(const Setup& setup) {
  const fs::path directory = setup.directory / "tier";
  const std::size_t slot = SlotBytes(setup.record_bytes);
  const ColdTierOptions options = {.directory = directory.string(),
                                   .max_bytes = static_cast<std::int64_t>((slot + 4096) * setup.records) + (64 << 20),
                                   .space = ContentDigest({}),
                                   .page_bytes = setup.record_bytes,
                                   .read_threads = setup.threads,
                                   .write_threads = setup.threads,
                                   .scrub_bytes_per_second = 0};
  const auto buffers = Buffers(kBuffers, PayloadBytes(setup.record_bytes));
  std::vector<ColdPage> pages(setup.records);
  for (std::size_t i = 0; i < pages.size(); ++i) {
    for (TokenId t = 0; t < 64; ++t) pages[i].tokens.push_back(static_cast<TokenId>(i * 64) + t);
    pages[i].parent = i % 32 == 0 ? options.space : pages[i - 1].context;
    pages[i].context = ChainContext(pages[i].parent, pages[i].tokens);
  }
  Bandwidth result;
  {
    auto tier = ColdTier::Open(options);
    if (!tier.ok()) Fail(tier.status().message());
    const auto start = Clock::now();
    for (std::size_t i = 0; i < pages.size(); ++i) {
      const auto kv = buffers[i % buffers.size()]->bytes().first(setup.record_bytes);
      while (!(*tier)->Store(pages[i], kv)) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    while ((*tier)->stats().pending > 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
    result.write = GbPerSecond(setup, start);
  }
  auto tier = ColdTier::Open(options);
  if (!tier.ok()) Fail(tier.status().message());
  std::vector<ColdLoad> loads;
  const std::vector<std::size_t> order = RandomOrder(pages.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    loads.push_back({pages[order[i]].context, buffers[i % buffers.size()]->bytes().first(setup.record_bytes)});
  }
  // As an engine asks: a prompt's worth at a time, each page to a place of its own.
  constexpr std::size_t kPrompt = 16;
  const auto start = Clock::now();
  for (std::size_t begin = 0; begin < loads.size(); begin += kPrompt) {
    const std::size_t end = std::min(begin + kPrompt, loads.size());
    std::promise<bool> promise;
    (*tier)->Load(
        {loads.begin() + static_cast<std::ptrdiff_t>(begin), loads.begin() + static_cast<std::ptrdiff_t>(end)},
        [&promise](const std::vector<ColdLoaded>& loaded) {
          promise.set_value(
              std::all_of(loaded.begin(), loaded.end(), [](const ColdLoaded& page) { return page.status.ok(); }));
        });
    if (!promise.get_future().get()) Fail("a page of the tier could not be loaded");
  }
  result.read = GbPerSecond(setup, start);
  tier->reset();
  fs::remove_all(directory);
  return result;
}

Bandwidth PlainRocksDb(const Setup& setup) {
  const fs::path directory = setup.directory / "rocksdb";
  rocksdb::Options options;
  options.create_if_missing = true;
  options.compression = rocksdb::kNoCompression;
  options.compaction_style = rocksdb::kCompactionStyleFIFO;
  options.compaction_options_fifo.max_table_files_size = std::uint64_t{1} << 40;
  options.num_levels = 1;
  options.write_buffer_size = std::size_t{64} << 20;
  rocksdb::BlockBasedTableOptions table;  // filters, or every Get would read a value from every table on its way
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  table.no_block_cache = true;
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.use_direct_reads = true;
  options.use_direct_io_for_flush_and_compaction = true;
  const auto buffers = Buffers(kBuffers, PayloadBytes(setup.record_bytes));
  const auto open_db = [&] {
    rocksdb::DB* db = nullptr;
    const auto status = rocksdb::DB::Open(options, directory.string(), &db);
    if (!status.ok()) Fail(status.ToString());
    return std::unique_ptr<rocksdb::DB>(db);
  };
  Bandwidth result;
  const auto key = [](std::size_t i) { return ContentDigest(std::vector<TokenId>{static_cast<TokenId>(i)}).Hex(); };
  {
    const auto db = open_db();
    rocksdb::WriteOptions write;
    write.disableWAL = true;
    const auto start = Clock::now();
    for (std::size_t i = 0; i < setup.records; ++i) {
      const auto kv = buffers[i % buffers.size()]->bytes().first(setup.record_bytes);
      if (!db->Put(write, key(i), {reinterpret_cast<const char*>(kv.data()), kv.size()}).ok()) Fail("Put");
    }
    if (!db->Flush({}).ok()) Fail("Flush");
    result.write = GbPerSecond(setup, start);
  }
  {
    const auto db = open_db();
    const std::vector<std::size_t> order = RandomOrder(setup.records);
    std::vector<std::string> keys;
    for (const std::size_t i : order) keys.push_back(key(i));
    const auto start = Clock::now();
    std::vector<std::thread> workers;
    for (int t = 0; t < setup.threads; ++t) {
      workers.emplace_back([&, t] {
        std::string value;
        for (std::size_t i = static_cast<std::size_t>(t); i < keys.size();
             i += static_cast<std::size_t>(setup.threads)) {
          if (!db->Get({}, keys[i], &value).ok()) Fail("Get");
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    result.read = GbPerSecond(setup, start);
  }
  fs::remove_all(directory);
  return result;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int Main(int argc, char** argv) {
  Setup setup;
  setup.directory = fs::path(argc > 1 ? argv[1] : ".") / ("tiers_bench." + std::to_string(getpid()));
  setup.record_bytes = static_cast<std::size_t>(argc > 4 ? std::atoll(argv[4]) : 2048) << 10;
  setup.records = (static_cast<std::size_t>(argc > 2 ? std::atoll(argv[2]) : 1024) << 20) / setup.record_bytes;
  setup.threads = argc > 5 ? std::atoi(argv[5]) : setup.threads;
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 5;
  if (setup.records < 1 || rounds < 1 || setup.threads < 1) Fail("nothing to measure");
  fs::create_directories(setup.directory);
  const std::string many = "bare slab, " + std::to_string(setup.threads) + " threads";
  std::vector<std::pair<std::string, std::vector<Bandwidth>>> rows = {
      {many, {}}, {"bare slab, 1 thread", {}}, {"cold tier", {}}, {"RocksDB, FIFO", {}}};
  for (int round = 0; round < rounds; ++round) {
    rows[0].second.push_back(BareSlab(setup, setup.threads));
    rows[2].second.push_back(Tier(setup));
    rows[1].second.push_back(BareSlab(setup, 1));
    rows[3].second.push_back(PlainRocksDb(setup));
  }
  fs::remove_all(setup.directory);
  std::printf("%zu records of %zu KiB, medians of %d rounds, GB/s (share of %s)\n", setup.records,
              setup.record_bytes >> 10, rounds, many.c_str());
  Bandwidth limit;
  for (const auto& [name, results] : rows) {
    std::vector<double> writes, reads;
    for (const Bandwidth& result : results) {
      writes.push_back(result.write);
      reads.push_back(result.read);
    }
    const Bandwidth median = {Median(writes), Median(reads)};
    if (limit.write == 0) limit = median;
    std::printf("  %-22s write %5.2f (%3.0f %%)   read %5.2f (%3.0f %%)\n", name.c_str(), median.write,
                100 * median.write / limit.write, median.read, 100 * median.read / limit.read);
  }
  return 0;
}

}  // namespace
}  // namespace kvshare::agentd

int main(int argc, char** argv) { return kvshare::agentd::Main(argc, argv); }
