// The host's side of device.cuh: the same functions, so that g++ compiles the same kernels.
//
// A block's threads are fibres (ucontext), run one at a time; a fibre goes on until an instruction of
// its whole warp or a barrier, so without a barrier one warp runs far ahead of the others. What the
// hardware leaves open is taken at its worst:
// - cp.async writes at the wait that promises it, not before;
// - shared memory begins as rubbish, and reading what nobody wrote is an error;
// - two accesses to a byte of shared memory by different threads, one of them a write, with no
//   barrier between them (of the warp, if both are in it), are an error, whatever their order was;
//   so is an access to bytes that a cp.async may still be writing;
// - a barrier or a warp instruction that not every thread reaches is an error;
// - blocks run one after another in any order that is asked for, and what one publishes reaches the
//   others by a fence of a thread that wrote it or that met its writer at a barrier, else not before
//   the launch ends; they read it from memory alone.
// Fragments are laid out by the tables of the PTX manual (PTX ISA 8.x, "Matrix fragments for mma"),
// element by element, without a look at how the kernels use them.
// Bank conflicts are counted from the addresses of every access to shared memory.
//
// An error makes the launch fail with its text; the kernel still runs to its end where it can.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define ERQ_KERNEL(threads, blocks) void
#define ERQ_PARAMS const
#define ERQ_DEVICE inline
#define ERQ_UNROLL
#define ERQ_NO_UNROLL
#define ERQ_FAULT(kind) (::erq::emulation::fault == ::erq::emulation::kind)

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace erq {
namespace emulation {

enum Access { kLdmatrix, kCpAsync, kLoad, kStore, kAccesses };

struct Statistics {
  long long wavefronts[kAccesses];  // that the accesses of whole warps need at least
  long long conflicts[kAccesses];   // wavefronts above that
};
inline Statistics statistics;

// What the kernels do wrong on purpose, where they say ERQ_FAULT.
enum Fault {
  kNoFault, kFragment, kBarrier, kPipeline, kSwizzle, kCounter, kFence, kArrivalBarrier, kPartial
};
inline int fault;
// Blocks run from the first to the last, or, if not 0, shuffled by this number.
inline unsigned block_order;
inline bool is_reversed;  // warps and lanes run from the last to the first

struct Fibre {
  enum State { kReady, kAtWarp, kAtBlock, kDone };
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  struct Copy { char *to; const void *from; bool valid; };
  std::vector<Copy> open;               // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, not landed
  struct Touch { uintptr_t at; int bytes; Access kind; };
  std::vector<Touch> touches;  // single-lane accesses since the warp last met
  void *fake_stack = nullptr;
};

// Who touched a byte of shared memory last, and when.
struct Shadow {
  int writer = -1, reader = -1;
  long block_written = -1, warp_written = -1, block_read = -1, warp_read = -1;
  bool many_readers = false;  // of one warp; of several: many_warps
  bool many_warps = false;
  bool pending = false;
};

struct Block {
  int index, index_y, index_z, threads, shared_bytes;
  std::vector<Fibre> fibres;
  std::unique_ptr<char[]> storage;
  char *shared;
  std::vector<Shadow> shadow;
  long epoch = 0;                 // barriers of the block
  std::vector<long> warp_epochs;  // barriers of each warp
  int current = 0;
  ucontext_t main;
  void *main_fake_stack = nullptr;
  const void *main_bottom = nullptr;
  size_t main_size = 0;
  void (*entry)(const void *) = nullptr;
  const void *argument = nullptr;
  // What the lanes of a warp brought to the instruction that they meet at.
  struct Meeting {
    int arrived = 0;
    const char *what = nullptr;
    void *slots[32];
  };
  std::vector<Meeting> meetings;
  int at_barrier = 0;
  // Written to global memory for other blocks, not yet seen by them.
  struct Published { void *to; char bytes[16]; int size, thread; long epoch; };
  std::vector<Published> published;
};
inline Block *block;
inline char error[256];
inline constexpr size_t kStackBytes = 256 * 1024;

template <class... Args>
void fail(const char *format, Args... args) {
  if (!error[0]) snprintf(error, sizeof error, format, args...);
}

inline Fibre &self() { return block->fibres[block->current]; }
inline int warp() { return block->current / 32; }

// --- fibres ---

inline void enter_fibre(void *fake_stack, bool from_main) {
#if defined(__SANITIZE_ADDRESS__)
  const void *bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (from_main) block->main_bottom = bottom, block->main_size = size;
#else
  (void)fake_stack, (void)from_main;
#endif
}

inline void leave_to(Fibre &to, void **fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, to.stack.get(), kStackBytes);
#else
  (void)to, (void)fake_stack;
#endif
}

// The next fibre that can run: of the same warp if there is one, else of another; -1 if none.
inline int find_ready() {
  const int n = block->threads, step = is_reversed ? -1 : 1;
  const int first = block->current / 32 * 32;
  for (int i = 1; i <= 32; ++i) {
    const int t = first + ((block->current - first + step * i) % 32 + 32) % 32;
    if (block->fibres[t].state == Fibre::kReady) return t;
  }
  for (int i = 0; i < n; ++i) {
    const int t = is_reversed ? n - 1 - i : i;
    if (block->fibres[t].state == Fibre::kReady) return t;
  }
  return -1;
}

inline void count_touches(int of_warp);

inline void release_barrier() {
  for (Fibre &f : block->fibres)
    if (f.state == Fibre::kAtBlock) f.state = Fibre::kReady;
  block->at_barrier = 0;
  ++block->epoch;
}

// Let another fibre run until this one's state is kReady again.
inline void give_way() {
  Fibre &me = self();
  int next = find_ready();
  if (next < 0) {
    int waiting = 0;
    for (const Fibre &f : block->fibres) waiting += f.state != Fibre::kDone;
    if (waiting) {
      const Block::Meeting &m = block->meetings[warp()];
      fail("block %d: %d of %d threads wait for the others at %s", block->index, waiting,
           block->threads, m.arrived ? m.what : "a barrier");
      // Nobody can go on as the program says; wake everyone so that the run ends.
      for (Fibre &f : block->fibres)
        if (f.state != Fibre::kDone) f.state = Fibre::kReady;
      for (Block::Meeting &each : block->meetings) each.arrived = 0;
      block->at_barrier = 0;
      next = find_ready();
    }
  }
  if (next == block->current) return;
  if (next < 0) {  // the last fibre has ended
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, block->main_bottom, block->main_size);
#endif
    setcontext(&block->main);
  }
  Fibre &to = block->fibres[next];
  block->current = next;
  leave_to(to, me.state == Fibre::kDone ? nullptr : &me.fake_stack);
  swapcontext(&me.context, &to.context);
  enter_fibre(me.fake_stack, false);
}

inline void fibre_main() {
  enter_fibre(nullptr, block->main_bottom == nullptr);
  block->entry(block->argument);
  if (!self().open.empty() || !self().groups.empty()) {
    for (const auto &group : self().groups)
      if (!group.empty()) fail("thread %d ended with a cp.async under way", block->current);
  }
  self().state = Fibre::kDone;
  give_way();
}

// --- meetings of a warp ---

// All lanes bring `slot`; the last to come runs `act` on all of them.
template <class F>
void meet(const char *what, void *slot, F act) {
  Block::Meeting &m = block->meetings[warp()];
  if (m.arrived && strcmp(m.what, what))
    fail("lanes of a warp are at %s and at %s", m.what, what);
  m.what = what;
  m.slots[block->current % 32] = slot;
  if (++m.arrived < 32) {
    self().state = Fibre::kAtWarp;
    give_way();
    return;
  }
  m.arrived = 0;
  count_touches(warp());
  act(m.slots);
  for (int l = 0; l < 32; ++l) {
    Fibre &f = block->fibres[warp() * 32 + l];
    if (f.state == Fibre::kAtWarp) f.state = Fibre::kReady;
  }
}

// --- shared memory ---

inline long offset_of(const void *at, int bytes) {
  const long offset = static_cast<const char *>(at) - block->shared;
  if (offset < 0 || offset + bytes > block->shared_bytes) {
    fail("thread %d touches byte %ld of %d of shared memory", block->current, offset,
         block->shared_bytes);
    return -1;
  }
  if (offset % bytes) fail("an access of %d bytes at byte %ld is not aligned", bytes, offset);
  return offset;
}

inline bool is_ordered(int other, long block_epoch, long warp_epoch, int thread) {
  return other == thread || block_epoch < block->epoch ||
         (other / 32 == thread / 32 && warp_epoch < block->warp_epochs[thread / 32]);
}

inline void check_read(const void *at, int bytes, int thread) {
  const long offset = offset_of(at, bytes);
  for (long i = offset; offset >= 0 && i < offset + bytes; ++i) {
    Shadow &s = block->shadow[i];
    if (s.pending) fail("byte %ld is read while a cp.async may still write it", i);
    else if (s.writer < 0) fail("byte %ld is read before it was written", i);
    else if (!is_ordered(s.writer, s.block_written, s.warp_written, thread))
      fail("byte %ld is read by thread %d without a barrier after thread %d wrote it", i, thread,
           s.writer);
    if (s.block_read == block->epoch && s.reader >= 0 && s.reader != thread) {
      s.many_readers = true;
      s.many_warps = s.many_warps || s.reader / 32 != thread / 32;
    } else if (s.block_read != block->epoch) {
      s.many_readers = s.many_warps = false;
    }
    s.reader = thread;
    s.block_read = block->epoch;
    s.warp_read = block->warp_epochs[thread / 32];
  }
}

inline void check_write(const void *at, int bytes, int thread) {
  const long offset = offset_of(at, bytes);
  for (long i = offset; offset >= 0 && i < offset + bytes; ++i) {
    Shadow &s = block->shadow[i];
    if (s.pending) fail("byte %ld is written while a cp.async may still write it", i);
    if (s.writer >= 0 && !is_ordered(s.writer, s.block_written, s.warp_written, thread))
      fail("byte %ld is written by threads %d and %d without a barrier", i, s.writer, thread);
    const bool read_now = s.block_read == block->epoch && s.reader >= 0;
    const bool same_warp = !s.many_warps && s.reader / 32 == thread / 32;
    const bool before = same_warp && s.warp_read < block->warp_epochs[thread / 32];
    if (read_now && !before && (s.many_readers || s.reader != thread))
      fail("byte %ld is written by thread %d without a barrier after thread %d read it", i, thread,
           s.reader);
    s.writer = thread;
    s.block_written = block->epoch;
    s.warp_written = block->warp_epochs[thread / 32];
  }
}

// Wavefronts of one access by some lanes: a bank gives one 4-byte word at a time, and accesses of 8
// or 16 bytes are made by 16 or 8 neighbouring lanes at a time.
inline void count_wavefronts(Access kind, const std::vector<Fibre::Touch *> &lanes) {
  int bytes = 1;
  for (const Fibre::Touch *t : lanes)
    if (t && t->bytes > bytes) bytes = t->bytes;
  const int together = bytes <= 4 ? 32 : 128 / bytes;
  for (size_t first = 0; first < lanes.size(); first += together) {
    std::set<uintptr_t> words[32];
    bool used = false;
    for (size_t l = first; l < first + together && l < lanes.size(); ++l) {
      if (!lanes[l]) continue;
      used = true;
      for (int b = 0; b < lanes[l]->bytes; ++b) {
        const uintptr_t word = (lanes[l]->at + b) / 4;
        words[word % 32].insert(word);
      }
    }
    size_t most = 1;
    for (const auto &bank : words) most = bank.size() > most ? bank.size() : most;
    statistics.wavefronts[kind] += used;
    statistics.conflicts[kind] += most - 1;
  }
}

// The n-th access of each lane since the warp last met is one instruction of the warp.
inline void count_touches(int of_warp) {
  size_t most = 0;
  for (int l = 0; l < 32; ++l) {
    const size_t n = block->fibres[of_warp * 32 + l].touches.size();
    most = n > most ? n : most;
  }
  for (size_t i = 0; i < most; ++i) {
    std::vector<Fibre::Touch *> lanes(32, nullptr);
    Access kind = kLoad;
    for (int l = 0; l < 32; ++l) {
      auto &touches = block->fibres[of_warp * 32 + l].touches;
      if (i < touches.size()) lanes[l] = &touches[i], kind = touches[i].kind;
    }
    count_wavefronts(kind, lanes);
  }
  for (int l = 0; l < 32; ++l) block->fibres[of_warp * 32 + l].touches.clear();
}

inline void touch(const void *at, int bytes, Access kind) {
  self().touches.push_back({static_cast<uintptr_t>(static_cast<const char *>(at) - block->shared),
                            bytes, kind});
}

// --- fragments: (row, column) of element i of lane l's registers ---

struct Place { int row, column; };

// .m16n8k64 with 4-bit types, A: a0..a31.
inline Place a_of_4bit(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  const int row = (i < 8 || (i >= 16 && i < 24)) ? group : group + 8;
  const int column = (i < 16) ? in_group * 8 + (i & 0x7) : in_group * 8 + (i & 0x7) + 32;
  return {row, column};
}
// .m16n8k64 with 4-bit types, B: b0..b15.
inline Place b_of_4bit(int lane, int i) {
  const int in_group = lane % 4;
  return {(i < 8) ? in_group * 8 + (i & 0x7) : in_group * 8 + (i & 0x7) + 32, lane >> 2};
}
// .m16n8k32 with 8-bit types, A: a0..a15.
inline Place a_of_8bit(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  const int row = (i < 4 || (i >= 8 && i < 12)) ? group : group + 8;
  const int column = (i < 8) ? in_group * 4 + (i & 0x3) : in_group * 4 + (i & 0x3) + 16;
  return {row, column};
}
// .m16n8k32 with 8-bit types, B: b0..b7.
inline Place b_of_8bit(int lane, int i) {
  const int in_group = lane % 4;
  return {(i < 4) ? in_group * 4 + (i & 0x3) : in_group * 4 + (i & 0x3) + 16, lane >> 2};
}
// .m16n8k16 with 16-bit floats, A: a0..a7.
inline Place a_of_16bit(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
  const int column = (i < 4) ? in_group * 2 + (i & 0x1) : in_group * 2 + (i & 0x1) + 8;
  return {row, column};
}
// .m16n8k16 with 16-bit floats, B: b0..b3.
inline Place b_of_16bit(int lane, int i) {
  const int in_group = lane % 4;
  return {(i < 2) ? in_group * 2 + (i & 0x1) : in_group * 2 + (i & 0x1) + 8, lane >> 2};
}
// C and D of all three: c0..c3.
inline Place c_of_all(int lane, int i) {
  return {(i < 2) ? lane >> 2 : (lane >> 2) + 8, (lane % 4) * 2 + (i & 0x1)};
}

inline uint32_t element(const uint32_t *registers, int i, int bits) {
  const int per_register = 32 / bits;
  return registers[i / per_register] >> (i % per_register * bits) & ((1u << bits) - 1);
}

template <class D>
struct MmaSlot {
  D *d;
  const uint32_t *a, *b;
};

// D += A B with values read by `value(bits)`.
template <int Bits, class D, class T, class FA, class FB, class VA, class VB>
void multiply(void **slots, FA a_place, FB b_place, VA a_value, VB b_value) {
  constexpr int kDepth = 256 / Bits;
  static T a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto *slot = static_cast<MmaSlot<D> *>(slots[lane]);
    for (int i = 0; i < 4 * 32 / Bits; ++i) {
      const Place p = a_place(lane, i);
      a[p.row][p.column] = a_value(element(slot->a, i, Bits));
    }
    for (int i = 0; i < 2 * 32 / Bits; ++i) {
      const Place p = b_place(lane, i);
      b[p.row][p.column] = b_value(element(slot->b, i, Bits));
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Place p = c_of_all(lane, i);
      D sum = static_cast<MmaSlot<D> *>(slots[lane])->d[i];
      for (int k = 0; k < kDepth; ++k) sum += a[p.row][k] * b[k][p.column];
      static_cast<MmaSlot<D> *>(slots[lane])->d[i] = sum;
    }
}

inline int32_t unsigned_value(uint32_t bits) { return static_cast<int32_t>(bits); }
inline int32_t signed_4(uint32_t bits) { return static_cast<int32_t>(bits ^ 8) - 8; }
inline int32_t signed_8(uint32_t bits) { return static_cast<int32_t>(bits ^ 128) - 128; }

}  // namespace emulation

inline int thread_index() { return emulation::block->current; }
inline int block_index() { return emulation::block->index; }
inline int block_index_y() { return emulation::block->index_y; }
inline int block_index_z() { return emulation::block->index_z; }
inline char *shared_memory() { return emulation::block->shared; }

inline void barrier() {
  using namespace emulation;
  if (++block->at_barrier == block->threads) {
    for (int w = 0; w < block->threads / 32; ++w) count_touches(w);
    release_barrier();
    return;
  }
  self().state = Fibre::kAtBlock;
  give_way();
}

inline void warp_barrier() {
  using namespace emulation;
  meet("__syncwarp", nullptr, [](void **) { ++block->warp_epochs[warp()]; });
}

inline bool any_lane(bool value) {
  using namespace emulation;
  struct Slot { bool mine, all; } slot{value, false};
  meet("__any_sync", &slot, [](void **slots) {
    bool all = false;
    for (int l = 0; l < 32; ++l) all = all || static_cast<Slot *>(slots[l])->mine;
    for (int l = 0; l < 32; ++l) static_cast<Slot *>(slots[l])->all = all;
  });
  return slot.all;
}

inline void cp_async_16(char *to, const void *from, bool valid) {
  using namespace emulation;
  check_write(to, 16, block->current);
  const long offset = offset_of(to, 16);
  for (long i = offset; offset >= 0 && i < offset + 16; ++i) block->shadow[i].pending = true;
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async reads from an address that is not aligned");
  touch(to, 16, kCpAsync);
  self().open.push_back({to, from, valid});
}

inline void cp_async_commit() {
  using namespace emulation;
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

template <int Pending>
inline void cp_async_wait() {
  using namespace emulation;
  auto &groups = self().groups;
  while (groups.size() > Pending) {
    for (const Fibre::Copy &copy : groups.front()) {
      const long offset = offset_of(copy.to, 16);
      if (offset < 0) continue;
      for (long i = offset; i < offset + 16; ++i) {
        Shadow &s = block->shadow[i];
        s.pending = false;
        s.writer = block->current;
        s.block_written = block->epoch;
        s.warp_written = block->warp_epochs[warp()];
      }
      if (copy.valid)
        memcpy(copy.to, copy.from, 16);
      else
        memset(copy.to, 0, 16);
    }
    groups.pop_front();
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const char *from) {
  using namespace emulation;
  struct Slot { uint32_t *r; const char *from; } slot{r, from};
  meet("ldmatrix", &slot, [](void **slots) {
    std::vector<Fibre::Touch> rows(32);
    std::vector<Fibre::Touch *> lanes(32);
    for (int l = 0; l < 32; ++l) {
      const char *at = static_cast<Slot *>(slots[l])->from;
      check_read(at, 16, warp() * 32 + l);
      rows[l] = {static_cast<uintptr_t>(at - block->shared), 16, kLdmatrix};
      lanes[l] = &rows[l];
    }
    count_wavefronts(kLdmatrix, lanes);
    // Lane l receives elements 2 (l % 4) and the next of row l / 4 of each matrix.
    for (int l = 0; l < 32; ++l)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const char *row = static_cast<Slot *>(slots[matrix * 8 + l / 4])->from;
        if (offset_of(row, 16) >= 0)
          memcpy(&static_cast<Slot *>(slots[l])->r[matrix], row + l % 4 * 4, 4);
      }
  });
}

inline void mma_u4_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace emulation;
  MmaSlot<int32_t> slot{d, a, b};
  meet("mma.m16n8k64", &slot, [](void **slots) {
    multiply<4, int32_t, int32_t>(slots, a_of_4bit, b_of_4bit, unsigned_value, signed_4);
  });
}

inline void mma_s8_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace emulation;
  MmaSlot<int32_t> slot{d, a, b};
  meet("mma.m16n8k32", &slot, [](void **slots) {
    multiply<8, int32_t, int32_t>(slots, a_of_8bit, b_of_8bit, signed_8, signed_8);
  });
}

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 31;
  const uint32_t fraction = bits & 1023;
  if (exponent == 31) return as_float(sign | 0x7F800000 | fraction << 13);
  const float magnitude = exponent ? ldexpf(static_cast<float>(1024 + fraction), exponent - 25)
                                   : ldexpf(static_cast<float>(fraction), -24);
  return as_float(as_bits(magnitude) | sign);
}
inline float bfloat16_to_float(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

// To nearest, halves to even.
inline uint16_t float_to_half(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  if (x != x) return 0x7FFF;
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
  int exponent;
  frexpf(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent), or 0
  const int unit = magnitude == 0.0f || exponent < -13 ? -24 : exponent - 11;
  const uint32_t whole = static_cast<uint32_t>(rintf(ldexpf(magnitude, -unit)));
  // A carry out of the fraction goes into the exponent field, as it should.
  const uint32_t field = unit == -24 ? whole : ((static_cast<uint32_t>(unit + 25) << 10) + whole - 1024);
  return static_cast<uint16_t>(sign | field);
}
inline uint16_t float_to_bfloat16(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t bits = as_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  const uint32_t b[2] = {b0, b1};
  MmaSlot<float> slot{d, a, b};
  meet("mma.m16n8k16.f16", &slot, [](void **slots) {
    const auto value = [](uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); };
    multiply<16, float, float>(slots, a_of_16bit, b_of_16bit, value, value);
  });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  const uint32_t b[2] = {b0, b1};
  MmaSlot<float> slot{d, a, b};
  meet("mma.m16n8k16.bf16", &slot, [](void **slots) {
    const auto value = [](uint32_t bits) { return bfloat16_to_float(static_cast<uint16_t>(bits)); };
    multiply<16, float, float>(slots, a_of_16bit, b_of_16bit, value, value);
  });
}

template <class T>
T load_global(const T *from) {
  return *from;  // alignment and bounds are the sanitizers' to check
}
template <class T>
void store_global(T *to, T value) {
  *to = value;
}
template <class T>
T load_shared(const T *from) {
  using namespace emulation;
  check_read(from, sizeof(T), block->current);
  touch(from, sizeof(T), kLoad);
  return *from;
}
template <class T>
void store_shared(T *to, T value) {
  using namespace emulation;
  check_write(to, sizeof(T), block->current);
  touch(to, sizeof(T), kStore);
  *to = value;
}

template <class T>
void publish(T *to, T value) {
  using namespace emulation;
  static_assert(sizeof(T) <= 16, "an access");
  Block::Published written{to, {}, sizeof(T), block->current, block->epoch};
  memcpy(written.bytes, &value, sizeof(T));
  block->published.push_back(written);
}
template <class T>
T load_published(const T *from) {
  return *from;
}
inline void fence() {
  using namespace emulation;
  std::vector<Block::Published> left;
  for (const Block::Published &each : block->published)
    if (each.thread == block->current || each.epoch < block->epoch)
      memcpy(each.to, each.bytes, each.size);
    else
      left.push_back(each);
  block->published.swap(left);
}
inline bool count_arrival(uint32_t *counter, uint32_t count) {
  if (!ERQ_FAULT(kFence)) fence();
  const bool is_last = *counter >= count - 1;
  *counter = is_last ? 0 : *counter + 1;
  return is_last;
}

inline uint32_t subtract_half2(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float difference = half_to_float(static_cast<uint16_t>(a >> shift)) -
                             half_to_float(static_cast<uint16_t>(b >> shift));
    result |= static_cast<uint32_t>(float_to_half(difference)) << shift;
  }
  return result;
}

inline uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
}

inline uint32_t select(bool chosen, uint32_t a, uint32_t b) { return chosen ? a : b; }

inline const char *begin_call(int) { return nullptr; }

inline const char *multiprocessors(int, int *count) {
  *count = 4;  // small, so that the tests' problems reach every tile
  return nullptr;
}

namespace emulation {

// The block from its first to its last thread.
inline void run_block(Block &b) {
  const int warps = b.threads / 32;
  memset(b.shared, 0xA5, b.shared_bytes);
  b.shadow.assign(b.shared_bytes, Shadow());
  b.epoch = 0;
  b.warp_epochs.assign(warps, 0);
  b.meetings.assign(warps, Block::Meeting());
  b.at_barrier = 0;
  b.main_bottom = nullptr;
  for (Fibre &f : b.fibres) {
    f.state = Fibre::kReady;
    f.open.clear();
    f.groups.clear();
    f.touches.clear();
    f.fake_stack = nullptr;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fibre_main, 0);
  }
  b.current = is_reversed ? b.threads - 1 : 0;
  leave_to(b.fibres[b.current], &b.main_fake_stack);
  swapcontext(&b.main, &b.fibres[b.current].context);
  enter_fibre(b.main_fake_stack, false);
  for (int w = 0; w < warps; ++w) count_touches(w);
}

}  // namespace emulation

template <class Params>
const char *launch(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, void *,
                   const Params &params) {
  using namespace emulation;
  struct Call {
    void (*kernel)(Params);
    const Params &params;
  } call{kernel, params};
  error[0] = 0;
  Block b;
  b.threads = threads;
  b.shared_bytes = shared_bytes;
  b.storage.reset(new char[shared_bytes + 128]);
  b.shared = b.storage.get() + (128 - reinterpret_cast<uintptr_t>(b.storage.get()) % 128) % 128;
  b.fibres = std::vector<Fibre>(threads);
  for (Fibre &f : b.fibres) f.stack.reset(new char[kStackBytes]);
  b.argument = &call;
  b.entry = [](const void *p) {
    const Call *c = static_cast<const Call *>(p);
    c->kernel(c->params);
  };
  block = &b;
  std::vector<int> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (block_order) std::shuffle(order.begin(), order.end(), std::minstd_rand(block_order));
  std::vector<Block::Published> late;
  for (const int i : order) {
    b.index = i % grid.x;
    b.index_y = i / grid.x % grid.y;
    b.index_z = i / grid.x / grid.y;
    run_block(b);
    late.insert(late.end(), b.published.begin(), b.published.end());
    b.published.clear();
  }
  for (const Block::Published &each : late) memcpy(each.to, each.bytes, each.size);
  block = nullptr;
  return error[0] ? error : nullptr;
}

}  // namespace erq
