/* bfloat16 on the host: the upper half of a float, rounded to nearest even; arithmetic goes through float. */
#pragma once
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    bits = value != value ? (uint16_t)(word >> 16 | 64) : (uint16_t)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  }
  /* Through float, so that integers and doubles are rounded twice, as CUDA's conversions are not for large values. */
  template <class Number> nv_bfloat16(Number value) : nv_bfloat16((float)value) {}
  operator float() const {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};
typedef nv_bfloat16 __nv_bfloat16;
/* As in CUDA, operations of two bfloat16 values round to bfloat16. */
#define SIMT_BF16_OPERATOR(op, result) \
  static inline result operator op(nv_bfloat16 a, nv_bfloat16 b) { return result((float)a op(float) b); }
SIMT_BF16_OPERATOR(+, nv_bfloat16)
SIMT_BF16_OPERATOR(-, nv_bfloat16)
SIMT_BF16_OPERATOR(*, nv_bfloat16)
SIMT_BF16_OPERATOR(/, nv_bfloat16)
SIMT_BF16_OPERATOR(<, bool)
SIMT_BF16_OPERATOR(>, bool)
SIMT_BF16_OPERATOR(<=, bool)
SIMT_BF16_OPERATOR(>=, bool)
SIMT_BF16_OPERATOR(==, bool)
SIMT_BF16_OPERATOR(!=, bool)
static inline nv_bfloat16 operator-(nv_bfloat16 a) { return nv_bfloat16(-(float)a); }
struct alignas(4) nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162() = default;
  nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};
typedef nv_bfloat162 __nv_bfloat162;
static inline nv_bfloat162 make_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
static inline float __bfloat162float(nv_bfloat16 x) { return x; }
static inline nv_bfloat16 __float2bfloat16(float x) { return x; }
static inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
static inline bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a > (float)b; }
static inline bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a < (float)b; }
#define SIMT_BF16(name, of) static inline nv_bfloat16 name(nv_bfloat16 x) { return nv_bfloat16(of((float)x)); }
SIMT_BF16(hsqrt, sqrtf)
SIMT_BF16(hrsqrt, rsqrtf)
SIMT_BF16(hlog, logf)
SIMT_BF16(hexp2, exp2f)
SIMT_BF16(hsin, sinf)
SIMT_BF16(hcos, cosf)
SIMT_BF16(hexp, expf)
SIMT_BF16(htanh, tanhf)
