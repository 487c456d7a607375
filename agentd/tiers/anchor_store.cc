#include "agentd/tiers/anchor_store.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <span>
#include <system_error>
#include <utility>

#include "agentd/tiers/fault_points.h"
#include "agentd/tiers/space_directory.h"
#include "agentd/tiers/whole_file.h"
#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

namespace fs = std::filesystem;
using anchors::Anchor;
using anchors::AnchorFault;
using anchors::AnchorOwner;
using anchors::ListedAnchor;

constexpr char kListName[] = "LIST";
constexpr std::int64_t kBlock = 4096;
constexpr std::size_t kScopeDigits = 64, kSpaceDigits = 32;
// A session's two directories; and with what its list takes whatever is in it, twice while it is replaced.
constexpr std::int64_t kDirectoriesBytes = 2 * kBlock;
constexpr std::int64_t kPlaceBytes = kDirectoriesBytes + 2 * kBlock;

// What a record takes on disk, its lines in the list and the list's successor included.
std::int64_t OnDisk(const Anchor& anchor) {
  const auto bytes = static_cast<std::int64_t>(AnchorRecordBytes(anchor)) + 2 * 64;
  return (bytes + kBlock - 1) / kBlock * kBlock;
}

Digest ChecksumOf(std::span<const std::byte> record) {
  Digest digest;
  const auto end = record.last(sizeof digest);
  std::transform(end.begin(), end.end(), digest.bytes.begin(),
                 [](std::byte b) { return static_cast<std::uint8_t>(b); });
  return digest;
}

std::string RecordName(std::uint64_t version) {
  char name[32];
  std::snprintf(name, sizeof name, "%016llx.anchor", static_cast<unsigned long long>(version));
  return name;
}

// Only what carries our kind of name is ours to read or delete.
bool IsHex(const std::string& name, std::size_t digits) {
  return name.size() == digits && name.find_first_not_of("0123456789abcdef") == std::string::npos;
}

bool IsDirectory(const fs::path& path) {
  struct stat info {};
  return lstat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

}  // namespace

AnchorStore::AnchorStore(AnchorStoreOptions options) : options_(std::move(options)), thread_([this] { Run(); }) {}

AnchorStore::~AnchorStore() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

AnchorOwner AnchorStore::OwnerOf(const std::string& session) const {
  return {
      .space = options_.space, .scope = anchors::ScopeOf(session), .layers = options_.layers, .width = options_.width};
}

std::string AnchorStore::PathOf(const std::string& session) const {
  return options_.directory + "/" + anchors::ScopeOf(session).Hex() + "/" +
         options_.space.Hex().substr(0, kSpaceDigits);
}

void AnchorStore::Save(const std::string& session, std::vector<Anchor> pool) {
  KVS_CHECK(!session.empty());
  {
    const std::lock_guard lock(mutex_);
    const auto waits = std::find_if(jobs_.rbegin(), jobs_.rend(),
                                    [&](const Job& job) { return job.what != What::kSave || job.session == session; });
    // Not past a load or a clear: those are answered in the order of the calls.
    if (waits != jobs_.rend() && waits->what == What::kSave) {
      waits->pool = std::move(pool);
      return;
    }
    jobs_.push_back({.what = What::kSave, .session = session, .pool = std::move(pool), .done = nullptr});
  }
  changed_.notify_all();
}

void AnchorStore::Load(const std::string& session, std::function<void(std::vector<Anchor>)> done) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back({.what = What::kLoad, .session = session, .pool = {}, .done = std::move(done)});
  }
  changed_.notify_all();
}

void AnchorStore::Clear() {
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(jobs_, [](const Job& job) { return job.what == What::kSave; });
    jobs_.push_back({.what = What::kClear, .session = {}, .pool = {}, .done = nullptr});
  }
  changed_.notify_all();
}

void AnchorStore::Flush() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return jobs_.empty() && !busy_; });
}

AnchorStoreStats AnchorStore::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void AnchorStore::Run() {
  Scan();
  while (true) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      stats_.bytes = bytes();
      busy_ = false;
      changed_.notify_all();
      changed_.wait(lock, [this] { return !jobs_.empty() || stopping_; });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
      busy_ = true;
    }
    switch (job.what) {
      case What::kSave: DoSave(job); break;
      case What::kLoad: job.done(DoLoad(job.session)); break;
      case What::kClear: DoClear(); break;
    }
  }
}

// What lies there from before.
void AnchorStore::Scan() {
  std::error_code error;
  for (fs::directory_iterator scope(options_.directory, error), end; !error && scope != end; scope.increment(error)) {
    if (!IsHex(scope->path().filename().string(), kScopeDigits) || !IsDirectory(scope->path())) continue;
    std::error_code inner;
    for (fs::directory_iterator space(scope->path(), inner); !inner && space != end; space.increment(inner)) {
      if (!IsHex(space->path().filename().string(), kSpaceDigits) || !IsDirectory(space->path())) continue;
      Place& place = places_[space->path().string()];
      place.bytes = DirectoryBytes(space->path().string()) + kDirectoriesBytes;
      struct stat info {};
      if (lstat((space->path() / kListName).c_str(), &info) == 0) {
        place.used_at = std::int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
      }
    }
  }
}

std::int64_t AnchorStore::bytes() const {
  std::int64_t sum = 0;
  for (const auto& [path, place] : places_) sum += place.bytes;
  return sum;
}

void AnchorStore::Miss(AnchorFault fault) {
  const std::lock_guard lock(mutex_);
  ++stats_.misses[static_cast<std::size_t>(fault)];
}

// Records have names of their own, so nothing that the list on disk names is touched before the list is replaced: at
// every moment it names one whole snapshot. Only where the quota has no room for both is the list first cut down to
// what the old and the new one share.
void AnchorStore::DoSave(const Job& job) {
  const std::string path = PathOf(job.session);
  const AnchorOwner owner = OwnerOf(job.session);
  // The newest that fit.
  std::vector<const Anchor*> pool;
  std::int64_t room = options_.max_bytes - kPlaceBytes;
  std::int64_t dropped = 0;
  for (auto anchor = job.pool.rbegin(); anchor != job.pool.rend(); ++anchor) {
    const std::int64_t takes = OnDisk(*anchor);
    if (takes <= room && dropped == 0) {
      room -= takes;
      pool.insert(pool.begin(), &*anchor);
    } else {
      ++dropped;
    }
  }
  const std::vector<ListedAnchor>& known = listed_[path];
  std::vector<ListedAnchor> list, kept;
  std::vector<const Anchor*> fresh;
  std::int64_t fresh_bytes = kPlaceBytes;
  for (const Anchor* anchor : pool) {
    const auto same = std::find_if(known.begin(), known.end(), [anchor](const ListedAnchor& listed) {
      return listed.version == anchor->version && listed.serial == anchor->serial;
    });
    if (same != known.end()) {
      kept.push_back(*same);
      kept.back().used = anchor->used;
    } else {
      fresh.push_back(anchor);
      fresh_bytes += OnDisk(*anchor);
    }
  }
  if (pool.empty() && !places_.contains(path)) return Count(0, dropped);
  std::error_code error, ignored;
  fs::create_directories(path, error);
  places_.try_emplace(path, Place{.bytes = kPlaceBytes, .used_at = 0});
  while (bytes() + fresh_bytes > options_.max_bytes && EvictOldestBut(path)) {
  }
  bool good = !error;
  if (good && bytes() + fresh_bytes > options_.max_bytes) {
    good = WriteList(path, kept, owner);
    if (good) Sweep(path, kept);
  }
  if (FreeBytesBeyondReserve(options_.directory) < fresh_bytes) good = false;
  list = kept;
  std::int64_t saved = 0;
  for (const Anchor* anchor : fresh) {
    ListedAnchor listed;
    good = good && WriteRecord(path, *anchor, owner, &listed);
    if (!good) break;
    FaultPoint("anchors.after_record");
    list.push_back(listed);
    ++saved;
  }
  std::sort(list.begin(), list.end(), [](const ListedAnchor& a, const ListedAnchor& b) { return a.serial < b.serial; });
  good = good && WriteList(path, list, owner);
  if (!good) {
    // What was saved before stays, as far as the quota did not cut it down. It is tried again with the next change.
    for (const Anchor* anchor : fresh) fs::remove(path + "/" + RecordName(anchor->version), ignored);
    places_[path].bytes = DirectoryBytes(path) + kDirectoriesBytes;
    dropped = static_cast<std::int64_t>(job.pool.size() - kept.size());
    saved = 0;
  } else {
    FaultPoint("anchors.after_list");
    Sweep(path, list);
  }
  Count(saved, dropped);
}

void AnchorStore::Count(std::int64_t saved, std::int64_t dropped) {
  const std::lock_guard lock(mutex_);
  stats_.saved += saved;
  stats_.dropped += dropped;
}

bool AnchorStore::WriteRecord(const std::string& path, const Anchor& anchor, const AnchorOwner& owner,
                              ListedAnchor* listed) {
  const std::vector<std::byte> record = EncodeAnchor(anchor, owner);
  listed->serial = anchor.serial;
  listed->version = anchor.version;
  listed->used = anchor.used;
  listed->bytes = record.size();
  listed->checksum = ChecksumOf(record);
  return WriteWhole(path + "/" + RecordName(anchor.version), record);
}

bool AnchorStore::WriteList(const std::string& path, const std::vector<ListedAnchor>& list, const AnchorOwner& owner) {
  if (!WriteWhole(path + "/" + kListName, EncodeAnchorList(list, owner))) return false;
  listed_[path] = list;
  return true;
}

void AnchorStore::Sweep(const std::string& path, const std::vector<ListedAnchor>& list) {
  std::error_code error, ignored;
  std::vector<fs::path> useless;
  for (fs::directory_iterator file(path, error), end; !error && file != end; file.increment(error)) {
    const std::string name = file->path().filename().string();
    const bool named = std::any_of(list.begin(), list.end(),
                                   [&](const ListedAnchor& listed) { return RecordName(listed.version) == name; });
    if (!named && name != kListName) useless.push_back(file->path());
  }
  for (const fs::path& file : useless) fs::remove(file, ignored);
  Place& place = places_[path];
  place.bytes = DirectoryBytes(path) + kDirectoriesBytes;
  struct stat info {};
  if (lstat((path + "/" + kListName).c_str(), &info) == 0) {
    place.used_at = std::int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
  }
}

// False when there is no other.
bool AnchorStore::EvictOldestBut(const std::string& path) {
  auto oldest = places_.end();
  for (auto place = places_.begin(); place != places_.end(); ++place) {
    if (place->first == path) continue;
    if (oldest == places_.end() || place->second.used_at < oldest->second.used_at) oldest = place;
  }
  if (oldest == places_.end()) return false;
  std::error_code ignored;  // what cannot be deleted is found again at the next start
  fs::remove(fs::path(oldest->first) / kListName, ignored);
  fs::remove_all(oldest->first, ignored);
  fs::remove(fs::path(oldest->first).parent_path(), ignored);  // if it was the scope's last
  listed_.erase(oldest->first);
  places_.erase(oldest);
  return true;
}

std::vector<Anchor> AnchorStore::DoLoad(const std::string& session) {
  const std::string path = PathOf(session);
  const AnchorOwner owner = OwnerOf(session);
  listed_.erase(path);
  std::vector<Anchor> pool;
  AnchorFault fault = AnchorFault::kNone;
  const auto list_bytes = ReadWhole(path + "/" + kListName, options_.max_bytes, &fault);
  if (!list_bytes.has_value()) {
    const std::string scope = fs::path(path).parent_path().string() + "/";
    const bool elsewhere = std::any_of(places_.begin(), places_.end(), [&](const auto& place) {
      return place.first.starts_with(scope) && place.first != path;
    });
    if (fault == AnchorFault::kNone && elsewhere) fault = AnchorFault::kOtherSpace;
    if (fault != AnchorFault::kNone) Miss(fault);
    return pool;
  }
  std::vector<ListedAnchor> list;
  fault = DecodeAnchorList(*list_bytes, owner, &list);
  if (fault != AnchorFault::kNone) {
    Miss(fault);
    return pool;
  }
  std::vector<ListedAnchor> good;
  std::int64_t left = options_.max_bytes;  // so much was saved at most
  for (const ListedAnchor& listed : list) {
    const auto record = ReadWhole(path + "/" + RecordName(listed.version), left, &fault);
    if (!record.has_value() && fault == AnchorFault::kNone) fault = AnchorFault::kDamaged;  // it was there
    Anchor anchor;
    if (record.has_value()) fault = DecodeAnchor(*record, owner, &anchor);
    const auto right = [&] {
      return record->size() == listed.bytes && anchor.serial == listed.serial && anchor.version == listed.version &&
             ChecksumOf(*record) == listed.checksum;
    };
    if (fault == AnchorFault::kNone && !right()) fault = AnchorFault::kDamaged;
    if (fault != AnchorFault::kNone) {
      Miss(fault);
      continue;
    }
    left -= static_cast<std::int64_t>(record->size());
    anchor.used = listed.used;
    pool.push_back(std::move(anchor));
    good.push_back(listed);
  }
  listed_[path] = std::move(good);
  if (utimensat(AT_FDCWD, (path + "/" + kListName).c_str(), nullptr, AT_SYMLINK_NOFOLLOW) == 0) {
    struct timespec now {};
    clock_gettime(CLOCK_REALTIME, &now);
    places_[path].used_at = std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
  }
  const std::lock_guard lock(mutex_);
  stats_.loaded += static_cast<std::int64_t>(pool.size());
  return pool;
}

void AnchorStore::DoClear() {
  while (EvictOldestBut({})) {
  }
}

}  // namespace kvshare::agentd
