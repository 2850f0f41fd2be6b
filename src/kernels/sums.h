// How long sums are taken: sums of floats that are added to sums of doubles, run by run.
//
// `Compute` is float, or double where x is double or the numbers are near a float's limits. Sums of floats are short: after
// kBlock elements they are added to sums of doubles.
#pragma once

#include "lanes.h"

namespace anynorm::ANYNORM_TARGET {

struct Sums {
    double first = 0, second = 0;
    void add(const Sums& other) {
        first += other.first;
        second += other.second;
    }
};

// Where a long run is cut, for sums that must not depend on who takes its parts.
constexpr int64_t kSegment = 1 << 15;

// Runs of `length` elements, `stride` apart, or parts of runs that begin at `from`. What lies behind a run's extent is
// padding: it enters nothing, and its results are 0.
struct Runs {
    int64_t count, stride, length;
    const int64_t* extents = nullptr;  // one for each run, or for all of them where extent_step is 0
    int64_t from = 0, extent_step = 1;
    INLINE int64_t size(int64_t run) const {
        if (!extents) return length;
        const int64_t left = extents[run * extent_step] - from;
        return left < 0 ? 0 : left < length ? left : length;
    }
};

// Brings short padding into the cache: a stream of memory that stops and begins anew takes twice as long as to go on.
template <class T>
INLINE void pass_over(const T* x, int64_t begin, int64_t end) {
    constexpr int64_t line = 64 / sizeof(T);
    if (end - begin > 16 * line) return;
    for (int64_t i = begin; i < end; i += line) __builtin_prefetch(x + i);
}

template <class T>
INLINE void clear(T* values, int64_t begin, int64_t end) {
    if (begin < end) std::memset(static_cast<void*>(values + begin), 0, static_cast<size_t>(end - begin) * sizeof(T));
}

template <class Compute>
using VectorOf = typename LanesOf<Compute>::type;
template <class Compute>
constexpr int kWidth = LanesOf<Compute>::width;
template <class Compute>
constexpr int64_t kBlock = 128 * kWidth<Compute>;

// The sum of a vector, as a double.
template <class Compute>
INLINE double add_vector(VectorOf<Compute> v) {
    if constexpr (kWidth<Compute> == W) {
        return add_lanes(v);
    } else {
        return add_lanes(low_half(v) + high_half(v));
    }
}

// Two sums at once, in four vectors each so that additions do not wait for one another.
template <class Compute>
struct Accumulator {
    VectorOf<Compute> first[4] = {}, second[4] = {};
    Lanes wide[4] = {};
    Sums done;            // of runs that were finished by themselves
    int64_t waiting = 0;  // elements in the sums of floats

    INLINE void flush() {
        waiting = 0;
        const auto a = (first[0] + first[1]) + (first[2] + first[3]);
        const auto b = (second[0] + second[1]) + (second[2] + second[3]);
        if constexpr (kWidth<Compute> == W) {
            wide[0] += a;
            wide[2] += b;
        } else {
            wide[0] += low_half(a);
            wide[1] += high_half(a);
            wide[2] += low_half(b);
            wide[3] += high_half(b);
        }
        for (int u = 0; u < 4; ++u) first[u] = second[u] = VectorOf<Compute>{};
    }
    INLINE Sums total() {
        finish();
        return done;
    }
    INLINE void finish() {
        flush();
        done.add({add_lanes(wide[0] + wide[1]), add_lanes(wide[2] + wide[3])});
        for (int u = 0; u < 4; ++u) wide[u] = Lanes{};
    }
    // body(start, Full or Part, which of four) over all runs. With `restart` each run's sums are finished by themselves, and
    // each segment's of a long one: then neither padding nor how the work is shared changes a bit.
    // leave(run, its size) comes behind each.
    template <bool Long = false, class Body, class Leave>
    INLINE void sweep_runs(const Runs& runs, bool restart, Body body, Leave leave) {
        for (int64_t r = 0; r < runs.count; ++r) {
            const int64_t length = runs.size(r);
            for (int64_t from = 0; from < length; from += kBlock<Compute>) {
                const int64_t left = length - from, size = left < kBlock<Compute> ? left : kBlock<Compute>;
                sweep<kWidth<Compute>, Long>(size, [&](int64_t i, auto some, int u) INLINE_LAMBDA {
                    body(r, from + i, some, u);
                });
                waiting += size;
                if (restart && (size == left || (from + size) % kSegment == 0)) {
                    finish();
                } else if (waiting >= kBlock<Compute>) {
                    flush();
                }
            }
            leave(r, length);
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
