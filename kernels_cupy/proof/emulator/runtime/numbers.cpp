// fp16 and bf16 to float and back, round to nearest even, by bits: the same on every CPU.
#include "state.h"

extern "C" __attribute__((const)) float emu_half_to_float(unsigned short bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023, out;
    if (exponent == 31) out = sign | 0x7f800000u | fraction << 13;
    else if (exponent) out = sign | (exponent + 112) << 23 | fraction << 13;
    else {
        float value = (float)fraction * 0x1p-24f;  // subnormal, exact
        memcpy(&out, &value, 4);
        out |= sign;
    }
    float result;
    memcpy(&result, &out, 4);
    return result;
}

extern "C" __attribute__((const)) unsigned short emu_float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (unsigned short)(sign | 0x7fff);
    if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00);  // rounds to infinity
    if (magnitude < 0x38800000u) {                                         // subnormal: adding 0.5 rounds at 2^-24
        float shifted;
        memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        memcpy(&magnitude, &shifted, 4);
        return (unsigned short)(sign | (magnitude - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1);
    return (unsigned short)(sign | (magnitude - 0x38000000u) >> 13);
}

extern "C" __attribute__((const)) unsigned short emu_float_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
