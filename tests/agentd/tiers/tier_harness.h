// Pages whose every byte follows from a number, so that whatever a tier gives back can be judged; and the tier's calls
// in a form that waits.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "agentd/tiers/aligned_buffer.h"
#include "agentd/tiers/cold_tier.h"
#include "agentd/tiers/record.h"
#include "libkvshare/core/check.h"

namespace kvshare::agentd {

inline constexpr std::uint64_t kPagesPerRun = 8;

inline Digest TestSpace(std::string_view name = "a model") { return DigestBuilder("test space").Text(name).Finish(); }

// Page `id` is page id % 8 of run id / 8. All runs start from the same root.
inline std::vector<TokenId> TestTokens(std::uint64_t id, std::size_t count = 64) {
  std::mt19937_64 rng(id * 77 + 1);
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) token = static_cast<TokenId>(rng() % 50000);
  return tokens;
}

inline ColdPage TestPage(std::uint64_t id, const Digest& space = TestSpace()) {
  ColdPage page;
  page.context = RootContext(space, Digest{});
  page.content_chain = ContentChainRoot();
  for (std::uint64_t before = id - id % kPagesPerRun; before <= id; ++before) {
    page.parent = page.context;
    page.tokens = TestTokens(before);
    page.context = ChainContext(page.parent, page.tokens);
    page.content_chain = ContentChain(page.content_chain, page.tokens);
  }
  page.start = static_cast<std::int64_t>(id % kPagesPerRun * 64);
  page.source = "agent " + std::to_string(id % 3);
  page.session = "session " + std::to_string(id / kPagesPerRun);
  return page;
}

// The first `count` tokens of page `id`, in its place.
inline ColdPage TestPartialPage(std::uint64_t id, std::size_t count) {
  ColdPage page = TestPage(id);
  page.tokens.resize(count);
  page.context = ChainContext(page.parent, page.tokens);
  page.content_chain = {};
  return page;
}

// Where in a slab's bytes the newest record of a page begins. Its name alone would not do: the next page's record has
// it too, and so has an older record of its own.
inline std::size_t SlotOf(const Digest& context, const std::string& slab, std::size_t page_bytes) {
  std::optional<std::size_t> found;
  std::uint64_t generation = 0;
  for (std::size_t slot = 0; slot + SlotBytes(page_bytes) <= slab.size(); slot += SlotBytes(page_bytes)) {
    const auto header = DecodeRecordHeader(std::as_bytes(std::span(slab.data() + slot, kRecordHeaderBytes)));
    if (!header.ok() || header->page.context != context || header->generation < generation) continue;
    found = slot;
    generation = header->generation;
  }
  KVS_CHECK(found.has_value());
  return *found;
}

inline std::vector<std::byte> TestKv(const Digest& context, std::size_t bytes) {
  std::uint64_t seed;
  std::memcpy(&seed, context.bytes.data(), sizeof seed);
  std::mt19937_64 rng(seed);
  std::vector<std::byte> kv(bytes);
  for (std::byte& byte : kv) byte = static_cast<std::byte>(rng());
  return kv;
}

inline bool SamePage(const ColdPage& a, const ColdPage& b) {
  return a.parent == b.parent && a.context == b.context && a.tokens == b.tokens && a.content_chain == b.content_chain &&
         a.start == b.start && a.source == b.source && a.session == b.session;
}

struct Loaded {
  Status status;
  ColdPage page;
  std::vector<std::byte> kv;
};

// Loads and waits. `aligned`: into memory that is read into directly.
inline std::vector<Loaded> LoadAll(ColdTier& tier, const std::vector<Digest>& contexts, std::size_t page_bytes,
                                   bool aligned = true) {
  std::vector<std::unique_ptr<AlignedBuffer>> memory;
  std::vector<ColdLoad> loads;
  for (const Digest& context : contexts) {
    memory.push_back(std::make_unique<AlignedBuffer>(PayloadBytes(page_bytes) + kRecordAlign));
    loads.push_back({context, memory.back()->bytes().subspan(aligned ? 0 : 8, page_bytes)});
  }
  std::promise<std::vector<ColdLoaded>> promise;
  tier.Load(loads, [&promise](std::vector<ColdLoaded> loaded) { promise.set_value(std::move(loaded)); });
  std::vector<ColdLoaded> results = promise.get_future().get();
  KVS_CHECK(results.size() == contexts.size());
  std::vector<Loaded> all;
  for (std::size_t i = 0; i < results.size(); ++i) {
    all.push_back({results[i].status, results[i].page,
                   std::vector<std::byte>(loads[i].destination.begin(), loads[i].destination.end())});
  }
  return all;
}

inline Loaded LoadOne(ColdTier& tier, const Digest& context, std::size_t page_bytes, bool aligned = true) {
  return std::move(LoadAll(tier, {context}, page_bytes, aligned).front());
}

// "" when page `id` comes back as it was stored, "missing" when it does not come back, else what is wrong.
inline std::string Judge(ColdTier& tier, const ColdPage& page, std::size_t page_bytes) {
  const Loaded loaded = LoadOne(tier, page.context, page_bytes);
  if (!loaded.status.ok()) return "missing";
  if (!SamePage(loaded.page, page)) return "another page was given back";
  return loaded.kv == TestKv(page.context, page_bytes) ? "" : "wrong bytes were given back";
}

// Stores, waiting for staging when it is busy.
inline bool StorePage(ColdTier& tier, const ColdPage& page, std::size_t page_bytes) {
  const std::vector<std::byte> kv = TestKv(page.context, page_bytes);
  if (tier.Store(page, kv)) return true;
  return tier.Flush().ok() && tier.Store(page, kv);
}

// The files under `directory` whose names end so.
inline std::vector<std::string> FilesEndingIn(const std::filesystem::path& directory, const std::string& end) {
  std::vector<std::string> files;
  for (const auto& item : std::filesystem::recursive_directory_iterator(directory)) {
    const std::string path = item.path().string();
    if (item.is_regular_file() && path.size() >= end.size() && path.substr(path.size() - end.size()) == end) {
      files.push_back(path);
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

inline std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline void Overwrite(const std::string& path, std::size_t offset, std::string_view bytes) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.flush();
  KVS_CHECK(file.good());
}

}  // namespace kvshare::agentd
