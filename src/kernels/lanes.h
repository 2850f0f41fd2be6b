// Vectors of which some lanes are in use, and what loops do with whole ones and parts alike. With element_types.h the only
// place that knows element types.
#pragma once

#include "element_types.h"

namespace anynorm::ANYNORM_TARGET {

// Copies n < 2 * Most elements in pieces of a size that is known: memcpy of an unknown one would be a call.
template <int Most, class T>
INLINE void copy_some(T* to, const T* from, int64_t n) {
    if (n & Most) {
        std::memcpy(to, from, Most * sizeof(T));
        to += Most;
        from += Most;
    }
    if constexpr (Most > 1) copy_some<Most / 2>(to, from, n);
}

// The first n lanes, the others 0, without touching memory beyond them.
template <class T>
INLINE Lanes load(const T* p, Part part) {
    T some[2 * W] = {};
    copy_some<W>(some, p, part.n);
    return load(some, Full{});
}
template <class T>
INLINE Singles load_singles(const T* p, Part part) {
    T some[2 * W] = {};
    copy_some<2 * W>(some, p, part.n);
    return load_singles(some, Full{});
}
template <class T, class Vector>
INLINE void store(T* p, Vector v, Part part) {
    T some[2 * W];
    store(some, v, Full{});
    copy_some<2 * W>(p, some, part.n);
}
#if defined(__AVX512VL__)
INLINE Lanes load(const float* p, Part part) {
    const auto f = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << part.n) - 1), p);
    return widen(bits_of<Floats>(f));
}
INLINE Lanes load(const double* p, Part part) {
    return bits_of<Lanes>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << part.n) - 1), p));
}
INLINE void store(double* p, Lanes v, Part part) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << part.n) - 1), bits_of<__m512d>(v));
}
INLINE Singles load_singles(const float* p, Part part) {
    return bits_of<Singles>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << part.n) - 1), p));
}
INLINE void store(float* p, Singles v, Part part) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << part.n) - 1), bits_of<__m512>(v));
}
#elif defined(__AVX2__)
// Stores of a part are not masked here: some processors take forty cycles for one.
INLINE __m256i first_doubles(Part part) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(part.n), _mm256_setr_epi64x(0, 1, 2, 3)); }
INLINE __m256i first_singles(Part part) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(part.n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE Lanes load(const float* p, Part part) {
    const auto f = _mm_maskload_ps(p, _mm256_castsi256_si128(first_singles(part)));
    return widen(bits_of<Floats>(f));
}
INLINE Lanes load(const double* p, Part part) { return bits_of<Lanes>(_mm256_maskload_pd(p, first_doubles(part))); }
INLINE Singles load_singles(const float* p, Part part) {
    return bits_of<Singles>(_mm256_maskload_ps(p, first_singles(part)));
}
#endif

INLINE Lanes square_root(Lanes v) {
#if defined(__AVX512F__)
    return bits_of<Lanes>(_mm512_sqrt_pd(bits_of<__m512d>(v)));
#elif defined(__AVX2__)
    return bits_of<Lanes>(_mm256_sqrt_pd(bits_of<__m256d>(v)));
#else
    for (int i = 0; i < W; ++i) v[i] = std::sqrt(v[i]);
    return v;
#endif
}

template <class T, class Vector>
INLINE void store_result(T* p, Vector v, Part part, bool) {
    store(p, v, part);
}

// What a loop computes in, by name: double or float.
template <class Compute>
struct LanesOf {
    using type = Lanes;
    static constexpr int width = W;
};
template <>
struct LanesOf<float> {
    using type = Singles;
    static constexpr int width = 2 * W;
};
template <class Compute, class T, class Some>
INLINE typename LanesOf<Compute>::type load_as(const T* p, Some some) {
    if constexpr (LanesOf<Compute>::width == W) {
        return load(p, some);
    } else {
        return load_singles(p, some);
    }
}

// Loaded once, however often it is used: a compiler would rather read memory again.
template <class V>
INLINE V in_register(V v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__AVX__)
    __asm__("" : "+x"(v));
#endif
    return v;
}

template <class T>
INLINE double scalar(const T* p) {
    return load(p, Part{1})[0];
}

// Zero in the lanes that are not in use, whatever they hold.
template <class V>
INLINE V clear_unused(V v, Full) {
    return v;
}
INLINE Lanes clear_unused(Lanes v, Part part) {
    Indices index;
    for (int i = 0; i < W; ++i) index[i] = i;
    return index < part.n ? v : Lanes{};
}
INLINE Singles clear_unused(Singles v, Part part) {
    SingleIndices index;
    for (int i = 0; i < 2 * W; ++i) index[i] = i;
    return index < static_cast<int32_t>(part.n) ? v : Singles{};
}

INLINE bool has_any(Indices lanes) {
    int64_t any = 0;
    for (int i = 0; i < W; ++i) any |= lanes[i];
    return any != 0;
}

INLINE double add_lanes(Lanes v) {
    using Pair = double __attribute__((vector_size(16)));
    struct Pairs {
        Pair p[W / 2];
    };
    Pairs pairs = bits_of<Pairs>(v);
    for (int half = W / 4; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) pairs.p[i] += pairs.p[i + half];
    }
    return pairs.p[0][0] + pairs.p[0][1];
}

// How many vectors of doubles hold a vector's values, each of them, and which of its lanes are in use.
template <class Compute>
constexpr int kParts = LanesOf<Compute>::width / W;
INLINE Lanes part_of(Lanes v, int) { return v; }
INLINE Lanes part_of(Singles v, int part) {
    const Halves halves = bits_of<Halves>(v);
    return widen(part == 0 ? halves.low : halves.high);
}
INLINE Full part_of(Full, int) { return {}; }
INLINE Part part_of(Part some, int part) {
    const int64_t n = some.n - part * W;
    return {n < 0 ? 0 : n < W ? n : W};
}

// body(start, Full or Part, which of four accumulators) over [0, length), in vectors of `Width`. A long body is not
// written out several times and has one accumulator, so that an element's place in the sum does not depend on the length.
template <int Width, bool Long = false, class Body>
INLINE void sweep(int64_t length, Body body) {
    int64_t i = 0;
    if constexpr (Long) {
        for (; i + Width <= length; i += Width) body(i, Full{}, 0);
        if (i < length) body(i, Part{length - i}, 0);
        return;
    }
    for (; i + 4 * Width <= length; i += 4 * Width) {
        body(i, Full{}, 0);
        body(i + Width, Full{}, 1);
        body(i + 2 * Width, Full{}, 2);
        body(i + 3 * Width, Full{}, 3);
    }
    if (i + 2 * Width <= length) {
        body(i, Full{}, 0);
        body(i + Width, Full{}, 1);
        i += 2 * Width;
    }
    if (i + Width <= length) {
        body(i, Full{}, 2);
        i += Width;
    }
    if (i < length) body(i, Part{length - i}, 3);
}

// The same where each element is written by itself: a vector at the end takes some of the one before once more, which costs
// less than a part. Where `room` elements are to be written, it is a part that padding can be stored with.
template <int Width, bool Long = false, class Body>
INLINE void sweep_results(int64_t length, int64_t room, Body body) {
    int64_t i = 0;
    for (; !Long && i + 4 * Width <= length; i += 4 * Width) {
        for (int u = 0; u < 4; ++u) body(i + u * Width, Full{});
    }
    for (; i < length; i += Width) {
        if (i + Width > length && (length < Width || i + Width <= room)) return body(i, Part{length - i});
        body(i + Width <= length ? i : length - Width, Full{});
    }
}

}  // namespace anynorm::ANYNORM_TARGET
