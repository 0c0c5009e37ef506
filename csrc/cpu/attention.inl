// Attention on codes, for one variant: a task is a head and some of its query rows.
//
// Probabilities are never written: with x = (score − max) · log2 e and Z = Σ 2^x, the log-√2 code
// is round(2 (log2 Z − log2(1 / s_p)) − 2x). Its value 2^(−code/2) is a whole power of two for even
// codes and one over √2 for odd ones. Each parity is multiplied with the values as integers: codes
// 16j to 16j + 15 weigh 2^7 to 2^0 in "plane" j, bytes all of which are 0 for codes elsewhere.

namespace erq {
namespace ERQ_VARIANT {

constexpr float kLog2E = 1.44269504f;
constexpr float kSqrt2 = 1.41421356f;
constexpr int kMaxPlanes = 16;

// 2^x for x from −125 to 127, relative error below 2e-7.
inline F exp2_of(F x) {
  const F magic = set(12582912.0f);  // a sum with it is whole, its lowest bits are the number
  const F place = add(x, magic), f = sub(x, sub(place, magic));
  F y = fma(set(1.3266971e-3f), f, set(9.67546e-3f));
  y = fma(y, f, set(5.5507425e-2f));
  y = fma(y, f, set(0.24022122f));
  y = fma(y, f, set(0.69314694f));
  y = fma(y, f, set(1.0000001f));
  return scale2(y, bits_of(place));
}

struct ZeroPoints {
  int64_t q, k, v;  // of what `dot` multiplies
  bool is_wide;     // scores do not fit int32
  bool v_fits;      // v − zero point fits int8
  explicit ZeroPoints(const ErqAttention &a) {
    const int64_t qk_offset = a.qk_bits == 8 ? 128 : 0, v_offset = a.av_bits == 8 ? 128 : 0;
    q = *a.q_zero_point - qk_offset + kShift;
    k = *a.k_zero_point - qk_offset;
    v = *a.v_zero_point - v_offset;
    const auto bound = [](int64_t zero) { return static_cast<double>(256 + (zero < 0 ? -zero : zero)); };
    is_wide = bound(q) * bound(k) * static_cast<double>(a.d) >= 2147483648.0;
    v_fits = -v_offset - v >= -128 && (int64_t{1} << a.av_bits) - 1 - v_offset - v <= 127;
  }
};

struct Head {
  const int8_t *q, *k, *v;
  const float *bias;
  Head(const ErqAttention &a, int64_t b, int64_t h)
      : q(a.q + b * a.q_strides[0] + h * a.q_strides[1]),
        k(a.k + b * a.k_strides[0] + h * a.k_strides[1]),
        v(a.v + b * a.v_strides[0] + h * a.v_strides[1]),
        bias(a.bias == nullptr ? nullptr
                               : a.bias + b % a.bias_batches * a.bias_strides[0] +
                                     h * a.bias_strides[1]) {}
};

// The work space of a task; `keys` and `dims` are t and d in whole panels.
struct Space {
  int64_t keys, dims, d_groups, t_groups, weight_stride;
  int8_t *k, *v;
  int32_t *k_sums, *first, *scores, *even, *odd, *zeros;
  float *s, *values;
  Encoder encode;
  double *even_total, *odd_total;
  A *q, *weights;
  uint8_t *codes;
  char *row;

  Space(const ErqAttention &a, bool is_float) {
    keys = round_up(a.t, kPanel);
    dims = round_up(a.d, kPanel);
    d_groups = groups_of(a.d);
    t_groups = groups_of(a.t);
    weight_stride = round_up(a.t, kLine) + kLine;
    divide(nullptr, a, is_float);
    divide(thread_memory(used), a, is_float);
  }

 private:
  int64_t used = 0;

  void divide(void *memory, const ErqAttention &a, bool is_float) {
    Pieces p(memory);
    k = p.take<int8_t>(keys * d_groups * kGroup);
    v = p.take<int8_t>(is_float ? 0 : dims * t_groups * kGroup);
    values = p.take<float>(is_float ? a.t * dims : 0);
    k_sums = p.take<int32_t>(keys);
    first = p.take<int32_t>(keys);
    scores = p.take<int32_t>(kScoreRows * keys);
    s = p.take<float>(kScoreRows * keys);
    even = p.take<int32_t>(2 * kScoreRows * dims);
    odd = even == nullptr ? nullptr : even + kScoreRows * dims;
    even_total = p.take<double>(kScoreRows * dims);
    odd_total = p.take<double>(kScoreRows * dims);
    zeros = p.take<int32_t>(dims);
    encode.take(p, dims);
    q = p.take<A>(kScoreRows * d_groups * kGroup + kLine);
    weights = p.take<A>(2 * kScoreRows * weight_stride);
    codes = p.take<uint8_t>(kScoreRows * weight_stride);
    row = p.take<char>(dims * 4);
    used = p.used();
  }
};

// v as the second operand of `dot`: [panel of d][groups of t][kPanel][kGroup], less `shift`.
inline void pack_values(const int8_t *v, int64_t stride, int64_t t, int64_t d, int64_t shift,
                        int64_t groups, int8_t *to) {
  for (int64_t c0 = 0; c0 < d; c0 += kPanel, to += groups * kPanel * kGroup) {
    const int64_t count = d - c0 < kPanel ? d - c0 : kPanel;
    for (int64_t g = 0; g < groups; ++g) {
      if constexpr (kHasInterleave) {
        interleave_rows(v + g * kGroup * stride + c0, stride, t - g * kGroup, count, shift,
                        to + g * kPanel * kGroup);
        continue;
      }
      uint8_t lines[kGroup][kPanel] = {};
      for (int64_t i = 0; i < kGroup && g * kGroup + i < t; ++i) {
        const int8_t *from = v + (g * kGroup + i) * stride + c0;
        const uint8_t less = static_cast<uint8_t>(shift);
        for (int64_t c = 0; c < count; ++c)
          lines[i][c] = static_cast<uint8_t>(static_cast<uint8_t>(from[c]) - less);
      }
      // A group's bytes as one number, lowest first.
      uint32_t words[kPanel];
      for (int64_t c = 0; c < kPanel; ++c) {
        words[c] = lines[0][c];
        for (int i = 1; i < kGroup; ++i) words[c] |= uint32_t{lines[i][c]} << (8 * i);
      }
      int8_t *group = to + g * kPanel * kGroup;
      for (int64_t c = 0; c < kPanel; ++c) memcpy(group + c * kGroup, &words[c], kGroup);
    }
  }
}

class HeadTask {
 public:
  HeadTask(const ErqAttention &args, int64_t b, int64_t h)
      : a(args),
        head(args, b, h),
        zero(args),
        is_float(args.p_inv_scale == nullptr),
        is_direct(!zero.is_wide && args.bias == nullptr && *args.score_scale > 0.0f),
        space(args, is_float),
        planes(ceil_div((int64_t{1} << args.av_bits) / 2, 8)),
        p_level(is_float ? 0.0f : log2f(*args.p_inv_scale)),
        out_row((b * args.t * args.h + h) * args.d) {
    prepare();
  }

  void run(int64_t row, int64_t last) {
    [[maybe_unused]] const Tiles tiles;
    for (; row < last; row += kScoreRows) {
      const int64_t rows = last - row < kScoreRows ? last - row : kScoreRows;
      score(row, rows);
      soften(rows);
      if (is_float) {
        for (int64_t r = 0; r < rows; ++r) average(row + r, r);
      } else {
        sum_values(rows);
        for (int64_t r = 0; r < rows; ++r) combine(row + r, r);
      }
    }
  }

 private:
  const ErqAttention &a;
  const Head head;
  const ZeroPoints zero;
  const bool is_float, is_direct;  // is_direct: scores are whole numbers times a scale
  Space space;
  const int64_t planes;
  const float p_level;
  const int64_t out_row;
  Meanwhile nothing;
  int32_t row_term[kScoreRows];
  int highest = 0, lowest = 255;  // codes of the rows at hand
  uint8_t tables[2][kMaxPlanes][256];

  void prepare() {
    const int64_t group_bytes = kPanel * kGroup;
    memset(space.k_sums, 0, static_cast<size_t>(space.keys) * 4);
    memset(space.zeros, 0, static_cast<size_t>(space.dims) * 4);
    for (int64_t t = 0; t < a.t; t += kPanel)
      pack_panel(head.k + t * a.k_strides[2], a.k_strides[2],
                 a.t - t < kPanel ? a.t - t : kPanel, a.d,
                 space.k + t / kPanel * space.d_groups * group_bytes, space.k_sums + t);
    if (!zero.is_wide)
      for (int64_t t = 0; t < space.keys; ++t)
        space.first[t] = static_cast<int32_t>(zero.q * (a.d * zero.k - space.k_sums[t]));
    if (a.out_type == ERQ_CODES)
      space.encode.fill(a.quantizer, 0, a.d, space.dims);
    if (is_float) {
      for (int64_t t = 0; t < a.t; ++t)
        for (int64_t d = 0; d < space.dims; ++d)
          space.values[t * space.dims + d] =
              d < a.d ? static_cast<float>(head.v[t * a.v_strides[2] + d] - zero.v) : 0.0f;
      return;
    }
    pack_values(head.v, a.v_strides[2], a.t, a.d, zero.v_fits ? zero.v : 0, space.t_groups,
                space.v);
    const int levels = 1 << a.av_bits;
    memset(tables, 0, sizeof tables);
    for (int code = 0; code < levels - (a.zero_last ? 1 : 0); ++code)
      tables[code & 1][code >> 4][code] = static_cast<uint8_t>(128 >> (code >> 1 & 7));
  }

  // Scores of `rows` query rows as they come from `dot`, or complete in `s`.
  void score(int64_t row, int64_t rows) {
    const int64_t lda = space.d_groups * kGroup, group_bytes = kPanel * kGroup;
    for (int64_t r = 0; r < rows; ++r) {
      widen_row(head.q + (row + r) * a.q_strides[2], space.q + r * lda, a.d);
      row_term[r] = static_cast<int32_t>(-zero.k * sum_bytes(space.q + r * lda, a.d));
      if (zero.is_wide) score_wide(row + r, r);
    }
    if (!zero.is_wide)
      for (int64_t t = 0; t < a.t; t += kPanel)
        choose_dot(rows, a.t - t)(space.d_groups, space.q, lda,
                                  space.k + t / kPanel * space.d_groups * group_bytes, group_bytes,
                                  space.first + t, space.scores + t, space.keys, nothing);
    if (is_direct) return;
    const int64_t end = round_up(a.t, kW);
    for (int64_t r = 0; r < rows; ++r) {
      float *to = space.s + r * space.keys;
      for (int64_t t = 0; !zero.is_wide && t < end; t += kW) store(to + t, direct_score(r, t));
      if (head.bias != nullptr) add_bias(head.bias + (row + r) * a.bias_strides[2], to);
      for (int64_t t = a.t; t < end; ++t) to[t] = -INFINITY;
    }
  }

  F direct_score(int64_t r, int64_t t) const {
    const I sums = load(space.scores + r * space.keys + t);
    return mul(to_float(add(sums, set(row_term[r]))), set(*a.score_scale));
  }

  void score_wide(int64_t row, int64_t r) {
    const int8_t *q = head.q + row * a.q_strides[2];
    for (int64_t t = 0; t < a.t; ++t) {
      const int8_t *k = head.k + t * a.k_strides[2];
      int64_t total = 0;
      for (int64_t d = 0; d < a.d; ++d)
        total += (q[d] + kShift - zero.q) * (k[d] - zero.k);
      space.s[r * space.keys + t] = static_cast<float>(total) * *a.score_scale;
    }
  }

  void add_bias(const float *bias, float *to) {
    const int64_t stride = a.bias_strides[3];
    int64_t t = 0;
    if (stride == 1)
      for (; t + kW <= a.t; t += kW) store(to + t, add(load(to + t), load(bias + t)));
    for (; t < a.t; ++t) to[t] += bias[t * stride];
  }

  // The largest score of a row.
  float highest_score(int64_t r) const {
    if (is_direct) {
      // The whole numbers are in the order of the scores.
      const int32_t *from = space.scores + r * space.keys;
      const int64_t whole = a.t / kW * kW;
      int32_t top = from[0];
      if (whole > 0) {
        I m = load(from);
        for (int64_t t = kW; t < whole; t += kW) m = max(m, load(from + t));
        top = max(m);
      }
      for (int64_t t = whole; t < a.t; ++t) top = from[t] > top ? from[t] : top;
      return static_cast<float>(top + row_term[r]) * *a.score_scale;
    }
    const float *s = space.s + r * space.keys;
    F m = load(s);
    for (int64_t t = kW; t < a.t; t += kW) m = max(m, load(s + t));
    return max(m);
  }

  // Replaces a row of scores by (score − top) · log2 e, or by its power of 2 if probabilities stay
  // float; returns the sum of those powers. What the loop reads is taken out of memory before it:
  // for all the compiler knows, its stores change that.
  template <bool kIsDirect>
  float exponentiate(int64_t r, float top) {
    const int32_t *from = space.scores + r * space.keys;
    float *to = space.s + r * space.keys;
    const I term = set(row_term[r]);
    const F scale = set(*a.score_scale), m = set(top), log2e = set(kLog2E), least = set(-125.0f);
    const bool keeps_powers = is_float;
    const int64_t whole = a.t / kW * kW;
    const auto exponent = [=](int64_t t) {
      F s;
      if constexpr (kIsDirect)
        s = mul(to_float(add(load(from + t), term)), scale);
      else
        s = load(to + t);
      return mul(sub(s, m), log2e);
    };
    F z = set(0.0f);
    const auto finish = [&](int64_t t, F x) {
      const F e = exp2_of(max(x, least));
      store(to + t, keeps_powers ? e : x);
      z = add(z, e);
    };
    for (int64_t t = 0; t < whole; t += kW) finish(t, exponent(t));
    if (whole < a.t) finish(whole, first_of(exponent(whole), a.t - whole, set(-INFINITY)));
    return sum(z);
  }

  // Scores of rows to log-√2 codes, or to probabilities.
  void soften(int64_t rows) {
    float total[kScoreRows];
    for (int64_t r = 0; r < rows; ++r) total[r] = highest_score(r);
    for (int64_t r = 0; r < rows; ++r)
      total[r] = is_direct ? exponentiate<true>(r, total[r]) : exponentiate<false>(r, total[r]);
    const F zero_level = set(0.0f), top = set(static_cast<float>((1 << a.av_bits) - 1));
    const F minus_two = set(-2.0f);
    for (int64_t r = 0; r < rows; ++r) {
      float *s = space.s + r * space.keys;
      if (is_float) {
        const F inverse = set(1.0f / total[r]);
        for (int64_t t = 0; t < a.t; t += kW) store(s + t, mul(load(s + t), inverse));
        continue;
      }
      const F c = set(2.0f * (log2f(total[r]) - p_level));
      uint8_t *codes = space.codes + r * space.weight_stride;
      for (int64_t t = 0, end = a.t; t < end; t += kW) {
        const F level = min(max(fma(load(s + t), minus_two, c), zero_level), top);
        store_bytes(reinterpret_cast<int8_t *>(codes + t), to_int(level));
      }
    }
  }

  // Σ weight · v of each parity, over all planes.
  void sum_values(int64_t rows) {
    if (planes == 1) {
      sum_plane(rows, 0);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t *codes = space.codes + r * space.weight_stride;
      for (int64_t t = 0; t < a.t; ++t) {
        highest = r + t == 0 || codes[t] > highest ? codes[t] : highest;
        lowest = r + t == 0 || codes[t] < lowest ? codes[t] : lowest;
      }
    }
    const int64_t count = rows * space.dims;
    for (int64_t i = 0; i < count; ++i) space.even_total[i] = space.odd_total[i] = 0.0;
    for (int64_t plane = lowest >> 4; plane <= highest >> 4; ++plane) {
      sum_plane(rows, plane);
      const double unit = ldexp(1.0, static_cast<int>(-(8 * plane + 7)));
      for (int64_t i = 0; i < count; ++i) {
        space.even_total[i] += space.even[i] * unit;
        space.odd_total[i] += space.odd[i] * (unit / 2);
      }
    }
  }

  // Of one plane, for both parities: the weights of odd codes, and their sums, come kScoreRows rows
  // after those of even codes, so that one product can do for both.
  void sum_plane(int64_t rows, int64_t plane) {
    const int64_t group_bytes = kPanel * kGroup, stride = space.weight_stride;
    A *odd_weights = space.weights + kScoreRows * stride;
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t *codes = space.codes + r * stride;
      const int bits = static_cast<int>(a.av_bits);
      look_up(codes, space.weights + r * stride, a.t, tables[0][plane], bits);
      look_up(codes, odd_weights + r * stride, a.t, tables[1][plane], bits);
    }
    for (int64_t d = 0; d < a.d; d += kPanel) {
      const int8_t *v = space.v + d / kPanel * space.t_groups * group_bytes;
      const auto multiply = [&](int64_t count, const A *weights, int32_t *out) {
        choose_dot(count, a.d - d)(space.t_groups, weights, stride, v, group_bytes, space.zeros,
                                   out + d, space.dims, nothing);
      };
      if constexpr (2 * kScoreRows <= kMr) {
        multiply(kScoreRows + rows, space.weights, space.even);
      } else {
        multiply(rows, space.weights, space.even);
        multiply(rows, odd_weights, space.odd);
      }
    }
    if (zero.v_fits) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t at : {r, kScoreRows + r}) {
        const int32_t term =
            static_cast<int32_t>(zero.v * sum_bytes(space.weights + at * stride, a.t));
        for (int64_t d = 0; d < a.d; ++d) space.even[at * space.dims + d] -= term;
      }
  }

  void combine(int64_t row, int64_t r) {
    const F root = set(kSqrt2), scale = set(*a.value_scale);
    const F even_unit = set(0x1p-7f), odd_unit = set(0x1p-8f);
    const int64_t at = r * space.dims;
    char *to = target(row);
    for (int64_t d = 0; d < a.d; d += kW) {
      F e, f;
      if (planes == 1) {
        e = mul(to_float(load(space.even + at + d)), even_unit);
        f = mul(to_float(load(space.odd + at + d)), odd_unit);
      } else {
        float rounded[2][kW];
        for (int i = 0; i < kW; ++i) {
          rounded[0][i] = static_cast<float>(space.even_total[at + d + i]);
          rounded[1][i] = static_cast<float>(space.odd_total[at + d + i]);
        }
        e = load(rounded[0]);
        f = load(rounded[1]);
      }
      write(to, d, mul(add(e, mul(root, f)), scale));
    }
    flush(row);
  }

  // One row of probabilities times v.
  void average(int64_t row, int64_t r) {
    const float *p = space.s + r * space.keys;
    const F scale = set(*a.value_scale);
    char *to = target(row);
    for (int64_t d = 0; d < a.d; d += kPanel) {
      F y[kNr];
      for (int i = 0; i < kNr; ++i) y[i] = set(0.0f);
      for (int64_t t = 0; t < a.t; ++t)
        for (int i = 0; i < kNr; ++i)
          y[i] = fma(set(p[t]), load(space.values + t * space.dims + d + i * kW), y[i]);
      for (int i = 0; i < kNr && d + i * kW < a.d; ++i) write(to, d + i * kW, mul(y[i], scale));
    }
    flush(row);
  }

  // Results of whole vectors go to their place, others by way of a buffer.
  char *target(int64_t row) const {
    if (a.d % kW) return space.row;
    return static_cast<char *>(a.out) + (out_row + row * a.h * a.d) * type_size(a.out_type);
  }

  void write(char *to, int64_t d, F y) const {
    if (a.out_type == ERQ_CODES) {
      store_bytes(reinterpret_cast<int8_t *>(to) + d, space.encode.columns(d)(y));
    } else {
      store(reinterpret_cast<float *>(to) + d, y);
    }
  }

  void flush(int64_t row) const {
    if (a.d % kW == 0) return;
    const int64_t size = type_size(a.out_type);
    memcpy(static_cast<char *>(a.out) + (out_row + row * a.h * a.d) * size, space.row,
           static_cast<size_t>(a.d * size));
  }
};

void attention(const ErqAttention &a) {
  const int64_t heads = a.b * a.h;
  if (heads == 0 || a.t == 0 || a.d == 0) return;
  // Heads alone where they are many; else rows of one are divided, and its k and v read again.
  int64_t parts = a.threads > 1 ? ceil_div(4 * a.threads, heads) : 1;
  const int64_t most = ceil_div(a.t, 8 * kScoreRows);
  if (parts > most) parts = most;
  const int64_t rows = round_up(ceil_div(a.t, parts), kScoreRows);
  parallel_for(heads * parts, static_cast<int>(a.threads), [&](int64_t task) {
    const int64_t head = task / parts, row = task % parts * rows;
    if (row >= a.t) return;
    HeadTask(a, head / a.h, head % a.h).run(row, row + rows < a.t ? row + rows : a.t);
  });
}

}  // namespace ERQ_VARIANT
}  // namespace erq
