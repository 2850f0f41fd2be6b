// Which runs has a pool, and in what order are they walked? For tensors whose positions are contiguous.
//
// A pool is a number of runs: of batch norm one a sample, else one for each of its channels, and those follow one
// another. Few large pools are cut into segments, to keep many threads busy.
#pragma once

#include "statistics.h"

namespace anynorm::ANYNORM_TARGET {

struct Pools {
    const Call& call;
    const int64_t* extents;                      // of samples, as in Statistics
    bool by_sample = call.pool_n || call.has_given_statistics();  // whether a pool has a run in each sample
    int64_t pools = by_sample ? call.g : call.pools();
    int64_t runs = by_sample ? call.n : call.k;  // of a pool
    int64_t elements = runs * call.s;            // of a pool
    int64_t pieces = divide_up(call.s, kSegment);
    int64_t segments = runs * pieces;
    bool whole = pools >= 16 || elements <= kSegment;  // whether a pool is one thread's

    int64_t stride() const { return by_sample ? call.g * call.s : call.s; }
    int64_t start(int64_t pool) const { return by_sample ? pool * call.s : pool * elements; }
    int64_t channel(int64_t pool, int64_t run) const {
        return by_sample ? pool : (pool % call.g) * call.k + run;
    }
    int64_t sample(int64_t pool, int64_t run) const { return by_sample ? run : pool / call.g; }
    int64_t segment(int64_t run, int64_t from) const { return run * pieces + from / kSegment; }

    // Runs as long as all are, with their extents.
    Runs cut(int64_t pool, int64_t run, const Runs& all, int64_t from = 0) const {
        if (!extents) return all;
        return {all.count, all.stride, all.length, extents + sample(pool, run), from, by_sample ? 1 : 0};
    }
    Runs cut_segment(int64_t pool, int64_t run, int64_t from) const {
        return cut(pool, run, {1, 0, least(kSegment, call.s - from)}, from);
    }
    // As few runs as hold a pool, where nothing depends on the channel.
    Runs all_runs(int64_t pool) const {
        if (by_sample || extents) return cut(pool, 0, {runs, stride(), call.s});
        return {1, 0, elements};  // they follow one another
    }

    // body(first run, where it begins, runs alike) over a pool: all of them where they share gamma and beta.
    template <class Body>
    void each_run(int64_t pool, Body body) const {
        if (by_sample) return body(int64_t{0}, int64_t{0}, cut(pool, 0, {runs, stride(), call.s}));
        for (int64_t j = 0; j < runs; ++j) body(j, int64_t{0}, cut(pool, j, {1, 0, call.s}));
    }
    // body(run, from, runs) over the segments of a pool, on all threads.
    template <class Body>
    void each_segment(int64_t pool, Body body) const {
        parallel_for(call, segments, elements / segments, [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j) {
                const int64_t run = j / pieces, from = (j % pieces) * kSegment;
                body(run, from, cut_segment(pool, run, from));
            }
        });
    }
    // body(begin, end) over slabs of pools that stay in a core's cache, where an element takes so many bytes.
    template <class Body>
    void each_slab(int64_t bytes, Body body) const {
        const int64_t size = most(1, kSlabBytes / (elements * bytes));
        parallel_for(call, pools, elements, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; p += size) body(p, least(end, p + size));
        });
    }
    // body(first pool, where in memory, how many pools) over runs that follow one another, of one sample each time, where a pool
    // has a run in each sample.
    template <class Body>
    void each_row_of_pools(Body body) const {
        parallel_for(call, call.n * pools, call.s, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end;) {
                const int64_t pool = i % pools, count = least(end - i, pools - pool);
                body(pool, i * call.s, count);
                i += count;
            }
        });
    }
    // body(pool, run, from, runs) in the order of memory, where a pool has a run in each sample.
    template <class Body>
    void each_piece(Body body) const {
        parallel_for(call, call.n * pools, call.s, [&](int64_t begin, int64_t end) {
            int64_t pool = begin % pools, run = begin / pools;
            for (int64_t i = begin; i < end; ++i) {
                for (int64_t from = 0; from < call.s; from += kSegment) {
                    body(pool, run, from, cut_segment(pool, run, from));
                }
                if (++pool == pools) {
                    pool = 0;
                    ++run;
                }
            }
        });
    }
};

}  // namespace anynorm::ANYNORM_TARGET
