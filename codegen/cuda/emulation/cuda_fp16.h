/* IEEE binary16 on the host; every operation rounds to it, as on the GPU. */
#pragma once
typedef _Float16 half;
typedef half __half;
struct alignas(4) half2 { half x, y; };
typedef half2 __half2;
static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline float __half2float(half x) { return (float)x; }
static inline half __float2half(float x) { return (half)x; }
static inline half __float2half_rn(float x) { return (half)x; }
static inline bool __hgt(half a, half b) { return a > b; }
static inline bool __hlt(half a, half b) { return a < b; }
static inline bool __hisnan(half a) { return a != a; }
static inline half __hadd(half a, half b) { return a + b; }
static inline half __hsub(half a, half b) { return a - b; }
static inline half __hmul(half a, half b) { return a * b; }
static inline half __hdiv(half a, half b) { return a / b; }
static inline half __habs(half a) { return a < (half)0 ? -a : a; }
static inline half __hmax(half a, half b) { return a > b ? a : b; }
static inline half __hmin(half a, half b) { return a < b ? a : b; }
#define SIMT_HALF(name, of) static inline half name(half x) { return (half)of((float)x); }
SIMT_HALF(hsqrt, sqrtf)
SIMT_HALF(hrsqrt, rsqrtf)
SIMT_HALF(hlog, logf)
SIMT_HALF(hlog2, log2f)
SIMT_HALF(hlog10, log10f)
SIMT_HALF(hexp2, exp2f)
SIMT_HALF(hexp10, __exp10f)
SIMT_HALF(hsin, sinf)
SIMT_HALF(hcos, cosf)
SIMT_HALF(hfloor, floorf)
SIMT_HALF(hceil, ceilf)
SIMT_HALF(htrunc, truncf)
SIMT_HALF(hrint, rintf)
SIMT_HALF(hexp, expf)
SIMT_HALF(htanh, tanhf)
