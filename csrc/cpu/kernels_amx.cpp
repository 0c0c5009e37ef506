#define ERQ_VARIANT amx
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd_avx512.h"
#include "cpu/dot_amx.h"

#include "cpu/shared.inl"

#include "cpu/attention.inl"
#include "cpu/elementwise.inl"
#include "cpu/qlinear.inl"

#include "cpu/block.inl"

const erq::Kernels erq::amx::kernels = {
    packed_bytes, pack_weight,    qlinear, layer_norm_quantize, quantize,
    attention,    dequant_linear, pack,    unpack,        block,
};
