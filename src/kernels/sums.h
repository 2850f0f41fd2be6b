// How sums over runs are taken: in double, whatever x is.
//
// Sums of floats would be faster where x is in a cache, and right where roundings are random. Where data round alike (two
// values, constants, few levels) thirty floats are enough to be off by a part in a million, and products leave a float's range.
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
INLINE void prefetch_padding(const T* x, int64_t begin, int64_t end) {
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

// Two sums at once, in four vectors each so that additions do not wait for one another.
struct Accumulator {
    Lanes first[4] = {}, second[4] = {};
    Sums done;  // of runs that were finished by themselves

    INLINE void add(int u, Lanes v, Lanes factor) {
        first[u] += v;
        second[u] += v * factor;
    }
    INLINE Sums total() {
        finish();
        return done;
    }
    INLINE void finish() {
        done.add({add_lanes((first[0] + first[1]) + (first[2] + first[3])),
                  add_lanes((second[0] + second[1]) + (second[2] + second[3]))});
        for (int u = 0; u < 4; ++u) first[u] = second[u] = Lanes{};
    }
    // body(run, start, Full or Part, which of four) over all runs. With `restart` each run's sums are finished by themselves,
    // and each segment's of a long one: then neither padding nor how the work is shared changes a bit.
    // leave(run, its size) comes behind each.
    template <class Compute, bool Long = false, class Body, class Leave>
    INLINE void sweep_runs(const Runs& runs, bool restart, Body body, Leave leave) {
        for (int64_t r = 0; r < runs.count; ++r) {
            const int64_t length = runs.size(r);
            for (int64_t from = 0; from < length; from += kSegment) {
                const int64_t left = length - from;
                sweep<kWidth<Compute>, Long>(left < kSegment ? left : kSegment, [&](int64_t i, auto some, int u) INLINE_LAMBDA {
                    body(r, from + i, some, u);
                });
                if (restart) finish();
            }
            leave(r, length);
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
