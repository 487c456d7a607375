#include "tests/testing/fixtures.h"

#include <cstdlib>
#include <system_error>

namespace kvshare::testing {
namespace {

std::optional<std::filesystem::path> IfExists(std::filesystem::path path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::nullopt;
  return path;
}

}  // namespace

std::optional<std::filesystem::path> SharedDir() {
  if (const char* dir = std::getenv("KVSHARE_SHARED")) return IfExists(dir);
  return IfExists(std::filesystem::path(KVS_SOURCE_DIR) / ".." / "shared");
}

std::optional<std::filesystem::path> SmolLm2Path() {
  if (const char* file = std::getenv("KVSHARE_SMOLLM2")) return IfExists(file);
  const char* home = std::getenv("HOME");
  if (home == nullptr) return std::nullopt;
  return IfExists(std::filesystem::path(home) / ".cache/kvshare/models/SmolLM2-135M-Instruct.Q4_1.gguf");
}

std::optional<std::filesystem::path> RefModelPath() {
  return IfExists(std::filesystem::path(KVS_SOURCE_DIR) / "models/notes-3m");
}

}  // namespace kvshare::testing
