// Where processes that share memory wait for each other: each has a line of the cache, in it what it has reached.

#include <cstdint>
#include <sched.h>

constexpr int64_t LINE = 8;     // numbers
constexpr int64_t QUICK = 1000; // looks before others may have this core

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Says that this rank has reached a stage; met: whether all had within so many looks at the others.
extern "C" void meet(int64_t* lines, int64_t rank, int64_t world, int64_t stage, int64_t looks, int64_t* met) {
  __atomic_store_n(lines + LINE * rank, stage, __ATOMIC_RELEASE);
  int64_t there = 0;
  for (int64_t look = 0; look < looks; look++) {
    while (there < world && __atomic_load_n(lines + LINE * there, __ATOMIC_ACQUIRE) >= stage) there++;
    if (there == world) break;
    if (look < QUICK) relax();
    else sched_yield();
  }
  *met = there == world;
}
