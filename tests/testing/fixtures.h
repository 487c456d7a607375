// Where the larger fixtures lie, if this machine has them. Tests that need one skip without it, saying so.
#pragma once

#include <filesystem>
#include <optional>

namespace kvshare::testing {

// The shared folder with transformers' logits and token ids: $KVSHARE_SHARED, else `shared` beside the source tree.
std::optional<std::filesystem::path> SharedDir();

// SmolLM2-135M-Instruct as GGUF: $KVSHARE_SMOLLM2, else where ./quickstart puts it.
std::optional<std::filesystem::path> SmolLm2Path();

// The small model in the source tree (models/notes-3m, a Qwen3 Hugging Face directory).
std::optional<std::filesystem::path> RefModelPath();

}  // namespace kvshare::testing

// In a test body: the fixture's path, or the end of this test.
#define KVS_FIXTURE_OR_SKIP(name, lookup)                              \
  const auto name##_found = (lookup);                                  \
  if (!name##_found.has_value()) GTEST_SKIP() << "not here: " #lookup; \
  const std::filesystem::path& name = *name##_found
