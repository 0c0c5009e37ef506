// See emulated_qlinear.cpp; apart, so that both compile side by side.
#include "dequant_linear_bf16.cu"
#include "dequant_linear_f16.cu"
#include "dequant_linear_f32.cu"
