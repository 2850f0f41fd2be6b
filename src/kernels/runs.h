// Every loop along a contiguous run whose gamma and beta are constant. The scalar formula stands above each.
#pragma once

#include "activations.h"
#include "sums.h"

namespace anynorm::ANYNORM_TARGET {

// (x - high) * scale + shift. In float, high is the mean as far as a float goes, and the rest is in shift.
template <class Compute>
struct Line {
    Compute high = 0, scale = 0, shift = 0;
    Line() = default;
    INLINE Line(double mean, double a, double b)
        : high(static_cast<Compute>(mean)), scale(static_cast<Compute>(a)),
          shift(static_cast<Compute>(b + (high - mean) * a)) {}
};

template <class SomeLine>
using ComputeOf = decltype(SomeLine::high);

// What follows a run's norm: an activation, a residual before it, positions that count, and where the gradient before
// the activation goes.
template <class T>
struct Epilogue {
    Activation activation;
    const T* residual = nullptr;
    const float* mask = nullptr;
    T* gradient = nullptr;

    template <class V, class Compute, class Kind, class Some>
    INLINE V forward(Kind kind, V v, int64_t i, Some some) const {
        if (residual) v += load_as<Compute>(residual + i, some);
        v = kind.value(v);
        if (mask) v = load_as<Compute>(mask + i, some) > 0 ? v : V{};
        return v;
    }
    // g times the derivative, kept.
    template <class V, class Compute, class Kind, class Some>
    INLINE V backward(Kind kind, V g, V v, int64_t i, Some some) const {
        if (residual) v += load_as<Compute>(residual + i, some);
        // Opaque: what follows is contracted alike in every loop, whatever is known of the activation there.
        g = in_register(kind.gradient(g, v));
        if (mask) g = load_as<Compute>(mask + i, some) > 0 ? g : V{};
        if (gradient) store(gradient + i, g, some);
        return g;
    }
};

// Which of eight positions count, as bits, for all blocks of eight; the last may be shorter.
INLINE void find_counted_bits(const float* mask, int64_t size, uint8_t* bits) {
    for (int64_t i = 0; i < size; i += 8) {
        unsigned found = 0;
        for (int64_t j = 0; j < 8 && i + j < size; ++j) found |= (mask[i + j] > 0 ? 1u : 0u) << j;
        bits[i / 8] = static_cast<uint8_t>(found);
    }
}

// For each pattern of bits the places of those that are set, in order.
struct Places {
    uint8_t of[256][8] = {};
    constexpr Places() {
        for (int bits = 0; bits < 256; ++bits) {
            for (int from = 0, to = 0; from < 8; ++from) {
                if (bits >> from & 1) of[bits][to++] = static_cast<uint8_t>(from);
            }
        }
    }
};
inline constexpr Places kPlaces;
constexpr int64_t kGatherSlack = 8;  // `pack` writes eight values, of which some are there

// to = the values whose bit is set, one after the other, and then anything.
template <class T>
INLINE void pack(const T* from, unsigned bits, T* to) {
    const uint8_t* places = kPlaces.of[bits];
#if defined(__AVX2__)
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places));
    if constexpr (sizeof(T) == 4) {
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i packed = _mm256_permutevar8x32_epi32(values, _mm256_cvtepu8_epi32(eight));
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
    }
    if constexpr (sizeof(T) == 2) {  // each place is two bytes
        const __m128i first = _mm_mullo_epi16(_mm_cvtepu8_epi16(eight), _mm_set1_epi16(0x0202));
        const __m128i bytes = _mm_add_epi16(first, _mm_set1_epi16(0x0100));
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(values, bytes));
    }
#endif
    for (int i = 0; i < 8; ++i) to[i] = from[places[i]];
}

// to[i] = from[indices[i]]; `bits` says the same of a whole run, `length` long. Up to kGatherSlack values more are written.
template <class T>
INLINE void gather(const T* from, const uint8_t* bits, int64_t length, const int64_t* indices, int64_t size, T* to) {
    const int64_t begin = indices[0], end = indices[size - 1] + 1;
    for (int64_t i = begin / 8 * 8; i < end; i += 8) {
        unsigned chosen = bits[i / 8];
        if (i < begin) chosen &= 0xffu << (begin - i);
        if (i + 8 > end) chosen &= 0xffu >> (i + 8 - end);
        if (i + 8 <= length) {
            pack(from + i, chosen, to);
            to += __builtin_popcount(chosen);
        } else {
            for (int64_t j = i; j < end; ++j) {
                if (chosen >> (j - i) & 1) *to++ = from[j];
            }
        }
    }
}

// Stores a vector of a run's result. The last one is filled up with zeros where padding has room for them.
template <class T, class V>
INLINE void store_run(T* p, V v, Full, int64_t, bool bypasses_caches) {
    store_result(p, v, Full{}, bypasses_caches);
}
template <class T, class V>
INLINE void store_run(T* p, V v, Part part, int64_t room, bool bypasses_caches) {
    constexpr int64_t width = std::is_same_v<V, Lanes> ? W : 2 * W;
    if (room < width) return store_result(p, v, part, bypasses_caches);
    store_result(p, clear_unused(v, part), Full{}, bypasses_caches);
}
// Zeros behind it. Memory that was written past the caches is written so to the end, where its last vector was filled up: a
// line that is written both ways costs several times as much. Behind an activation it is not, for a part might round otherwise
// than without padding.
template <class V, class T>
INLINE void clear_run(T* y, int64_t size, int64_t length, bool bypasses_caches) {
    constexpr int64_t width = std::is_same_v<V, Lanes> ? W : 2 * W;
    int64_t i = (size + width - 1) / width * width;
    if (!bypasses_caches || i > length) return clear(y, size, length);
    for (; i + width <= length; i += width) store_result(y + i, V{}, Full{}, bypasses_caches);
    clear(y, i, length);
}

// What a value is copied in without a change.
template <class T>
using PlainOf = std::conditional_t<sizeof(T) == sizeof(double), double, float>;

// to[i] = mask[i] > 0 ? from[i] : 0, with `room` elements in `to`
template <class T>
INLINE void copy_counted(const T* from, const float* mask, int64_t size, T* to, int64_t room, bool bypasses_caches) {
    using V = VectorOf<PlainOf<T>>;
    sweep<kWidth<PlainOf<T>>>(size, [&](int64_t i, auto some, int) INLINE_LAMBDA {
        const V v = load_as<PlainOf<T>>(mask + i, some) > 0 ? load_as<PlainOf<T>>(from + i, some) : V{};
        store_run(to + i, v, some, room - i, bypasses_caches);
    });
}

// first = sum(x[i] - shift), second = sum((x[i] - shift)^2)
template <class T>
Sums run_moments(const T* x, const Runs& runs, double shift, bool restart) {
    Accumulator sums;
    sums.template sweep_runs<double>(runs, restart, [&](int64_t r, int64_t i, auto some, int u) INLINE_LAMBDA {
        const Lanes d = clear_unused(load(x + r * runs.stride + i, some) - shift, some);
        sums.add(u, d, d);
    }, [&](int64_t r, int64_t size) INLINE_LAMBDA { prefetch_padding(x + r * runs.stride, size, runs.length); });
    return sums.total();
}

// sum(x[i]^2)
template <class T>
double run_squares(const T* x, int64_t length) {
    Accumulator sums;
    sums.template sweep_runs<double>({1, 0, length}, false, [&](int64_t, int64_t i, auto some, int u) INLINE_LAMBDA {
        const Lanes v = load(x + i, some);
        sums.second[u] += v * v;
    }, [](int64_t, int64_t) {});
    return sums.total().second;
}

// y[i] = epilogue((x[i] - high) * scale + shift), for all runs; line_of(run) has the coefficients, epilogue_of(run) says what
// follows
template <class Compute, bool Active, class T, class LineOf, class EpilogueOf>
void run_apply(const T* x, T* y, const Runs& runs, LineOf line_of, EpilogueOf epilogue_of, bool bypasses_caches) {
    using V = VectorOf<Compute>;
    for (int64_t r = 0; r < runs.count; ++r, x += runs.stride, y += runs.stride) {
        const Line<Compute> line = line_of(r);
        const Epilogue<T> epilogue = epilogue_of(r);
        const int64_t size = runs.size(r);
        with_activation<Active, Compute>(epilogue.activation, [&](auto kind) INLINE_LAMBDA {
            sweep_results<kWidth<Compute>, Active>(size, Active ? size : runs.length, [&](int64_t i, auto some) INLINE_LAMBDA {
                V v = (load_as<Compute>(x + i, some) - line.high) * line.scale + line.shift;
                if constexpr (Active) v = epilogue.template forward<V, Compute>(kind, v, i, some);
                store_run(y + i, v, some, runs.length - i, bypasses_caches);
            });
        });
        clear_run<V>(y, size, runs.length, bypasses_caches && !Active);
        prefetch_padding(x, size, runs.length);
    }
}

// first = sum(g[i]), second = sum(g[i] * (x[i] - mean)), g before the activation; epilogue_of(run) says what follows it. The
// activation is computed as `line` is, the sums always in double.
template <class Compute, bool Active, class T, class EpilogueOf>
Sums run_grad_sums(const T* g, const T* x, const Runs& runs, double mean, Line<Compute> line, EpilogueOf epilogue_of,
                   bool restart) {
    using V = VectorOf<Compute>;
    Accumulator sums;
    if constexpr (Active) {
        for (int64_t r = 0; r < runs.count; ++r) {
            if (T* gradient = epilogue_of(r).gradient) clear(gradient, runs.size(r), runs.length);
        }
    }
    with_activation<Active, Compute>(epilogue_of(0).activation, [&](auto kind) INLINE_LAMBDA {
        sums.template sweep_runs<Compute, Active>(runs, restart, [&](int64_t r, int64_t i, auto some, int u) INLINE_LAMBDA {
            const T* here = x + r * runs.stride + i;
            V v = load_as<Compute>(g + r * runs.stride + i, some);
            if constexpr (Active) {
                const V z = (load_as<Compute>(here, some) - line.high) * line.scale + line.shift;
                v = epilogue_of(r).template backward<V, Compute>(kind, v, z, i, some);
            }
            for (int p = 0; p < kParts<Compute>; ++p) {
                sums.add(u + p, part_of(v, p), load(here + p * W, part_of(some, p)) - mean);
            }
        }, [&](int64_t r, int64_t size) INLINE_LAMBDA {
            prefetch_padding(g + r * runs.stride, size, runs.length);
            prefetch_padding(x + r * runs.stride, size, runs.length);
        });
    });
    return sums.total();
}

// dx[i] = g[i] * line.scale - ((x[i] - high) * slope + constant), 0 where a position does not count, for all runs; g
// before the activation, found once more rather than read rounded. Given statistics have no slopes: an infinite x would
// make NaN of a slope of 0.
template <class Compute, bool Active, class T, class LineOf, class SlopesOf, class EpilogueOf>
void run_dx(const T* g, const T* x, T* dx, const Runs& runs, LineOf line_of, SlopesOf slopes_of, EpilogueOf epilogue_of,
            bool bypasses_caches, bool has_given_statistics = false) {
    using V = VectorOf<Compute>;
    for (int64_t r = 0; r < runs.count; ++r, g += runs.stride, x += runs.stride, dx += runs.stride) {
        const Line<Compute> line = line_of(r), slopes = slopes_of(r);
        Epilogue<T> epilogue = epilogue_of(r);
        epilogue.gradient = nullptr;
        const int64_t size = runs.size(r);
        with_activation<Active, Compute>(epilogue.activation, [&](auto kind) INLINE_LAMBDA {
            sweep_results<kWidth<Compute>, Active>(size, Active ? size : runs.length, [&](int64_t i, auto some) INLINE_LAMBDA {
                const V centred = load_as<Compute>(x + i, some) - line.high;
                V v = load_as<Compute>(g + i, some);
                if constexpr (Active) {
                    v = epilogue.template backward<V, Compute>(kind, v, centred * line.scale + line.shift, i, some);
                }
                v = v * line.scale - ((Active && has_given_statistics ? V{} : centred) * slopes.scale + slopes.shift);
                if constexpr (Active) {
                    if (epilogue.mask) v = load_as<Compute>(epilogue.mask + i, some) > 0 ? v : V{};
                }
                store_run(dx + i, v, some, runs.length - i, bypasses_caches);
            });
        });
        clear_run<V>(dx, size, runs.length, bypasses_caches && !Active);
        prefetch_padding(g, size, runs.length);
        prefetch_padding(x, size, runs.length);
    }
}

// dx[i] = g[i] * a, for all runs
template <class Compute, class T>
void run_scale(const T* g, T* dx, const Runs& runs, double a, bool bypasses_caches) {
    const Compute scale = static_cast<Compute>(a);
    for (int64_t r = 0; r < runs.count; ++r, g += runs.stride, dx += runs.stride) {
        const int64_t size = runs.size(r);
        sweep_results<kWidth<Compute>>(size, runs.length, [&](int64_t i, auto some) INLINE_LAMBDA {
            store_run(dx + i, load_as<Compute>(g + i, some) * scale, some, runs.length - i, bypasses_caches);
        });
        clear_run<VectorOf<Compute>>(dx, size, runs.length, bypasses_caches);
        prefetch_padding(g, size, runs.length);
    }
}

}  // namespace anynorm::ANYNORM_TARGET
