// What the kernels of one variant share. Included once per variant, after its simd header.

namespace erq {
namespace ERQ_VARIANT {

constexpr int kPanel = kNr * kW;
constexpr int64_t kLine = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hands out pieces of a block of memory, each on a cache line of its own; the first pass, without
// memory, finds out how much it takes.
class Pieces {
 public:
  explicit Pieces(void *memory) : base_(static_cast<char *>(memory)) {}
  template <typename T>
  T *take(int64_t count) {
    char *p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLine);
    return reinterpret_cast<T *>(p);
  }
  int64_t used() const { return used_; }

 private:
  char *base_;
  int64_t used_ = 0;
};

// The dot products of 1 to kMr rows with 1 to kNr vectors of columns.
using Dot = void (*)(int64_t, const A *, int64_t, const int8_t *, int64_t, const int32_t *,
                     int32_t *, int64_t, Meanwhile &);

template <int MR>
Dot dot_of(int vectors) {
  if constexpr (kNr == 4) {
    static constexpr Dot table[] = {dot<MR, 1>, dot<MR, 2>, dot<MR, 3>, dot<MR, 4>};
    return table[vectors - 1];
  } else {
    return vectors == 1 ? dot<MR, 1> : dot<MR, 2>;
  }
}

// Of MR or fewer units of rows.
template <int MR = kMr / kRowUnit>
Dot choose_rows(int64_t units, int vectors) {
  if constexpr (MR > 1)
    if (units < MR) return choose_rows<MR - 1>(units, vectors);
  return dot_of<MR>(vectors);
}

inline Dot choose_dot(int64_t rows, int64_t columns) {
  return choose_rows(ceil_div(rows, kRowUnit),
                     static_cast<int>(columns >= kPanel ? kNr : ceil_div(columns, kW)));
}

// Groups of a length in whole steps of `dot`.
inline int64_t groups_of(int64_t k) { return round_up(k, kStep) / kGroup; }

// The second operand of `dot`: columns of a panel are the rows of `from`, [count, k]; missing rows
// and the last step are filled up with zeros. Adds each column's sum to `sums`.
inline void pack_panel(const int8_t *from, int64_t stride, int64_t count, int64_t k, int8_t *to,
                       int32_t *sums) {
  const int64_t groups = groups_of(k), whole = k / kGroup;
  if constexpr (kHasInterleave) {
    for (int64_t c = 0; c < kPanel; c += kW)
      interleave_columns(from + c * stride, stride, count - c, k, groups, to + c * kGroup,
                         kPanel * kGroup, sums + c);
    return;
  }
  for (int64_t c = 0; c < kPanel; ++c) {
    int8_t *column = to + c * kGroup;
    if (c >= count) {
      for (int64_t g = 0; g < groups; ++g) memset(column + g * kPanel * kGroup, 0, kGroup);
      continue;
    }
    const int8_t *row = from + c * stride;
    for (int64_t g = 0; g < whole; ++g)
      memcpy(column + g * kPanel * kGroup, row + g * kGroup, kGroup);
    for (int64_t g = whole; g < groups; ++g) {
      int8_t last[kGroup] = {};
      if (g == whole) memcpy(last, row + g * kGroup, static_cast<size_t>(k - g * kGroup));
      memcpy(column + g * kPanel * kGroup, last, kGroup);
    }
    int32_t s = 0;
    for (int64_t i = 0; i < k; ++i) s += row[i];
    sums[c] += s;
  }
}

// A row of codes as the first operand of `dot`, filled up to whole steps.
inline void widen_row(const int8_t *from, A *to, int64_t k) {
  widen(from, to, k);
  for (int64_t i = k; i % kStep; ++i) to[i] = 0;
}

// A quantizer's vectors: code − offset = round(clamp(y · inv_scale, low, high)) + zero_point, where
// low and high are whole numbers, so that the order of rounding and clamping does not matter.
struct Encoder {
  float *inv_scale, *low, *high;
  int32_t *zero_point;

  void take(Pieces &pieces, int64_t room) {
    inv_scale = pieces.take<float>(room);
    low = pieces.take<float>(room);
    high = pieces.take<float>(room);
    zero_point = pieces.take<int32_t>(room);
  }

  // Columns first to first + count − 1, zeros up to `room`.
  void fill(const ErqQuantizer &q, int64_t first, int64_t count, int64_t room) const {
    const int64_t offset = q.bits == 8 ? 128 : 0, top = (int64_t{1} << q.bits) - 1;
    for (int64_t i = 0; i < room; ++i) {
      const int64_t at = q.is_per_column ? first + i : 0, zero = i < count ? q.zero_point[at] : 0;
      inv_scale[i] = i < count ? q.inv_scale[at] : 0.0f;
      zero_point[i] = static_cast<int32_t>(zero - offset);
      low[i] = static_cast<float>(-zero);
      high[i] = static_cast<float>(top - zero);
    }
  }

  // For a vector of columns: stores of codes may alias what they are made with, so it is read once.
  struct Columns {
    F inv_scale, low, high;
    I zero_point;
    I operator()(F y) const {
      return add(to_int(min(max(mul(y, inv_scale), low), high)), zero_point);
    }
  };
  Columns columns(int64_t at) const {
    return {load(inv_scale + at), load(low + at), load(high + at), load(zero_point + at)};
  }
};

inline F load_as(const void *p, int64_t type, int64_t at) {
  if (type == ERQ_FLOAT32) return load(static_cast<const float *>(p) + at);
  const uint16_t *h = static_cast<const uint16_t *>(p) + at;
  return type == ERQ_FLOAT16 ? load_half(h) : load_bfloat16(h);
}

inline int64_t type_size(int64_t type) {
  return type == ERQ_FLOAT32 ? 4 : type == ERQ_CODES ? 1 : 2;
}

inline void store_as(void *p, int64_t type, int64_t at, F x) {
  if (type == ERQ_FLOAT32)
    store(static_cast<float *>(p) + at, x);
  else if (type == ERQ_FLOAT16)
    store_half(static_cast<uint16_t *>(p) + at, x);
  else
    store_bfloat16(static_cast<uint16_t *>(p) + at, x);
}

// x[0..n) of any float type as fp32; `to` has room for a whole vector at the end.
inline void load_row(const void *x, int64_t type, int64_t at, int64_t n, float *to) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) store(to + i, load_as(x, type, at + i));
  if (i < n) {
    char last[kW * 4] = {};
    const int64_t size = type_size(type);
    memcpy(last, static_cast<const char *>(x) + (at + i) * size,
           static_cast<size_t>((n - i) * size));
    store(to + i, load_as(last, type, 0));
  }
}

}  // namespace ERQ_VARIANT
}  // namespace erq
