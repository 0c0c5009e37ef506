// LayerNorm + quantize, quantize, weights decoded from their packed codes, and the packing itself,
// for one variant.

namespace erq {
namespace ERQ_VARIANT {

constexpr int64_t kRowsPerTask = 16;

// Where each output column of LayerNorm comes from, in the form that gather_bytes reads.
struct Gather {
  uint8_t *low, *high;
};

// Σ of `n` floats, a whole number of vectors, by a function of each vector.
template <typename Each>
float sum_of(int64_t n, const Each &each) {
  F s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kW <= n; i += 4 * kW)
    for (int j = 0; j < 4; ++j) s[j] = add(s[j], each(i + j * kW));
  for (; i < n; i += kW) s[0] = add(s[0], each(i));
  return sum(add(add(s[0], s[1]), add(s[2], s[3])));
}

void normalize_rows(const ErqLayerNorm &a, const Gather &gather, int64_t row, int64_t last) {
  // Of so many rows the same step at once, since each ends in a chain of dependent instructions.
  constexpr int64_t kTogether = 4;
  const int64_t room = round_up(a.k, kW), wide = round_up(a.columns, kLine);
  const bool in_place = a.x_type == ERQ_FLOAT32 && a.k % kW == 0;
  float *copies = nullptr, *weight = nullptr, *bias = nullptr;
  Encoder encode = {};
  int8_t *codes = nullptr, *gathered = nullptr;
  const auto divide = [&](void *memory) {
    Pieces pieces(memory);
    copies = pieces.take<float>(in_place ? 0 : kTogether * room);
    weight = pieces.take<float>(room);
    bias = pieces.take<float>(room);
    encode.take(pieces, room);
    codes = pieces.take<int8_t>(round_up(a.k, 2 * kLine));
    gathered = pieces.take<int8_t>(wide);
    return pieces.used();
  };
  divide(thread_memory(divide(nullptr)));
  load_row(a.weight, ERQ_FLOAT32, 0, a.k, weight);
  load_row(a.bias, ERQ_FLOAT32, 0, a.k, bias);
  encode.fill(a.quantizer, 0, a.k, room);
  const float count = static_cast<float>(a.k);
  const int64_t whole = a.k / kW * kW;
  for (; row < last; row += kTogether) {
    const int64_t rows = last - row < kTogether ? last - row : kTogether;
    const float *x[kTogether];
    float mean[kTogether], rate[kTogether];
    for (int64_t r = 0; r < rows; ++r) {
      x[r] = static_cast<const float *>(a.x) + (row + r) * a.x_stride;
      if (in_place) continue;
      load_row(a.x, a.x_type, (row + r) * a.x_stride, a.k, copies + r * room);
      x[r] = copies + r * room;
    }
    for (int64_t r = 0; r < rows; ++r)
      mean[r] = sum_of(room, [&](int64_t i) { return load(x[r] + i); }) / count;
    for (int64_t r = 0; r < rows; ++r) {
      const F m = set(mean[r]);
      float squares = sum_of(whole, [&](int64_t i) {
        const F d = sub(load(x[r] + i), m);
        return mul(d, d);
      });
      for (int64_t i = whole; i < a.k; ++i) squares += (x[r][i] - mean[r]) * (x[r][i] - mean[r]);
      rate[r] = static_cast<float>(1.0 / sqrt(squares / count + a.eps));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F m = set(mean[r]), scale = set(rate[r]);
      int8_t *out = a.out + (row + r) * a.columns, *to = a.order == nullptr ? out : codes;
      const auto value = [&](int64_t at) {
        const F y = fma(mul(sub(load(x[r] + at), m), scale), load(weight + at), load(bias + at));
        return encode.columns(at)(y);
      };
      for (int64_t i = 0; i < whole; i += kW) store_bytes(to + i, value(i));
      if (whole < a.k) {
        int8_t rest[kW];
        store_bytes(rest, value(whole));
        memcpy(to + whole, rest, static_cast<size_t>(a.k - whole));
      }
      if (a.order == nullptr) continue;
      if (gather.low != nullptr) {
        gather_bytes(codes, a.k, gather.low, gather.high, gathered, a.columns);
        memcpy(out, gathered, static_cast<size_t>(a.columns));
      } else {
        for (int64_t i = 0; i < a.columns; ++i) out[i] = codes[a.order[i]];
      }
    }
  }
}

int32_t layer_norm_quantize(const ErqLayerNorm &a) {
  for (int64_t i = 0; a.order != nullptr && i < a.columns; ++i)
    if (a.order[i] < 0 || a.order[i] >= a.k) return 1;
  if (a.m == 0 || a.columns == 0) return 0;
  const int64_t wide = round_up(a.columns, kLine);
  Gather gather = {nullptr, nullptr};
  const bool can_gather = kHasGather && a.order != nullptr && a.k <= 128 * 256;
  if (can_gather) gather.low = static_cast<uint8_t *>(calloc(static_cast<size_t>(2 * wide), 1));
  if (gather.low != nullptr) {
    gather.high = gather.low + wide;
    for (int64_t i = 0; i < a.columns; ++i) {
      gather.low[i] = a.order[i] & 127;
      gather.high[i] = static_cast<uint8_t>(a.order[i] >> 7);
    }
  }
  parallel_for(ceil_div(a.m, kRowsPerTask), static_cast<int>(a.threads), [&](int64_t task) {
    const int64_t row = task * kRowsPerTask, last = row + kRowsPerTask;
    normalize_rows(a, gather, row, last < a.m ? last : a.m);
  });
  free(gather.low);
  return 0;
}

void quantize(const ErqQuantize &a) {
  const bool per_column = a.quantizer.is_per_column;
  // One scale: the whole tensor is one row, cut into pieces.
  const int64_t piece = per_column ? a.k : 16384;
  const int64_t rows = per_column ? a.m : ceil_div(a.m * a.k, piece);
  if (a.m == 0 || a.k == 0) return;
  const int64_t per_task = per_column ? ceil_div(16384, a.k) : 1;
  parallel_for(ceil_div(rows, per_task), static_cast<int>(a.threads), [&](int64_t task) {
    const int64_t room = per_column ? round_up(a.k, kW) : kW;
    Encoder encode = {};
    const auto divide = [&](void *memory) {
      Pieces pieces(memory);
      encode.take(pieces, room);
      return pieces.used();
    };
    divide(thread_memory(divide(nullptr)));
    encode.fill(a.quantizer, 0, per_column ? a.k : kW, room);
    const int64_t end = (task + 1) * per_task < rows ? (task + 1) * per_task : rows;
    for (int64_t row = task * per_task; row < end; ++row) {
      const int64_t at = row * piece, left = a.m * a.k - at, n = left < piece ? left : piece;
      for (int64_t i = 0; i < n; i += kW) {
        const int64_t p = per_column ? i : 0;
        float buffer[kW];
        const bool is_whole = i + kW <= n;
        if (!is_whole) load_row(a.x, a.x_type, at + i, n - i, buffer);
        const F x = is_whole ? load_as(a.x, a.x_type, at + i) : load(buffer);
        const I code = encode.columns(p)(x);
        int8_t rest[kW];
        store_bytes(is_whole ? a.out + at + i : rest, code);
        if (!is_whole) memcpy(a.out + at + i, rest, static_cast<size_t>(n - i));
      }
    }
  });
}

// Row n of the decoded weight; `codes` and `w` have room for eight more elements.
void decode_row(const ErqDequantLinear &a, int64_t n, uint8_t *codes, float *w) {
  const int bits = static_cast<int>(a.bits);
  for (int64_t k = 0; k < a.k; k += 8) {
    const int64_t bit = (n * a.k + k) * bits, byte = bit >> 3, left = a.packed_bytes - byte;
    uint64_t word = 0;
    // Eight codes from any bit of a byte on: at 8 bits they start on a byte, so 64 bits hold them.
    if (left >= 8)
      memcpy(&word, a.packed + byte, 8);
    else
      memcpy(&word, a.packed + byte, static_cast<size_t>(left));
    word = spread(word >> (bit & 7), bits);
    memcpy(codes + k, &word, 8);
  }
  const F scale = set(a.scale[n]), zero = set(static_cast<float>(a.zero_point[n]));
  for (int64_t k = 0; k < a.k; k += kW) store(w + k, mul(sub(load_bytes(codes + k), zero), scale));
  for (int64_t i = 0; i < a.column_count; ++i) {
    const int64_t k = a.columns[i];
    w[k] = static_cast<float>(codes[k] - a.zero_point2[n]) * a.scale2[n];
  }
}

inline float dot_row(const float *x, const float *w, int64_t k) {
  F s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kW <= k; i += 4 * kW)
    for (int j = 0; j < 4; ++j) s[j] = fma(load(x + i + j * kW), load(w + i + j * kW), s[j]);
  for (; i + kW <= k; i += kW) s[0] = fma(load(x + i), load(w + i), s[0]);
  float rest = 0.0f;
  for (; i < k; ++i) rest += x[i] * w[i];
  return sum(add(add(s[0], s[1]), add(s[2], s[3]))) + rest;
}

void dequant_linear(const ErqDequantLinear &a) {
  constexpr int64_t kOutputs = 16;
  parallel_for(ceil_div(a.n, kOutputs), static_cast<int>(a.threads), [&](int64_t task) {
    const int64_t room = round_up(a.k, kW) + kLine;
    uint8_t *codes = nullptr;
    float *w = nullptr;
    const auto divide = [&](void *memory) {
      Pieces pieces(memory);
      codes = pieces.take<uint8_t>(room);
      w = pieces.take<float>(room);
      return pieces.used();
    };
    divide(thread_memory(divide(nullptr)));
    const int64_t end = (task + 1) * kOutputs < a.n ? (task + 1) * kOutputs : a.n;
    for (int64_t n = task * kOutputs; n < end; ++n) {
      decode_row(a, n, codes, w);
      if (a.x == nullptr) {
        memcpy(a.out + n * a.k, w, static_cast<size_t>(a.k) * 4);
        continue;
      }
      for (int64_t m = 0; m < a.m; ++m)
        a.out[m * a.n + n] = dot_row(a.x + m * a.k, w, a.k) + (a.bias ? a.bias[n] : 0.0f);
    }
  });
}

// Eight codes are one word of `bits` bytes; tasks are whole words.
constexpr int64_t kStreamTask = 1 << 16;

void pack(const ErqStream &a) {
  parallel_for(ceil_div(a.count, kStreamTask), static_cast<int>(a.threads), [&](int64_t task) {
    const int64_t last = (task + 1) * kStreamTask < a.count ? (task + 1) * kStreamTask : a.count;
    for (int64_t i = task * kStreamTask; i < last; i += 8) {
      const int64_t n = last - i < 8 ? last - i : 8;
      uint64_t word = 0;
      memcpy(&word, a.from + i, static_cast<size_t>(n));
      word = gather_bits(word, static_cast<int>(a.bits));
      memcpy(a.to + i / 8 * a.bits, &word, static_cast<size_t>(ceil_div(n * a.bits, 8)));
    }
  });
}

void unpack(const ErqStream &a) {
  parallel_for(ceil_div(a.count, kStreamTask), static_cast<int>(a.threads), [&](int64_t task) {
    const int64_t last = (task + 1) * kStreamTask < a.count ? (task + 1) * kStreamTask : a.count;
    for (int64_t i = task * kStreamTask; i < last; i += 8) {
      const int64_t n = last - i < 8 ? last - i : 8;
      uint64_t word = 0;
      memcpy(&word, a.from + i / 8 * a.bits, static_cast<size_t>(ceil_div(n * a.bits, 8)));
      word = spread(word, static_cast<int>(a.bits));
      memcpy(a.to + i, &word, static_cast<size_t>(n));
    }
  });
}

}  // namespace ERQ_VARIANT
}  // namespace erq
