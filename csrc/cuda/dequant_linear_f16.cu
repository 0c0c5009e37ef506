// The instances of dequant_linear.cuh for x of f16.
#include "dequant_linear.cuh"

namespace erq {

const char *launch_dequant_f16(const DequantParams &p, void *stream) {
  return launch_dequant_bits<F16>(p, stream);
}

}  // namespace erq
