#include "erq_cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace {

// XCR0: which registers the operating system saves.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
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
  return wide && (saved_state() & 0xe6) == 0xe6 ? ERQ_AVX512_VNNI : ERQ_AVX2;
}

}  // namespace

#else

static int32_t detect() { return ERQ_PLAIN; }

#endif

extern "C" {

int32_t erq_cpu_abi(void) { return ERQ_CPU_ABI; }

int32_t erq_cpu_best_variant(void) {
  static const int32_t best = detect();
  return best;
}
}
