#include "erq_cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// XCR0: which registers the operating system saves.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux lets a process use tile registers when it asks for them; no other system is asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (saved_state() & 0x60000) == 0x60000 &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

int32_t detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return ERQ_PLAIN;
  const bool osxsave = c & bit_OSXSAVE, avx = c & bit_AVX, fma = c & bit_FMA, f16c = c & bit_F16C;
  if (!osxsave || !avx || !fma || !f16c || (saved_state() & 0x6) != 0x6) return ERQ_PLAIN;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2) || !(b & bit_BMI2))
    return ERQ_PLAIN;
  const unsigned wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  const unsigned wanted_c = bit_AVX512VNNI | bit_AVX512VBMI;
  const bool wide = (b & wanted) == wanted && (c & wanted_c) == wanted_c;
  if (!wide || (saved_state() & 0xe6) != 0xe6) return ERQ_AVX2;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  const bool tiles = (d & (kTile | kInt8)) == (kTile | kInt8);
  return tiles && may_use_tiles() ? ERQ_AMX : ERQ_AVX512_VNNI;
}

}  // namespace

#else

static // Linux lets a process use tile registers when it asks for them; no other system is asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (saved_state() & 0x60000) == 0x60000 &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

int32_t detect() { return ERQ_PLAIN; }

#endif

extern "C" {

int32_t erq_cpu_abi(void) { return ERQ_CPU_ABI; }

int32_t erq_cpu_best_variant(void) {
  static const int32_t best = detect();
  return best;
}
}
