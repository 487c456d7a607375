#include "bench/kernels/ceilings.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

#include "kernels/cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvshare::bench {

namespace {

double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double CpuSeconds(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// 256 MiB on huge pages where the system allows it, as packed weights are: with small ones it would be the address
// translation that is measured. Lives as long as the process.
const std::uint64_t* Memory(std::size_t words) {
  const std::size_t bytes = words * sizeof(std::uint64_t);
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  madvise(data, bytes, MADV_HUGEPAGE);
  auto* memory = static_cast<std::uint64_t*>(data);
  std::fill_n(memory, words, 1);
  return memory;
}

#if defined(__x86_64__)
// Twelve independent chains hide the latency of every core this can run on. The values stay in registers; the inline
// assembly keeps the compiler from seeing that they are constant.
#define KVS_TWELVE(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)

__attribute__((target("avx512f,avx512bf16"))) void DotBf16(std::int64_t loops) {
  __m512 x = _mm512_set1_ps(0.5f);
#define KVS_DECLARE(i) __m512 a##i = _mm512_setzero_ps();
  KVS_TWELVE(KVS_DECLARE)
#undef KVS_DECLARE
  for (std::int64_t loop = 0; loop < loops; ++loop) {
#define KVS_STEP(i) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(a##i) : "v"(x));
    KVS_TWELVE(KVS_STEP)
#undef KVS_STEP
  }
}

__attribute__((target("avx512f"))) void FmaF32(std::int64_t loops) {
  __m512 x = _mm512_set1_ps(0.5f);
#define KVS_DECLARE(i) __m512 a##i = _mm512_setzero_ps();
  KVS_TWELVE(KVS_DECLARE)
#undef KVS_DECLARE
  for (std::int64_t loop = 0; loop < loops; ++loop) {
#define KVS_STEP(i) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(a##i) : "v"(x));
    KVS_TWELVE(KVS_STEP)
#undef KVS_STEP
  }
}
#undef KVS_TWELVE

// Four chains of sums that fill their registers: 16 rows by 16 columns, 32 products each.
__attribute__((target("amx-tile,amx-bf16"))) void DotAmx(std::int64_t loops) {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config));
  for (std::int64_t loop = 0; loop < loops; ++loop) {
    asm volatile(
        "tdpbf16ps %tmm5, %tmm4, %tmm0\n\ttdpbf16ps %tmm5, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm5, %tmm4, %tmm2\n\ttdpbf16ps %tmm5, %tmm4, %tmm3");
  }
  asm volatile("tilerelease");
}
#endif

struct DotLoop {
  void (*run)(std::int64_t loops);
  std::int64_t loops;
  double flops_per_loop;
};

DotLoop LoopOf(Dot dot) {
#if defined(__x86_64__)
  switch (dot) {
    case Dot::kF32:
      if (__builtin_cpu_supports("avx512f")) return {FmaF32, 5'000'000, 12 * 32};
      break;
    case Dot::kAvx512Bf16:
      if (__builtin_cpu_supports("avx512bf16")) return {DotBf16, 5'000'000, 12 * 64};
      break;
    case Dot::kAmxBf16:
      if (kernels::CpuHasIsa(kernels::CpuIsa::kAmxBf16)) return {DotAmx, 1'000'000, 4 * 16 * 16 * 64};
      break;
  }
#else
  static_cast<void>(dot);
#endif
  return {};
}

}  // namespace

double ProcessCpuSeconds() { return CpuSeconds(CLOCK_PROCESS_CPUTIME_ID); }

double MeasureDotFlops(Dot dot) {
  const DotLoop loop = LoopOf(dot);
  if (loop.run == nullptr) return 0;
  double best = 1e30;
  for (int i = 0; i < 5; ++i) {
    const double start = CpuSeconds(CLOCK_THREAD_CPUTIME_ID);
    loop.run(loop.loops);
    best = std::min(best, CpuSeconds(CLOCK_THREAD_CPUTIME_ID) - start);
  }
  return static_cast<double>(loop.loops) * loop.flops_per_loop / best;
}

double MeasureReadBytes(int threads) {
  constexpr std::size_t kWords = std::size_t{32} << 20;
  static const std::uint64_t* const memory = Memory(kWords);
  if (memory == nullptr) return 0;
  double best = 1e30;
  for (int round = 0; round < 5; ++round) {
    std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads) * 8);
    std::vector<std::thread> readers;
    const double start = Seconds();
    for (int t = 0; t < threads; ++t) {
      readers.emplace_back([t, threads, &sums] {
        const std::size_t per = kWords / static_cast<std::size_t>(threads);
        const std::uint64_t* p = memory + static_cast<std::size_t>(t) * per;
        std::uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (std::size_t i = 0; i + 32 <= per; i += 32) {
          for (std::size_t j = 0; j < 32; j += 4) {
            s0 += p[i + j];
            s1 += p[i + j + 1];
            s2 += p[i + j + 2];
            s3 += p[i + j + 3];
          }
        }
        sums[static_cast<std::size_t>(t) * 8] = s0 + s1 + s2 + s3;
      });
    }
    for (std::thread& reader : readers) reader.join();
    best = std::min(best, Seconds() - start);
  }
  return static_cast<double>(kWords * 8) / best;
}

}  // namespace kvshare::bench
