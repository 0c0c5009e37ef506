// The instances of dequant_linear.cuh for x of f32.
#include "dequant_linear.cuh"

namespace erq {

const char *launch_dequant_f32(const DequantParams &p, void *stream) {
  return launch_dequant_bits<F32>(p, stream);
}

}  // namespace erq
