// The walk along contiguous runs whose gamma and beta are constant: batch, instance and group norm, channels first.
//
// A pool is a number of rows of `s` elements; rows are cut into segments where few pools must keep many threads busy.
#pragma once

#include "walk.h"

namespace anynorm::ANYNORM_TARGET {

constexpr int64_t kSegment = 1 << 15;

template <class T>
struct Rows {
    const Call& call;
    const T* x = static_cast<const T*>(call.x);
    const T* grad = static_cast<const T*>(call.grad);
    T* out = static_cast<T*>(call.out);
    int64_t rows = call.pool_n ? call.n : call.k;  // in a pool
    int64_t pieces = divide_up(call.s, kSegment);  // of a row
    int64_t segments = rows * pieces;
    int64_t elements = rows * call.s;
    // A pool that is finished while it is in cache is read once; too few or too large ones are walked twice.
    bool fused = elements <= kSegment || (call.pools() >= 16 && elements <= (1 << 22));

    int64_t row(int64_t pool, int64_t segment) const {
        const int64_t j = segment / pieces;
        return call.pool_n ? j * call.g + pool : pool * call.k + j;
    }
    int64_t channel(int64_t pool, int64_t segment) const {
        return call.pool_n ? pool : (pool % call.g) * call.k + segment / pieces;
    }
    int64_t start(int64_t pool, int64_t segment) const {
        return row(pool, segment) * call.s + (segment % pieces) * kSegment;
    }
    int64_t length(int64_t segment) const { return least(kSegment, call.s - (segment % pieces) * kSegment); }

    Sums sums(int64_t pool, int64_t segment, double shift) const {
        return run_sums(x + start(pool, segment), length(segment), shift);
    }
    Sums grad_sums(int64_t pool, int64_t segment, double mean) const {
        const int64_t at = start(pool, segment);
        return run_grad_sums(grad + at, x + at, length(segment), mean);
    }
    void apply(int64_t pool, int64_t segment, double mean, double rstd) const {
        const int64_t at = start(pool, segment), c = channel(pool, segment), size = length(segment);
        const double a = rstd * gamma_of<T>(call, c), b = beta_of<T>(call, c);
        if constexpr (sizeof(T) < 8) {
            if (fits_float<T>(mean, rstd, a, b)) return run_apply<float>(x + at, out + at, size, mean, a, b);
        }
        run_apply<double>(x + at, out + at, size, mean, a, b);
    }
    void dx(int64_t pool, int64_t segment, double mean, double rstd, const Slopes& slopes) const {
        const int64_t at = start(pool, segment), size = length(segment);
        const double a = rstd * gamma_of<T>(call, channel(pool, segment));
        if constexpr (sizeof(T) < 8) {
            if (fits_float<T>(mean, rstd, a, slopes.c1, slopes.c2)) {
                if (call.given) return run_scale<float>(grad + at, out + at, size, a);
                return run_dx<float>(grad + at, x + at, out + at, size, mean, a, slopes.c1, slopes.c2);
            }
        }
        if (call.given) return run_scale<double>(grad + at, out + at, size, a);
        run_dx<double>(grad + at, x + at, out + at, size, mean, a, slopes.c1, slopes.c2);
    }

    template <class Body>
    void each_segment(Body body) const {
        share(call, call.pools() * segments, elements / segments, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) body(i / segments, i % segments);
        });
    }

    // Each segment's `first`, then a pool's `finish` with all of them (false: once more), then each segment's `second`.
    template <class First, class Finish, class Second>
    void walk(First first, Finish finish, Second second) const {
        if (fused) {
            share(call, call.pools(), elements, [&](int64_t begin, int64_t end) {
                for (int64_t p = begin; p < end; ++p) {
                    auto sums_of = [&](int64_t j) { return first(p, j); };
                    if (!finish(p, sums_of)) finish(p, sums_of);
                    for (int64_t j = 0; j < segments; ++j) second(p, j);
                }
            });
            return;
        }
        Room<Sums> found(call.pools() * segments);
        bool is_done = false;
        for (int round = 0; round < 2 && !is_done; ++round) {
            each_segment([&](int64_t p, int64_t j) { found[p * segments + j] = first(p, j); });
            is_done = true;
            for (int64_t p = 0; p < call.pools(); ++p) {
                is_done &= finish(p, [&](int64_t j) { return found[p * segments + j]; });
            }
        }
        each_segment(second);
    }

    void forward() const {
        Statistics<T> found(call);
        Room<double> shift(call.pools(), true);
        auto first = [&](int64_t p, int64_t j) { return sums(p, j, shift[p]); };
        auto finish = [&](int64_t p, auto sums_of) {
            Sums total;
            for (int64_t j = 0; j < segments; ++j) total.add(sums_of(j));
            const bool is_good = found.finish(p, total, shift[p]);
            if (!is_good) shift[p] = found.mean[p];
            return is_good;
        };
        walk(first, finish, [&](int64_t p, int64_t j) { apply(p, j, found.mean[p], found.rstd[p]); });
    }

    void forward_given() const {
        Statistics<T> found(call);
        found.read_given();
        each_segment([&](int64_t p, int64_t j) { apply(p, j, found.mean[p], found.rstd[p]); });
    }

    void backward() const {
        Statistics<T> found(call);
        call.given ? found.read_given() : found.read();
        Room<Sums> row_sums(call.pools() * rows, true);
        Room<Slopes> slopes(call.pools());
        auto first = [&](int64_t p, int64_t j) { return grad_sums(p, j, found.mean[p]); };
        auto finish = [&](int64_t p, auto sums_of) {
            Sums scaled;
            for (int64_t j = 0; j < segments; ++j) {
                const Sums sums = sums_of(j);
                const double gamma = gamma_of<T>(call, channel(p, j));
                row_sums[p * rows + j / pieces].add(sums);
                scaled.add({sums.first * gamma, sums.second * gamma});
            }
            slopes[p] = Slopes(call, scaled, found.rstd[p]);
            return true;
        };
        auto second = [&](int64_t p, int64_t j) {
            if (out) dx(p, j, found.mean[p], found.rstd[p], slopes[p]);
        };
        if (call.given && !call.dgamma && !call.dbeta) return each_segment(second);
        walk(first, finish, second);
        put_parameters(found, row_sums);
    }

    // A channel's sums over samples, in their order.
    void put_parameters(Statistics<T>& found, Room<Sums>& row_sums) const {
        if (!call.dgamma && !call.dbeta) return;
        const int64_t samples = call.pool_n ? rows : call.n;
        for (int64_t c = 0; c < call.channels(); ++c) {
            double dgamma = 0, dbeta = 0;
            for (int64_t n = 0; n < samples; ++n) {
                const int64_t p = call.pool_n ? c : n * call.g + c / call.k;
                const Sums& sums = row_sums[call.pool_n ? c * rows + n : p * rows + c % call.k];
                dbeta += sums.first;
                dgamma += sums.second * found.rstd[p];
            }
            put_gradients<T>(call, c, dgamma, dbeta);
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
