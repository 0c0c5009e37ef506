// Integer GEMM with its epilogue, for one variant.
//
// The packed weight: how many columns of each segment are not padding (zeros in every row at the
// segment's end), −kShift · Σ_k w of each segment, int32 [N] twice, then panels of kPanel columns,
// each [groups of segment 1, then of segment 2][kPanel][kGroup].

namespace erq {
namespace ERQ_VARIANT {

struct Packed {
  int64_t k1, k2;  // columns that are multiplied
  int64_t groups1, groups2, columns;
  Packed(int64_t n, int64_t first, int64_t second)
      : k1(first),
        k2(second),
        groups1(groups_of(first)),
        groups2(groups_of(second)),
        columns(round_up(n, kPanel)) {}
  explicit Packed(const ErqQlinear &a)
      : Packed(a.n, static_cast<const int64_t *>(a.packed)[0],
               static_cast<const int64_t *>(a.packed)[1]) {}
  int64_t panel_bytes() const { return (groups1 + groups2) * kPanel * kGroup; }
  int64_t sums_bytes() const { return round_up(columns * 4, kLine); }
  int64_t bytes() const { return kLine + 2 * sums_bytes() + columns / kPanel * panel_bytes(); }
  template <typename T>
  T *sums(T *base, int segment) const {
    return base + (kLine + segment * sums_bytes()) / 4;
  }
  template <typename T>
  T *panel(T *base, int64_t i) const {
    return base + kLine + 2 * sums_bytes() + i * panel_bytes();
  }
};

// Columns first..last−1 without those at the end that are zero in every row.
inline int64_t without_padding(const ErqPackWeight &a, int64_t first, int64_t last) {
  for (; last > first; --last)
    for (int64_t n = 0; n < a.n; ++n)
      if (a.weight[n * a.k + last - 1] != 0) return last - first;
  return 0;
}

int64_t packed_bytes(int64_t n, int64_t k, int64_t split) {
  return Packed(n, split, k - split).bytes();
}

void pack_weight(const ErqPackWeight &a) {
  const Packed layout(a.n, without_padding(a, 0, a.split), without_padding(a, a.split, a.k));
  int32_t *base = static_cast<int32_t *>(a.packed);
  int8_t *bytes = static_cast<int8_t *>(a.packed);
  memset(a.packed, 0, static_cast<size_t>(kLine + 2 * layout.sums_bytes()));
  static_cast<int64_t *>(a.packed)[0] = layout.k1;
  static_cast<int64_t *>(a.packed)[1] = layout.k2;
  for (int64_t n = 0; n < a.n; n += kPanel) {
    const int64_t count = a.n - n < kPanel ? a.n - n : kPanel;
    int8_t *panel = layout.panel(bytes, n / kPanel);
    for (int segment = 0; segment < 2; ++segment) {
      const int64_t first = segment ? a.split : 0, k = segment ? layout.k2 : layout.k1;
      int32_t *sums = layout.sums(base, segment) + n;
      pack_panel(a.weight + n * a.k + first, a.k, count, k,
                 panel + (segment ? layout.groups1 * kPanel * kGroup : 0), sums);
      for (int64_t i = 0; i < count; ++i) sums[i] *= -kShift;
    }
  }
}

// The epilogue's vectors for one panel of columns, zeros beyond the last.
struct PanelParams {
  float scale[kPanel], scale2[kPanel], bias[kPanel], layer_scale[kPanel];
  float inv_scale[kPanel], zero_point[kPanel];

  void fill(const ErqQlinear &a, int64_t first, int64_t count) {
    const auto copy = [&](const float *from, float *to) {
      if (from == nullptr) return;
      for (int64_t i = 0; i < kPanel; ++i) to[i] = i < count ? from[first + i] : 0.0f;
    };
    copy(a.scale, scale);
    copy(a.scale2, scale2);
    copy(a.bias, bias);
    copy(a.layer_scale, layer_scale);
    if (a.out_type == ERQ_CODES)
      load_quantizer(a.quantizer, first, count, kPanel, inv_scale, zero_point);
  }
};

// Where a tile's residual is read and its result written: in place, or in buffers of whole vectors.
struct TileMemory {
  const char *residual;
  int64_t residual_stride;  // elements
  char *out;
  int64_t out_stride;
};

template <bool kHasAct, bool kIsCodes>
void finish(const ErqQlinear &a, const PanelParams &p, int64_t rows, int64_t columns,
            const int32_t *acc, const int32_t *acc2, const float *gelu, const TileMemory &m) {
  const CodeRange range(kIsCodes ? a.quantizer.bits : 2);
  const F low = set(range.low), high = set(range.high);
  const bool has_second = acc2 != nullptr, has_layer_scale = a.layer_scale != nullptr;
  const bool has_residual = m.residual != nullptr;
  const Table c0(gelu), c1(gelu + 32), c2(gelu + 64), c3(gelu + 96), c4(gelu + 128);
  const F magic = set(kGeluMagic), end = set(kGeluEnd), zero = set(0.0f);
  for (int64_t c = 0; c < columns; c += kW) {
    const F scale = load(p.scale + c), scale2 = load(p.scale2 + c), bias = load(p.bias + c);
    const F layer_scale = load(p.layer_scale + c);
    const F inv_scale = load(p.inv_scale + c), zero_point = load(p.zero_point + c);
    for (int64_t r = 0; r < rows; ++r) {
      F y = mul(to_float(load(acc + r * kPanel + c)), scale);
      if (has_second) y = add(y, mul(to_float(load(acc2 + r * kPanel + c)), scale2));
      y = add(y, bias);
      if constexpr (kHasAct) {
        const F magnitude = abs(y), near = min(magnitude, end);
        const F place = add(near, magic), f = sub(near, sub(place, magic));
        const I index = bits_of(place);
        F q = fma(c4[index], f, c3[index]);
        q = fma(q, f, c2[index]);
        q = fma(q, f, c1[index]);
        q = fma(q, f, c0[index]);
        y = sub(max(y, zero), mul(magnitude, q));
      }
      if (has_layer_scale) y = mul(y, layer_scale);
      if (has_residual) y = add(load_as(m.residual, a.residual_type, r * m.residual_stride + c), y);
      if constexpr (kIsCodes)
        store_bytes(reinterpret_cast<int8_t *>(m.out) + r * m.out_stride + c,
                    encode(y, inv_scale, zero_point, low, high));
      else
        store_as(m.out, a.out_type, r * m.out_stride + c, y);
    }
  }
}

using Finish = void (*)(const ErqQlinear &, const PanelParams &, int64_t, int64_t, const int32_t *,
                        const int32_t *, const float *, const TileMemory &);

void multiply_block(const ErqQlinear &a, const Packed &layout, int64_t row, int64_t rows,
                    int64_t first_panel, int64_t last_panel) {
  const int64_t k1 = layout.groups1 * kGroup, k2 = layout.groups2 * kGroup, lda = k1 + k2;
  const int64_t out_size = type_size(a.out_type), residual_size = type_size(a.residual_type);
  const bool is_codes = a.out_type == ERQ_CODES, has_act = a.act != ERQ_ACT_NONE;
  const Finish finish_tile = has_act ? (is_codes ? finish<true, true> : finish<true, false>)
                                     : (is_codes ? finish<false, true> : finish<false, false>);
  const float *gelu = gelu_table(a.act);

  A *x = nullptr;
  int32_t *acc = nullptr, *acc2 = nullptr;
  char *edge_out = nullptr, *edge_residual = nullptr;
  PanelParams *params = nullptr;
  const auto divide = [&](void *memory) {
    Pieces pieces(memory);
    x = pieces.take<A>(round_up(rows, kRowUnit) * lda + kLine);
    acc = pieces.take<int32_t>(kMr * kPanel);
    acc2 = pieces.take<int32_t>(kMr * kPanel);
    edge_out = pieces.take<char>(kMr * kPanel * 4);
    edge_residual = pieces.take<char>(kMr * kPanel * 4);
    params = pieces.take<PanelParams>(1);
    return pieces.used();
  };
  divide(thread_memory(divide(nullptr)));
  memset(params, 0, sizeof *params);

  for (int64_t r = 0; r < rows; ++r) {
    const int8_t *from = a.x + (row + r) * a.x_stride;
    widen_row(from, x + r * lda, layout.k1);
    if (k2) widen_row(from + a.split, x + r * lda + k1, layout.k2);
  }
  const int32_t *sums1 = layout.sums(static_cast<const int32_t *>(a.packed), 0);
  const int32_t *sums2 = layout.sums(static_cast<const int32_t *>(a.packed), 1);
  constexpr int64_t kGroupBytes = kPanel * kGroup;
  [[maybe_unused]] const Tiles tiles;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t n = panel * kPanel, count = a.n - n < kPanel ? a.n - n : kPanel;
    params->fill(a, n, count);
    const int8_t *w = layout.panel(static_cast<const int8_t *>(a.packed), panel);
    for (int64_t r = 0; r < rows; r += kMr) {
      const int64_t height = rows - r < kMr ? rows - r : kMr;
      const Dot multiply = choose_dot(height, count);
      const A *from = x + r * lda;
      multiply(layout.groups1, from, lda, w, kGroupBytes, sums1 + n, acc, kPanel);
      if (k2)
        multiply(layout.groups2, from + k1, lda, w + layout.groups1 * kGroupBytes, kGroupBytes,
                 sums2 + n, acc2, kPanel);
      const int64_t at = row + r;
      const char *residual = static_cast<const char *>(a.residual);
      if (residual != nullptr) residual += (at * a.residual_stride + n) * residual_size;
      char *out = static_cast<char *>(a.out) + (at * a.n + n) * out_size;
      const int32_t *second = k2 ? acc2 : nullptr;
      if (count == kPanel) {
        finish_tile(a, *params, height, count, acc, second, gelu,
                    {residual, a.residual_stride, out, a.n});
        continue;
      }
      const size_t residual_bytes = static_cast<size_t>(count * residual_size);
      const size_t out_bytes = static_cast<size_t>(count * out_size);
      for (int64_t i = 0; residual != nullptr && i < height; ++i)
        memcpy(edge_residual + i * kPanel * residual_size,
               residual + i * a.residual_stride * residual_size, residual_bytes);
      finish_tile(a, *params, height, count, acc, second, gelu,
                  {residual == nullptr ? nullptr : edge_residual, kPanel, edge_out, kPanel});
      for (int64_t i = 0; i < height; ++i)
        memcpy(out + i * a.n * out_size, edge_out + i * kPanel * out_size, out_bytes);
    }
  }
}

void qlinear(const ErqQlinear &a) {
  if (a.m == 0 || a.n == 0) return;
  const Packed layout(a);
  const int64_t panels = layout.columns / kPanel, wanted = a.threads > 1 ? 4 * a.threads : 1;
  // kTaskRows: few enough rows for the caches, enough to read the weight seldom.
  const int64_t row_tasks = ceil_div(a.m, kTaskRows);
  const int64_t rows = round_up(ceil_div(a.m, row_tasks), kMr);
  int64_t column_tasks = ceil_div(wanted, row_tasks);
  if (column_tasks > panels) column_tasks = panels;
  const int64_t width = ceil_div(panels, column_tasks);
  parallel_for(row_tasks * column_tasks, static_cast<int>(a.threads), [&](int64_t task) {
    const int64_t row = task / column_tasks * rows, first = task % column_tasks * width;
    const int64_t last = first + width < panels ? first + width : panels;
    if (row < a.m && first < last)
      multiply_block(a, layout, row, a.m - row < rows ? a.m - row : rows, first, last);
  });
}

}  // namespace ERQ_VARIANT
}  // namespace erq
