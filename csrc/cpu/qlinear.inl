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

// The epilogue's vectors for one panel of columns: the call's own, or copies with zeros beyond the
// last column.
struct PanelParams {
  const float *scale, *scale2, *bias, *layer_scale;
  float copies[4][kPanel], inv_scale[kPanel], low[kPanel], high[kPanel];
  int32_t zero_point[kPanel];

  Encoder encoder() const {
    PanelParams *p = const_cast<PanelParams *>(this);
    return {p->inv_scale, p->low, p->high, p->zero_point};
  }

  void fill(const ErqQlinear &a, int64_t first, int64_t count) {
    const float *from[] = {a.scale, a.scale2, a.bias, a.layer_scale};
    const float **to[] = {&scale, &scale2, &bias, &layer_scale};
    for (int i = 0; i < 4; ++i) {
      const bool copied = from[i] == nullptr || count < kPanel;
      *to[i] = copied ? copies[i] : from[i] + first;
      if (!copied) continue;
      memset(copies[i], 0, sizeof copies[i]);
      if (from[i] != nullptr) memcpy(copies[i], from[i] + first, static_cast<size_t>(count) * 4);
    }
    if (a.out_type == ERQ_CODES) encoder().fill(a.quantizer, first, count, kPanel);
  }
};

// Where a tile's residual is read and its result written: in place, or in buffers of whole vectors.
struct TileMemory {
  const char *residual;
  int64_t residual_stride;  // elements
  char *out;
  int64_t out_stride;
};

// The epilogue of some rows and of columns first to last − 1 of a panel. kHasMore: a layer scale, a
// residual, or both.
template <bool kHasAct, bool kIsCodes, bool kHasSecond, bool kHasMore>
void finish_rows(const ErqQlinear &a, const PanelParams &p, int64_t rows, int64_t first,
                 int64_t last, const int32_t *acc, const int32_t *acc2, const TileMemory &m) {
  const bool has_layer_scale = a.layer_scale != nullptr, has_residual = m.residual != nullptr;
  const float *gelu = gelu_table(a.act);
  const Table c0(gelu), c1(gelu + 32), c2(gelu + 64), c3(gelu + 96), c4(gelu + 128);
  const F magic = set(kGeluMagic), end = set(kGeluEnd), zero = set(0.0f);
  const int64_t out_type = a.out_type, out_step = m.out_stride * type_size(out_type);
  for (int64_t at = first; at < last; at += kW) {
    const int64_t c = at - first;
    const F scale = load(p.scale + at), scale2 = load(p.scale2 + at), bias = load(p.bias + at);
    const F layer_scale = load(p.layer_scale + at);
    const Encoder::Columns encode = p.encoder().columns(at);
    char *out = m.out + c * type_size(out_type);
    for (int64_t r = 0; r < rows; ++r, out += out_step) {
      F y = mul(to_float(load(acc + r * kTileColumns + c)), scale);
      if constexpr (kHasSecond)
        y = add(y, mul(to_float(load(acc2 + r * kTileColumns + c)), scale2));
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
      if constexpr (kHasMore) {
        if (has_layer_scale) y = mul(y, layer_scale);
        if (has_residual)
          y = add(load_as(m.residual, a.residual_type, r * m.residual_stride + c), y);
      }
      if constexpr (kIsCodes)
        store_bytes(reinterpret_cast<int8_t *>(out), encode(y));
      else
        store_as(out, out_type, 0, y);
    }
  }
}

using FinishRows = void (*)(const ErqQlinear &, const PanelParams &, int64_t, int64_t, int64_t,
                            const int32_t *, const int32_t *, const TileMemory &);

// The variant of finish_rows for a call, told by the flags from the first on.
template <bool... kFlags>
FinishRows choose_finish() {
  return finish_rows<kFlags...>;
}
template <bool... kFlags, typename... Rest>
FinishRows choose_finish(bool flag, Rest... rest) {
  return flag ? choose_finish<kFlags..., true>(rest...) : choose_finish<kFlags..., false>(rest...);
}

// Sums on their way to their place: rows from `row` on, columns first to last − 1 of the panel that
// begins with column n.
struct Tile {
  const ErqQlinear *a;
  const PanelParams *params;
  FinishRows finish_rows;
  int64_t row, n, first, last;
  const int32_t *acc, *acc2;

  static void finish(const void *tile, int64_t begin, int64_t end) {
    static_cast<const Tile *>(tile)->finish(begin, end);
  }

  void finish(int64_t begin, int64_t end) const {
    const int64_t columns = last - first;
    const int64_t residual_size = type_size(a->residual_type), out_size = type_size(a->out_type);
    const char *residual = static_cast<const char *>(a->residual);
    if (residual != nullptr)
      residual += ((row + begin) * a->residual_stride + n + first) * residual_size;
    char *out = static_cast<char *>(a->out) + ((row + begin) * a->n + n + first) * out_size;
    const auto sums = [&](const int32_t *from, int64_t r) {
      return from == nullptr ? nullptr : from + r * kTileColumns;
    };
    if (columns % kW == 0) {
      finish_rows(*a, *params, end - begin, first, last, sums(acc, begin), sums(acc2, begin),
                  {residual, a->residual_stride, out, a->n});
      return;
    }
    char whole_residual[kTileColumns * 4] = {}, whole_out[kTileColumns * 4];
    for (int64_t r = begin; r < end; ++r) {
      if (residual != nullptr) {
        memcpy(whole_residual, residual, static_cast<size_t>(columns * residual_size));
        residual += a->residual_stride * residual_size;
      }
      finish_rows(*a, *params, 1, first, last, sums(acc, r), sums(acc2, r),
                  {residual == nullptr ? nullptr : whole_residual, 0, whole_out, 0});
      memcpy(out, whole_out, static_cast<size_t>(columns * out_size));
      out += a->n * out_size;
    }
  }
};

void multiply_block(const ErqQlinear &a, const Packed &layout, int64_t row, int64_t rows,
                    int64_t first_panel, int64_t last_panel) {
  const int64_t k1 = layout.groups1 * kGroup, k2 = layout.groups2 * kGroup, lda = k1 + k2;
  const FinishRows finish =
      choose_finish(a.act != ERQ_ACT_NONE, a.out_type == ERQ_CODES, k2 > 0,
                    a.layer_scale != nullptr || a.residual != nullptr);
  constexpr int64_t kSums = kMr * kTileColumns;
  A *x = nullptr;
  int32_t *sums = nullptr;
  PanelParams *params = nullptr;
  const auto divide = [&](void *memory) {
    Pieces pieces(memory);
    x = pieces.take<A>(round_up(rows, kRowUnit) * lda + kLine);
    sums = pieces.take<int32_t>(4 * kSums);
    params = pieces.take<PanelParams>(2);
    return pieces.used();
  };
  divide(thread_memory(divide(nullptr)));

  for (int64_t r = 0; r < rows; ++r) {
    const int8_t *from = a.x + (row + r) * a.x_stride;
    widen_row(from, x + r * lda, layout.k1);
    if (k2) widen_row(from + a.split, x + r * lda + k1, layout.k2);
  }
  const int32_t *sums1 = layout.sums(static_cast<const int32_t *>(a.packed), 0);
  const int32_t *sums2 = layout.sums(static_cast<const int32_t *>(a.packed), 1);
  constexpr int64_t kGroupBytes = kPanel * kGroup;
  [[maybe_unused]] const Tiles tiles;
  // While a tile is multiplied, the one before it is finished: two of everything, in turns.
  Tile tiles_at_hand[2];
  Meanwhile meanwhile;
  int turn = 0;
  // Rows that are finished in one step of `dot`; few of them would not be worth a call.
  const int64_t steps = (k1 + k2) / kStep, share = 8 * steps > kMr ? 8 : ceil_div(kMr, steps + 1);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t n = panel * kPanel, count = a.n - n < kPanel ? a.n - n : kPanel;
    PanelParams *own = params + (panel & 1);
    own->fill(a, n, count);
    const int8_t *w = layout.panel(static_cast<const int8_t *>(a.packed), panel);
    for (int64_t r = 0; r < rows; r += kMr) {
      const int64_t height = rows - r < kMr ? rows - r : kMr;
      for (int64_t c = 0; c < count; c += kTileColumns, turn ^= 1) {
        const int64_t width = count - c < kTileColumns ? count - c : kTileColumns;
        const Dot multiply = choose_dot(height, width);
        const A *from = x + r * lda;
        const int8_t *columns = w + c * kGroup;
        int32_t *acc = sums + 2 * turn * kSums, *acc2 = k2 ? acc + kSums : nullptr;
        meanwhile.quota = share;
        multiply(layout.groups1, from, lda, columns, kGroupBytes, sums1 + n + c, acc, kTileColumns,
                 meanwhile);
        if (k2)
          multiply(layout.groups2, from + k1, lda, columns + layout.groups1 * kGroupBytes,
                   kGroupBytes, sums2 + n + c, acc2, kTileColumns, meanwhile);
        meanwhile.complete();
        Tile &tile = tiles_at_hand[turn];
        tile = {&a, own, finish, row + r, n, c, c + width, acc, acc2};
        meanwhile = {Tile::finish, &tile, height};
        if (!kOverlaps) meanwhile.complete();
      }
    }
  }
  meanwhile.complete();
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
