// anchor_crash_worker DIR: a session that learns and saves after each step, and says so, until it ends or is killed.
#include <cstdio>

#include "agentd/tiers/anchor_store.h"
#include "tests/anchors/anchor_samples.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const kvshare::anchors::AnchorOwner owner = kvshare::anchors::SampleOwner();
  kvshare::agentd::AnchorStore store(
      {.directory = argv[1], .max_bytes = 8 << 20, .space = owner.space, .layers = owner.layers, .width = owner.width});
  kvshare::anchors::AnchorPool pool;
  for (int step = 1; step <= 10; ++step) {
    kvshare::anchors::TeachSamples(&pool, step - 1, step);
    store.Save("s", pool.Snapshot());
    store.Flush();
    std::printf("%d\n", step);
    std::fflush(stdout);
  }
  return 0;
}
