// agentd's configuration file, of any bytes: it is refused with a message that names a line, or printed so that it
// reads back as the same settings.
#include <cstdlib>

#include "agentd/config/config.h"
#include "tests/fuzz/seeded.h"

namespace kvshare {
namespace {

std::vector<std::string> Seeds() {
  return {"version: 1\nmodel:\n  path: x\n  threads: 2\nserver: {listen: ipc:///x, http: '[::1]:80'}\n",
          "version: 1\npool: {size: 1GiB, eviction: lru}\ncold: {dir: \"a b\", size: 1GiB}\n",
          "# c\nversion: 1\nreuse:\n  mode: off # c\n  blend_recompute: 0.5\nobserve: {log: ~}\n",
          "version: 1\nmodel: &a {path: |\n  x\n}\n---\n- *a\n"};
}

}  // namespace
}  // namespace kvshare

KVS_FUZZ_SEEDS(kvshare::Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using kvshare::agentd::Settings;
  Settings settings;
  const kvshare::Status status = settings.AddFile({reinterpret_cast<const char*>(data), size}, "f");
  if (!status.ok()) {
    if (!status.message().starts_with("f:")) std::abort();
    return 0;
  }
  (void)settings.Finish();
  const std::string printed = settings.Print();
  Settings again;
  if (!again.AddFile(printed, "f").ok()) std::abort();
  return 0;
}
