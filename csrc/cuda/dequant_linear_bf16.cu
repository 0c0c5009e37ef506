// The instances of dequant_linear.cuh for x of bf16.
#include "dequant_linear.cuh"

namespace erq {

const char *launch_dequant_bf16(const DequantParams &p, void *stream) {
  return launch_dequant_bits<Bf16>(p, stream);
}

}  // namespace erq
