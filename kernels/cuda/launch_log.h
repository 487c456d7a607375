// The last launches, noted before they are made, for the message of an error that shows only later.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

namespace kvshare::kernels::cuda {

class LaunchLog {
 public:
  static constexpr std::size_t kKept = 8;

  // `name` must outlive the log: a literal. The two sizes are what tells one launch from another, rows first.
  void Note(const char* name, std::int64_t rows, std::int64_t size) {
    entries_[count_ % kKept] = {name, rows, size};
    ++count_;
  }

  // "attention 64x9, linear 64x4096 (2 of 1290 launches)", oldest first.
  std::string Text() const {
    std::string text;
    const std::uint64_t shown = std::min<std::uint64_t>(count_, kKept);
    for (std::uint64_t i = count_ - shown; i < count_; ++i) {
      const Entry& e = entries_[i % kKept];
      text += (text.empty() ? "" : ", ") + std::string(e.name) + " " + std::to_string(e.rows) + "x" +
              std::to_string(e.size);
    }
    return text + " (" + std::to_string(shown) + " of " + std::to_string(count_) + " launches)";
  }

 private:
  struct Entry {
    const char* name = "";
    std::int64_t rows = 0;
    std::int64_t size = 0;
  };
  std::array<Entry, kKept> entries_;
  std::uint64_t count_ = 0;
};

}  // namespace kvshare::kernels::cuda
