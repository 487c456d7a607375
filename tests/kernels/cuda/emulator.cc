#include "tests/kernels/cuda/emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace kvshare::kernels::cuda {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;

[[noreturn]] void Refuse(const char* rule) {
  std::fprintf(stderr, "emulated GPU: %s\n", rule);
  std::abort();
}

enum class Op { kNone, kSync, kShuffle, kBroadcast, kAny, kLoad, kLoadTransposed, kMma };

// What a lane brings to a step that its warp does together.
struct Step {
  Op op = Op::kNone;
  void* out = nullptr;
  const void* in = nullptr;
  const std::uint32_t* a = nullptr;
  std::uint32_t b[2] = {};
  int which = 0;
};

struct Copy {
  std::byte* to;
  const std::byte* from;
  bool keep;
};

}  // namespace

class EmulatedBlock {
 public:
  EmulatedBlock(const Grid& grid, std::mt19937_64& random, GridStats& stats,
                const std::function<void(EmulatedLane&)>& body)
      : grid_(grid), random_(random), stats_(stats), body_(body), fibers_(static_cast<std::size_t>(grid.threads)) {
    if (grid.threads % 32 != 0) Refuse("a block is whole warps");
    // An exact allocation of its own, so that a tool that watches the heap sees what lies beyond it.
    shared_.reset(static_cast<std::byte*>(std::aligned_alloc(128, (grid.shared_bytes + 127) / 128 * 128 + 128)));
    for (Fiber& f : fibers_) f.stack = std::make_unique<std::byte[]>(kStackBytes);
  }

  void Run(int x, int y) {
    x_ = x;
    y_ = y;
    std::memset(shared_.get(), 0xff, grid_.shared_bytes);
    for (std::size_t t = 0; t < fibers_.size(); ++t) Prepare(t);
    Schedule();
  }

  // The lane waits until its warp (or, for Sync, its block) has come to the same step.
  void Arrive(int thread, const Step& step) {
    Fiber& f = fibers_[static_cast<std::size_t>(thread)];
    f.step = step;
    f.state = State::kWaiting;
    const bool last = step.op == Op::kSync ? BlockArrived() : WarpArrived(thread / 32);
    if (last) {
      f.state = State::kReady;  // all are; this one goes on
      return;
    }
    swapcontext(&f.context, &scheduler_);
  }

  void StartCopy(int thread, const Copy& copy) {
    if (copy.to < shared_.get() || copy.to + 16 > shared_.get() + grid_.shared_bytes) {
      Refuse("cp.async outside shared memory");
    }
    if (reinterpret_cast<std::uintptr_t>(copy.to) % 16 != 0 || reinterpret_cast<std::uintptr_t>(copy.from) % 16 != 0) {
      Refuse("cp.async at an address that is no multiple of 16");
    }
    // The memory of a copy under way holds anything: the old bytes, or already the new.
    if (random_() % 2 == 0) {
      Land(copy);
    } else {
      fibers_[static_cast<std::size_t>(thread)].groups.back().push_back(copy);
    }
  }
  void Commit(int thread) { fibers_[static_cast<std::size_t>(thread)].groups.emplace_back(); }
  void Finish(int thread, int pending) {
    auto& groups = fibers_[static_cast<std::size_t>(thread)].groups;
    // The last group is the one not yet committed.
    const std::size_t keep = static_cast<std::size_t>(pending) + 1;
    if (groups.size() <= keep) return;
    for (std::size_t g = 0; g + keep < groups.size(); ++g) {
      for (const Copy& copy : groups[g]) Land(copy);
    }
    groups.erase(groups.begin(), groups.end() - static_cast<std::ptrdiff_t>(keep));
  }

  const Grid& grid_;
  int x_ = 0, y_ = 0;
  std::byte* shared() const { return shared_.get(); }

 private:
  enum class State { kReady, kWaiting, kDone };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<std::byte[]> stack;
    State state = State::kDone;
    Step step;
    std::vector<std::vector<Copy>> groups;
  };
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };

  // A function of its own, because getcontext may return twice as far as the compiler knows.
  void Prepare(std::size_t thread) {
    Fiber& f = fibers_[thread];
    f.state = State::kReady;
    f.groups.assign(1, {});
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = &scheduler_;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&f.context, reinterpret_cast<void (*)()>(&EmulatedBlock::Start), 3, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self), static_cast<unsigned>(thread));
  }

  static void Start(unsigned high, unsigned low, unsigned thread) {
    auto* self = reinterpret_cast<EmulatedBlock*>((static_cast<std::uintptr_t>(high) << 32) | low);
    EmulatedLane lane(*self, static_cast<int>(thread));
    self->body_(lane);
    self->fibers_[thread].state = State::kDone;
  }

  void Schedule() {
    std::vector<std::size_t> warps(fibers_.size() / 32);
    for (std::size_t w = 0; w < warps.size(); ++w) warps[w] = w;
    for (bool ran = true; ran;) {
      ran = false;
      std::shuffle(warps.begin(), warps.end(), random_);
      for (const std::size_t w : warps) {
        // A warp goes as far as it can, or a little: both orders against the others must do.
        std::uint64_t turns = random_() % 4 == 0 ? 1 + random_() % 50 : ~std::uint64_t{0};
        for (bool went = true; went && turns > 0; --turns) {
          went = false;
          for (std::size_t t = 32 * w; t < 32 * w + 32; ++t) {
            if (fibers_[t].state != State::kReady) continue;
            swapcontext(&scheduler_, &fibers_[t].context);
            went = ran = true;
          }
        }
      }
    }
    for (const Fiber& f : fibers_) {
      if (f.state != State::kDone) Refuse("lanes wait for each other at different steps");
    }
  }

  static void Land(const Copy& copy) {
    if (copy.keep) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }

  bool BlockArrived() {
    for (const Fiber& f : fibers_) {
      if (f.state == State::kDone) Refuse("a thread left before a barrier of its block");
      if (f.state != State::kWaiting || f.step.op != Op::kSync) return false;
    }
    for (Fiber& f : fibers_) f.state = State::kReady;
    return true;
  }

  bool WarpArrived(int warp) {
    Fiber* lanes = fibers_.data() + 32 * warp;
    for (int i = 0; i < 32; ++i) {
      if (lanes[i].state == State::kDone) Refuse("a lane left before a step of its warp");
      if (lanes[i].state != State::kWaiting) return false;
    }
    for (int i = 1; i < 32; ++i) {
      if (lanes[i].step.op != lanes[0].step.op) Refuse("lanes of a warp do different things");
    }
    switch (lanes[0].step.op) {
      case Op::kShuffle:
        for (int i = 0; i < 32; ++i) {
          if (lanes[i].step.which < 1 || lanes[i].step.which > 31) Refuse("a shuffle beyond the warp");
          std::memcpy(lanes[i].step.out, lanes[i ^ lanes[i].step.which].step.in, sizeof(float));
        }
        break;
      case Op::kBroadcast:
        for (int i = 0; i < 32; ++i) {
          std::memcpy(lanes[i].step.out, lanes[lanes[i].step.which].step.in, sizeof(std::uint64_t));
        }
        break;
      case Op::kAny: {
        int any = 0;
        for (int i = 0; i < 32; ++i) any |= lanes[i].step.which;
        for (int i = 0; i < 32; ++i) *static_cast<bool*>(lanes[i].step.out) = any != 0;
        break;
      }
      case Op::kLoad: LoadMatrices(lanes, false); break;
      case Op::kLoadTransposed: LoadMatrices(lanes, true); break;
      case Op::kMma: Multiply(lanes, static_cast<DType>(lanes[0].step.which)); break;
      case Op::kNone:
      case Op::kSync: return false;
    }
    for (int i = 0; i < 32; ++i) lanes[i].state = State::kReady;
    return true;
  }

  // Lane 8 m + r names row r of matrix m; lane l gets elements 2 (l % 4) and the next of row l / 4 of each matrix, or
  // of its column where it is transposed (PTX ISA, ldmatrix).
  void LoadMatrices(Fiber* lanes, bool transposed) {
    std::uint16_t matrix[4][8][8];
    for (int m = 0; m < 4; ++m) {
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        const auto* row = static_cast<const std::byte*>(lanes[8 * m + r].step.in);
        if (row < shared_.get() || row + 16 > shared_.get() + grid_.shared_bytes)
          Refuse("ldmatrix outside shared memory");
        const auto offset = static_cast<std::uintptr_t>(row - shared_.get());
        if (offset % 16 != 0) Refuse("ldmatrix at an address that is no multiple of 16");
        banks |= 1u << (offset / 16 % 8);
        std::memcpy(matrix[m][r], row, 16);
      }
      stats_.bank_conflicts += banks != 0xff;
    }
    for (int l = 0; l < 32; ++l) {
      auto* out = static_cast<std::uint32_t*>(lanes[l].step.out);
      const int g = l / 4, t = l % 4;
      for (int m = 0; m < 4; ++m) {
        const std::uint32_t low = transposed ? matrix[m][2 * t][g] : matrix[m][g][2 * t];
        const std::uint32_t high = transposed ? matrix[m][2 * t + 1][g] : matrix[m][g][2 * t + 1];
        out[m] = low | high << 16;
      }
    }
  }

  void Multiply(Fiber* lanes, DType dtype) {
    ++stats_.mma;
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      const Step& s = lanes[l].step;
      for (int i = 0; i < 2; ++i) {
        const auto half = [&](std::uint32_t x) { return FromHalf(dtype, i == 0 ? x & 0xffffu : x >> 16); };
        a[g][2 * t + i] = half(s.a[0]);
        a[g + 8][2 * t + i] = half(s.a[1]);
        a[g][2 * t + 8 + i] = half(s.a[2]);
        a[g + 8][2 * t + 8 + i] = half(s.a[3]);
        b[2 * t + i][g] = half(s.b[0]);
        b[2 * t + 8 + i][g] = half(s.b[1]);
      }
    }
    for (int l = 0; l < 32; ++l) {
      auto* c = static_cast<float*>(lanes[l].step.out);
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
        for (int k = 0; k < 16; ++k) c[i] += a[row][k] * b[k][column];
      }
    }
  }

  std::mt19937_64& random_;
  GridStats& stats_;
  const std::function<void(EmulatedLane&)>& body_;
  std::vector<Fiber> fibers_;
  std::unique_ptr<std::byte, Free> shared_;
  ucontext_t scheduler_;
};

int EmulatedLane::block_x() const { return block_.x_; }
int EmulatedLane::block_y() const { return block_.y_; }
std::byte* EmulatedLane::shared() const { return block_.shared(); }

void EmulatedLane::Sync() { block_.Arrive(thread_, {.op = Op::kSync}); }
float EmulatedLane::ShuffleXor(float x, int mask) {
  float y = 0;
  block_.Arrive(thread_, {.op = Op::kShuffle, .out = &y, .in = &x, .which = mask});
  return y;
}
std::uint64_t EmulatedLane::Broadcast(std::uint64_t x, int lane) {
  std::uint64_t y = 0;
  block_.Arrive(thread_, {.op = Op::kBroadcast, .out = &y, .in = &x, .which = lane});
  return y;
}
bool EmulatedLane::Any(bool x) {
  bool y = false;
  block_.Arrive(thread_, {.op = Op::kAny, .out = &y, .which = x ? 1 : 0});
  return y;
}

float EmulatedLane::Exp2(float x) const { return std::exp2(x); }
float EmulatedLane::Exp(float x) const { return std::exp(x); }
float EmulatedLane::Sqrt(float x) const { return std::sqrt(x); }
float EmulatedLane::Fma(float a, float b, float c) const { return std::fma(a, b, c); }

void EmulatedLane::CopyAsync16(std::byte* to, const std::byte* from, bool keep) {
  block_.StartCopy(thread_, {to, from, keep});
}
void EmulatedLane::CommitCopies() { block_.Commit(thread_); }
void EmulatedLane::FinishCopies(int pending) { block_.Finish(thread_, pending); }
void EmulatedLane::LoadMatrices(std::uint32_t (&x)[4], const std::byte* row, bool transposed) {
  block_.Arrive(thread_, {.op = transposed ? Op::kLoadTransposed : Op::kLoad, .out = x, .in = row});
}
void EmulatedLane::Multiply(DType half, float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                            std::uint32_t b1) {
  block_.Arrive(thread_, {.op = Op::kMma, .out = c, .a = a, .b = {b0, b1}, .which = static_cast<int>(half)});
}

GridStats Emulate(const Grid& grid, std::uint64_t seed, const std::function<void(EmulatedLane&)>& body) {
  std::mt19937_64 random(seed);
  GridStats stats;
  EmulatedBlock block(grid, random, stats, body);
  for (int y = 0; y < grid.y; ++y) {
    for (int x = 0; x < grid.x; ++x) block.Run(x, y);
  }
  return stats;
}

}  // namespace kvshare::kernels::cuda
