// The 4-bit instances of qlinear.cuh: one or two segments, with or without weight offsets.
#include "qlinear.cuh"

namespace erq {

const char *launch_s4(int tile, const QlinearParams &p, void *stream) {
  if (p.a.scale2)
    return p.a.offset ? launch_tile<true, true, true>(tile, p, stream)
                      : launch_tile<true, true, false>(tile, p, stream);
  return p.a.offset ? launch_tile<true, false, true>(tile, p, stream)
                    : launch_tile<true, false, false>(tile, p, stream);
}

}  // namespace erq
