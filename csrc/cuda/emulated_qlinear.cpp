// The kernels on the host: the sources of the CUDA library, compiled with ERQ_EMULATE, and what the
// tests ask besides erq_cuda.h.
#include "library.cu"
#include "qlinear_s4.cu"
#include "qlinear_s8.cu"

extern "C" {

// Put a fault of emulation::Fault into the kernels; 0: none.
ERQ_CUDA_API void erq_emulation_fault(int fault) { erq::emulation::fault = fault; }

// Run warps and lanes from the last to the first.
ERQ_CUDA_API void erq_emulation_reverse(int reversed) { erq::emulation::is_reversed = reversed != 0; }

// Run blocks from the first to the last (0), or shuffled by another number.
ERQ_CUDA_API void erq_emulation_block_order(unsigned order) { erq::emulation::block_order = order; }

// Wavefronts that were needed without conflicts, then those above, since the last call: of ldmatrix,
// cp.async, loads and stores; 8 numbers.
ERQ_CUDA_API void erq_emulation_statistics(long long *to) {
  using namespace erq::emulation;
  for (int i = 0; i < kAccesses; ++i) {
    to[i] = statistics.wavefronts[i];
    to[kAccesses + i] = statistics.conflicts[i];
  }
  statistics = Statistics();
}

}  // extern "C"
