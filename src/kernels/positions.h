// Which positions of runs count? Where some do not, those that do are brought together before they are summed, and results
// leave out the others.
#pragma once

#include "pools.h"
#include "runs.h"

namespace anynorm::ANYNORM_TARGET {

template <class T>
struct Positions : Pools {
    Statistics<T> statistics;
    const T* x = static_cast<const T*>(call.x);
    const T* residual = static_cast<const T*>(call.residual);
    const T* grad = static_cast<const T*>(call.grad);
    T* out = static_cast<T*>(call.out);
    T* gradient = static_cast<T*>(call.dresidual);
    // Of the positions that count, where there are holes between them; and which they are, in blocks of eight.
    Scratch<int64_t> indices{statistics.needs_mask() ? call.n * call.s : 0};
    Scratch<uint8_t> bits{statistics.needs_mask() ? call.n * divide_up(call.s, 8) : 0};

    explicit Positions(const Call& call) : Pools{call, nullptr}, statistics(call) {
        extents = statistics.extents;
        for (int64_t n = 0; statistics.needs_mask() && n < call.n; ++n) {
            find_counted_indices(call.mask + n * call.s, call.s, &indices[n * call.s]);
            find_counted_bits(call.mask + n * call.s, call.s, &bits[n * divide_up(call.s, 8)]);
        }
    }

    // Null where the extents say all.
    const float* mask_of(int64_t pool, int64_t run) const {
        return statistics.needs_mask() ? call.mask + sample(pool, run) * call.s : nullptr;
    }
    Epilogue<T> epilogue(int64_t pool, int64_t run, int64_t at, int64_t from) const {
        const float* counted = mask_of(pool, run);
        return {call.activation, residual ? residual + at : nullptr, counted ? counted + from : nullptr,
                gradient ? gradient + at : nullptr};
    }

    // The mean of the first values that count.
    double mean_of_first(int64_t pool) const {
        double sum = 0;
        int found_here = 0;
        for (int64_t j = 0; j < runs && !found_here; ++j) {
            const float* counted = call.mask + sample(pool, j) * call.s;
            const T* run = x + start(pool) + j * stride();
            for (int64_t i = 0; i < call.s && found_here < W; ++i) {
                if (counted[i] > 0) sum += scalar(run + i), ++found_here;
            }
        }
        return found_here ? sum / found_here : 0;
    }

    // body(at, bits, indices, how many) over runs of a pool that have holes, in segments of positions that count:
    // those are brought together before they are summed, so that no sum depends on where the holes are.
    template <class Body>
    void each_gathered(int64_t pool, int64_t run, int64_t from, const Runs& all, Body body) const {
        auto& self = const_cast<Positions&>(*this);
        for (int64_t r = run; r < run + all.count; ++r) {
            const int64_t n = sample(pool, r), end = least(self.statistics.counted[n], from + all.length);
            for (int64_t f = from; f < end; f += kSegment) {
                body(start(pool) + r * stride(), &self.bits[n * divide_up(call.s, 8)], &self.indices[n * call.s + f],
                     least(kSegment, end - f));
            }
        }
    }

    // body(at, runs, to, bypasses caches) by a loop that knows no holes: one of its own would round otherwise than that for
    // dense runs. Where there are holes it writes into a buffer, and what counts is copied from there.
    template <class Body>
    INLINE void each_dense(int64_t pool, int64_t run, int64_t at, int64_t from, const Runs& all, Body body) const {
        if (!statistics.needs_mask()) return body(at, all, out + at, call.bypasses_caches);
        constexpr int64_t kSize = 1024;
        alignas(64) T buffer[kSize];
        for (int64_t r = 0; r < all.count; ++r, at += all.stride) {
            const float* counts = mask_of(pool, run + r) + from;
            const int64_t length = all.size(r);
            for (int64_t i = 0; i < length; i += kSize) {
                const int64_t size = least(kSize, length - i);
                body(at + i, Runs{1, 0, size}, buffer, false);
                copy_counted(buffer, counts + i, size, out + at + i, all.length - i, call.bypasses_caches);
            }
            clear_run<VectorOf<PlainOf<T>>>(out + at, length, all.length, call.bypasses_caches);
        }
    }
    // Touches nothing between the holes: other threads may be writing there.
    void clear_holes(T* to, int64_t pool, int64_t run, int64_t at, int64_t from, const Runs& all) const {
        if (!statistics.needs_mask()) return;
        for (int64_t r = 0; r < all.count; ++r, at += all.stride) {
            const float* counts = mask_of(pool, run + r) + from;
            for (int64_t i = 0; i < all.length; ++i) {
                if (!(counts[i] > 0)) to[at + i] = T{};
            }
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
