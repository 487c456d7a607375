#include "tools/trace/line_file.h"

#include <zlib.h>

#include <algorithm>
#include <utility>

namespace kvshare::trace {
namespace {

gzFile File(void* file) { return static_cast<gzFile>(file); }

}  // namespace

Result<std::unique_ptr<LineFile>> LineFile::Create(const std::string& path) {
  gzFile file = gzopen(path.c_str(), path.ends_with(".gz") ? "wb" : "wbT");  // T: as it is
  if (file == nullptr) return NotFound(path + ": cannot be created");
  return std::unique_ptr<LineFile>(new LineFile(path, file));
}

LineFile::~LineFile() {
  if (file_ != nullptr) gzclose(File(file_));
}

Status LineFile::Failed() const { return ResourceExhausted(path_ + ": could not be written"); }

Status LineFile::Write(std::string_view text) {
  constexpr std::size_t kPiece = std::size_t{1} << 24;  // gzwrite counts in int
  while (!text.empty()) {
    const std::size_t n = std::min(text.size(), kPiece);
    if (gzwrite(File(file_), text.data(), static_cast<unsigned>(n)) != static_cast<int>(n)) return Failed();
    text.remove_prefix(n);
  }
  return OkStatus();
}

Status LineFile::Flush() { return gzflush(File(file_), Z_SYNC_FLUSH) == Z_OK ? OkStatus() : Failed(); }

Status LineFile::Close() { return gzclose(File(std::exchange(file_, nullptr))) == Z_OK ? OkStatus() : Failed(); }

}  // namespace kvshare::trace
