// Vectors of doubles and of floats, and how whole ones become and are made of each element type.
//
// Sums are double, and so is every product that enters one: with them no square overflows, no mean costs a digit, and values
// that would round alike in float do not. What is written is computed in float from coefficients that were found in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace anynorm::ANYNORM_TARGET {

#if defined(__AVX512F__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// The compiler's own half: g++ 12 knows the standard's name only on x86.
#if defined(__aarch64__)
using Half = __fp16;
#elif !defined(__F16C__)
using Half = _Float16;
#endif

using Lanes = double __attribute__((vector_size(8 * W)));
using Floats = float __attribute__((vector_size(4 * W)));
using Words = uint32_t __attribute__((vector_size(4 * W)));
using Shorts = uint16_t __attribute__((vector_size(2 * W)));
using Singles = float __attribute__((vector_size(8 * W)));  // twice as many lanes
using SingleWords = uint32_t __attribute__((vector_size(8 * W)));
using SingleShorts = uint16_t __attribute__((vector_size(4 * W)));
using Indices = int64_t __attribute__((vector_size(8 * W)));
using SingleIndices = int32_t __attribute__((vector_size(8 * W)));
struct Halves {
    Floats low, high;
};

// How many lanes are in use: all, known to the compiler, or the first n.
struct Full {};
struct Part {
    int64_t n;
};

template <class To, class From>
INLINE To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class Vector>
INLINE Vector raw_load(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

// By instructions of their own: g++ 12 makes five of __builtin_convertvector, by way of memory.
INLINE Lanes widen(Floats v) {
#if defined(__AVX512F__)
    return bits_of<Lanes>(_mm512_cvtps_pd(bits_of<__m256>(v)));
#elif defined(__AVX2__)
    return bits_of<Lanes>(_mm256_cvtps_pd(bits_of<__m128>(v)));
#else
    return __builtin_convertvector(v, Lanes);
#endif
}
INLINE Floats round_to_floats(Lanes v) {
#if defined(__AVX512F__)
    return bits_of<Floats>(_mm512_cvtpd_ps(bits_of<__m512d>(v)));
#elif defined(__AVX2__)
    return bits_of<Floats>(_mm256_cvtpd_ps(bits_of<__m256d>(v)));
#else
    return __builtin_convertvector(v, Floats);
#endif
}

INLINE Lanes load(const double* p, Full) { return raw_load<Lanes>(p); }
INLINE Lanes load(const float* p, Full) { return widen(raw_load<Floats>(p)); }
INLINE Lanes load(const bfloat16* p, Full) {
    const Words wide = __builtin_convertvector(raw_load<Shorts>(p), Words) << 16;
    return widen(bits_of<Floats>(wide));
}
INLINE Lanes load(const float16* p, Full) {
    Floats f;
#if defined(__F16C__) && defined(__AVX512F__)
    f = bits_of<Floats>(_mm256_cvtph_ps(raw_load<__m128i>(p)));
#elif defined(__F16C__)
    f = bits_of<Floats>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    for (int i = 0; i < W; ++i) f[i] = static_cast<float>(bits_of<Half>(p[i].bits));
#endif
    return widen(f);
}

// The bits that are stored of a vector.
INLINE Lanes narrow(const double*, Lanes v) { return v; }
INLINE Floats narrow(const float*, Lanes v) { return round_to_floats(v); }
INLINE Shorts narrow(const bfloat16*, Lanes v) {
    const Words w = bits_of<Words>(round_to_floats(v));
    const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;  // to nearest, ties to even
    const Words is_nan = (Words)((w & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Shorts);
}
INLINE Shorts narrow(const float16*, Lanes v) {
    const Floats f = round_to_floats(v);
    Shorts h;
#if defined(__F16C__) && defined(__AVX512F__)
    h = bits_of<Shorts>(_mm256_cvtps_ph(bits_of<__m256>(f), 0));
#elif defined(__F16C__)
    const __m128i both = _mm_cvtps_ph(bits_of<__m128>(f), 0);
    std::memcpy(&h, &both, sizeof(h));
#else
    for (int i = 0; i < W; ++i) h[i] = bits_of<uint16_t>(static_cast<Half>(f[i]));
#endif
    return h;
}

INLINE Singles load_singles(const float* p, Full) { return raw_load<Singles>(p); }
INLINE Singles load_singles(const bfloat16* p, Full) {
    return bits_of<Singles>(__builtin_convertvector(raw_load<SingleShorts>(p), SingleWords) << 16);
}
INLINE Singles load_singles(const float16* p, Full) {
#if defined(__F16C__) && defined(__AVX512F__)
    return bits_of<Singles>(_mm512_cvtph_ps(raw_load<__m256i>(p)));
#elif defined(__F16C__)
    return bits_of<Singles>(_mm256_cvtph_ps(raw_load<__m128i>(p)));
#else
    Singles f;
    for (int i = 0; i < 2 * W; ++i) f[i] = static_cast<float>(bits_of<Half>(p[i].bits));
    return f;
#endif
}

INLINE Singles narrow(const float*, Singles v) { return v; }
INLINE SingleShorts narrow(const bfloat16*, Singles v) {
    const SingleWords w = bits_of<SingleWords>(v);
    const SingleWords rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;  // to nearest, ties to even
    const SingleWords is_nan = (SingleWords)((w & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), SingleShorts);
}
INLINE SingleShorts narrow(const float16*, Singles v) {
#if defined(__F16C__) && defined(__AVX512F__)
    return bits_of<SingleShorts>(_mm512_cvtps_ph(bits_of<__m512>(v), 0));
#elif defined(__F16C__)
    return bits_of<SingleShorts>(_mm256_cvtps_ph(bits_of<__m256>(v), 0));
#else
    SingleShorts h;
    for (int i = 0; i < 2 * W; ++i) h[i] = bits_of<uint16_t>(static_cast<Half>(v[i]));
    return h;
#endif
}

template <class T, class Vector>
INLINE void store(T* p, Vector v, Full) {
    const auto bits = narrow(p, v);
    std::memcpy(p, &bits, sizeof(bits));
}

// Stores a part of a result. One that is too large for the caches bypasses them: they would read memory before it is
// overwritten, and drop what is still needed.
template <class T, class Vector>
INLINE void store_result(T* p, Vector v, Full, [[maybe_unused]] bool bypasses_caches) {
    const auto bits = narrow(p, v);
    [[maybe_unused]] const bool is_aligned = reinterpret_cast<uintptr_t>(p) % sizeof(bits) == 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(bits) == 64) {
        if (bypasses_caches && is_aligned) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_of<__m512i>(bits));
    }
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(bits) == 32) {
        if (bypasses_caches && is_aligned) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_of<__m256i>(bits));
    }
#endif
    std::memcpy(p, &bits, sizeof(bits));
}
// Stores that bypassed the caches are seen by other threads before what follows.
INLINE void fence_results() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

}  // namespace anynorm::ANYNORM_TARGET
