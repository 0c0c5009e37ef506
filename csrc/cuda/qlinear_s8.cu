// The 8-bit instances of qlinear.cuh: one or two segments.
#include "qlinear.cuh"

namespace erq {

const char *launch_s8(int tile, const QlinearParams &p, void *stream) {
  return p.a.scale2 ? launch_tile<false, true, false>(tile, p, stream)
                    : launch_tile<false, false, false>(tile, p, stream);
}

}  // namespace erq
