// The walk down columns: channels last in every norm, (N, C), and batch norm of maps so small that their runs would
// waste the vectors: there each position of a channel is a column of its own, and the channel a pool of columns.
#pragma once

#include "panels.h"

namespace anynorm::ANYNORM_TARGET {

template <class T>
struct Columns : Panels<T> {
    // `this->` below where g++ 12 does not find these in a generic lambda.
    using typename Panels<T>::Panel;
    using Panels<T>::call;
    using Panels<T>::x;
    using Panels<T>::grad;
    using Panels<T>::out;
    using Panels<T>::gradient;
    using Panels<T>::by_sample;
    using Panels<T>::samples;
    using Panels<T>::rows;
    using Panels<T>::width;
    using Panels<T>::columns;
    using Panels<T>::statistics;
    using Panels<T>::scratch_size;
    using Panels<T>::make_panel;
    using Panels<T>::at;
    using Panels<T>::first_pool;
    using Panels<T>::tile;
    using Panels<T>::summed;
    using Panels<T>::summed_from;
    using Panels<T>::count_rows;
    using Panels<T>::find_row;
    using Panels<T>::epilogue;
    using Panels<T>::epilogue_of_chosen;
    using Panels<T>::is_active;
    using Panels<T>::walk;
    using Panels<T>::write_tile;
    using Panels<T>::each_tile;
    const bool shares_channel = !this->call.channels_last && this->columns > 1;  // whether the columns of a pool are one channel's
    explicit Columns(const Call& call) : Panels<T>(call) {}

    // ---- forward ------------------------------------------------------------------------------------------------

    void forward() {
        if (call.has_given_statistics()) return forward_given();
        auto start = [&](const Panel& p) { guess_shift(p); };
        auto sum = [&](const Panel& p, int64_t rank, int64_t row_count, double* first, double* second, int) {
            column_moments(x + summed_from(p, rank), summed(p, rank, row_count), p.mean, first, second);
        };
        auto finish = [&](const Panel& p, int attempt) {
            const int next = find_next_attempt(p, attempt);
            if (next >= 0) return next;
            if (columns == 1) {
                merge_alone(p);
            } else {
                for (int64_t i = 0; i < p.width; i += columns) merge(p, i);
            }
            coefficients(p);
            return -1;
        };
        walk(start, sum, finish, [&](const Panel& p, int64_t row, int64_t n) { apply(p, row, n); });
        statistics.move_running();
    }
    // By given statistics: every tile at once, since no sums are needed first.
    void forward_given() {
        statistics.read();
        Scratch<double> scratch(scratch_size(width));
        const Panel p = make_panel(0, 0, width, scratch.get());
        coefficients(p);
        each_tile([&](int64_t, int64_t t) {
            write_tile(p, t, [&](const Panel& q, int64_t row, int64_t n) { apply(q, row, n); });
        });
    }

    // Each column's shift, the mean of a few of its values: mean[i] = sum over a few rows of x[row][i] / how many.
    void guess_shift(const Panel& p) const {
        clear(p.mean, 0, p.width);
        if (call.centred && kIsNarrow<T>) {
            const int64_t counted = count_rows(p), few = least(8, counted);
            for (int64_t j = 0; j < few; ++j) {
                const T* from = x + at(p, find_row(p, j * counted / few));
                sweep<W>(p.width, [&](int64_t i, auto some, int) INLINE_LAMBDA {
                    store(p.mean + i, load(p.mean + i, some) + load(from + i, some), some);
                });
            }
            for (int64_t i = 0; i < p.width; ++i) p.mean[i] /= static_cast<double>(most(1, few));
        }
    }
    // Which attempt comes next, about the means that were found, or -1.
    int find_next_attempt(const Panel& p, int attempt) {
        const double count = column_count(p);
        Indices wrong{};
        sweep<W, true>(p.width, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            const Lanes first = load(p.first + i, some), second = load(p.second + i, some);
            wrong |= statistics.are_wrong(second - first * (first / count), second, attempt);
        });
        if (!has_any(wrong)) return -1;
        for (int64_t i = 0; i < p.width; ++i) p.mean[i] += p.first[i] / count;
        return attempt + 1;
    }
    double column_count(const Panel& p) const { return static_cast<double>(most(1, count_rows(p))); }

    // A pool's moments from those of its columns, which have a shift each.
    void merge(const Panel& p, int64_t from) {
        const int64_t pool = first_pool(p) + from / columns;
        const double count = column_count(p);
        double m2 = 0, sum = 0, about = 0;
        for (int64_t i = from; i < from + columns; ++i) {
            m2 += p.second[i];
            if (!call.centred) continue;
            const double step = p.first[i] / count;
            m2 -= p.first[i] * step;
            p.mean[i] += step;
            if (i == from) about = p.mean[i];
            sum += p.mean[i] - about;
        }
        if (call.centred) {
            const double mean = about + sum / static_cast<double>(columns);
            for (int64_t i = from; i < from + columns; ++i) m2 += count * (p.mean[i] - mean) * (p.mean[i] - mean);
            statistics.mean[pool] = mean;
        }
        statistics.set_m2(pool, m2 < 0 ? 0 : m2);
    }

    // The same of pools that have one column each.
    void merge_alone(const Panel& p) {
        const int64_t pool = first_pool(p);
        const double count = column_count(p);
        sweep<W, true>(p.width, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            const Lanes first = load(p.first + i, some), step = call.centred ? first / count : Lanes{};
            const Lanes m2 = load(p.second + i, some) - first * step;
            if (call.centred) store(statistics.mean + pool + i, load(p.mean + i, some) + step, some);
            statistics.set_m2(pool + i, m2 < 0 ? Lanes{} : m2, some);
        });
    }

    // body(column, pool, channel) for every column of a panel, without a division for each.
    template <class Body>
    INLINE void each_column(const Panel& p, Body body) const {
        int64_t pool = first_pool(p), block = p.begin / columns;
        for (int64_t from = 0; from < p.width; from += columns, ++pool, ++block) {
            for (int64_t i = from; i < from + columns; ++i) body(i, pool, call.channels_last ? p.begin + i : block);
        }
    }

    // body(column, pool, channel, Full or Part) in steps of neighbours: of pools that have one column each, or of a pool's.
    template <class Body>
    INLINE void each_stretch(const Panel& p, Body body) const {
        const int64_t stretch = columns == 1 ? p.width : columns;
        int64_t pool = first_pool(p), block = p.begin / columns;
        for (int64_t from = 0; from < p.width; from += stretch, ++pool, ++block) {
            sweep<W, true>(stretch, [&](int64_t i, auto some, int) INLINE_LAMBDA {
                body(from + i, columns == 1 ? pool + i : pool, shares_channel ? block : p.begin + from + i, some);
            });
        }
    }

    // y = (x - mean) * a + b
    void coefficients(const Panel& p) {
        using Narrowest = typename Coefficients<T>::Compute;
        *p.is_float = put_lines<Narrowest>(p) && kIsNarrow<T>;
        if constexpr (kIsNarrow<T>) {
            if (!*p.is_float) put_lines<double>(p);
        }
    }
    // Whether all of them fit a float.
    template <class Compute>
    bool put_lines(const Panel& p) {
        Indices wrong{};
        auto lines = p.template lines<Compute>();
        each_stretch(p, [&](int64_t i, int64_t pool, int64_t c, auto some) INLINE_LAMBDA {
            const Lanes mean = load_or_repeat(statistics.mean + pool, columns > 1, some);
            const Lanes rstd = load_or_repeat(statistics.rstd.get() + pool, columns > 1, some);
            const Lanes a = rstd * gammas_of<T>(call, c, shares_channel, some), b = betas_of<T>(call, c, shares_channel, some);
            wrong |= ~fit_float<T>(mean, a, b);
            lines.put(i, mean, a, b, some);
        });
        return !has_any(wrong);
    }
    void apply(const Panel& p, int64_t row, int64_t row_count) const {
        const int64_t from = at(p, row);
        with_compute<T>(*p.is_float, [&](auto zero) {
            const auto lines = p.template lines<decltype(zero)>();
            const Tile part = tile(p, row_count);
            using Compute = decltype(zero);
            if constexpr (kHasPlain<Compute, T>) {
                if (!this->is_active()) {
                    return column_apply<Compute, false>(this->x + from, this->out + from, part, lines, TileEpilogue<T>{});
                }
            }
            column_apply<Compute, true>(x + from, out + from, part, lines, epilogue(p, row));
        });
    }

    // ---- backward -----------------------------------------------------------------------------------------------

    void backward() {
        statistics.read();
        ChannelSums channel_sums(samples * call.channels());
        const bool needs_sums = !call.has_given_statistics() || call.dgamma || call.dbeta || is_active();
        auto start = [&](const Panel& p) {
            coefficients(p);
            each_stretch(p, [&](int64_t i, int64_t pool, int64_t, auto some) INLINE_LAMBDA {
                store(p.mean + i, load_or_repeat(statistics.mean + pool, columns > 1, some), some);
            });
        };
        auto sum = [&](const Panel& p, int64_t rank, int64_t row_count, double* first, double* second, int) {
            if (!needs_sums) return;
            const int64_t from = summed_from(p, rank);
            const Tile part = summed(p, rank, row_count);
            if (!call.is_active()) {
                return column_grad_sums<double, false>(grad + from, x + from, part, p.mean, Lines<double>{}, TileEpilogue<T>{},
                                                       first, second);
            }
            with_compute<T>(*p.is_float, [&](auto zero) {
                using Compute = decltype(zero);
                column_grad_sums<Compute, true>(grad + from, x + from, part, p.mean, p.template lines<Compute>(),
                                                epilogue_of_chosen(p, rank), first, second);
            });
        };
        auto finish = [&](const Panel& p, int) {
            keep_sums(p, channel_sums);
            slopes(p);
            return -1;
        };
        walk(start, sum, finish, [&](const Panel& p, int64_t row, int64_t n) { write_dx(p, row, n); });
        write_parameter_gradients<T>(call, statistics.rstd.get(), channel_sums, samples);
    }
    void keep_sums(const Panel& p, ChannelSums& sums) const {
        const int64_t from = p.sample * call.channels();
        if (shares_channel) {
            return each_column(p, [&](int64_t i, int64_t, int64_t c) { sums.add(from + c, {p.first[i], p.second[i]}); });
        }
        std::memcpy(sums.first + from + p.begin, p.first, static_cast<size_t>(p.width) * sizeof(double));
        std::memcpy(sums.second + from + p.begin, p.second, static_cast<size_t>(p.width) * sizeof(double));
    }
    // dx = g * a - c1 - (x - mean) * c2. Leaves c1 and c2 of each pool in the place of the sums.
    void slopes(const Panel& p) {
        const int64_t pools = p.width / columns, pool = first_pool(p);
        scale_sums(p);
        Indices wrong{};
        sweep<W, true>(pools, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            const Lanes rstd = load(statistics.rstd.get() + pool + i, some), count = statistics.counts_of(pool + i, some);
            ManySlopes slope(call.centred, load(p.first + i, some), load(p.second + i, some), rstd, count);
            if (call.has_given_statistics()) slope = {};  // constants
            store(p.first + i, slope.c1, some);
            store(p.second + i, slope.c2, some);
            wrong |= ~fit_float<T>(load(statistics.mean + pool + i, some), slope.c1, slope.c2, slope.reach);
        });
        if (has_any(wrong) && *p.is_float) {
            *p.is_float = false;
            put_lines<double>(p);
        }
        with_compute<T>(*p.is_float, [&](auto zero) { put_slopes<decltype(zero)>(p); });
    }
    // Leaves each pool's sums of gamma * g and gamma * g * (x - mean) in the place of the first columns' sums.
    void scale_sums(const Panel& p) const {
        if (columns == 1) {
            return each_stretch(p, [&](int64_t i, int64_t, int64_t c, auto some) INLINE_LAMBDA {
                const Lanes gamma = gammas_of<T>(call, c, false, some);
                store(p.first + i, load(p.first + i, some) * gamma, some);
                store(p.second + i, load(p.second + i, some) * gamma, some);
            });
        }
        for (int64_t from = 0, i = 0; from < p.width; from += columns, ++i) {
            Sums scaled;
            for (int64_t j = from; j < from + columns; ++j) {
                const double gamma = gamma_of<T>(call, shares_channel ? p.begin / columns + i : p.begin + j);
                scaled.add({p.first[j] * gamma, p.second[j] * gamma});
            }
            p.first[i] = scaled.first;
            p.second[i] = scaled.second;
        }
    }
    template <class Compute>
    void put_slopes(const Panel& p) const {
        Lines<Compute> slopes{p.template table<Compute>(0), p.template table<Compute>(3), p.template table<Compute>(4)};
        const int64_t first = first_pool(p);
        each_stretch(p, [&](int64_t i, int64_t pool, int64_t, auto some) INLINE_LAMBDA {
            const bool is_one = columns > 1;
            slopes.put(i, load_or_repeat(statistics.mean + pool, is_one, some), load_or_repeat(p.second + pool - first, is_one, some),
                    load_or_repeat(p.first + pool - first, is_one, some), some);
        });
    }

    void write_dx(const Panel& p, int64_t row, int64_t row_count) const {
        const int64_t from = at(p, row);
        const Tile part = tile(p, row_count);
        with_compute<T>(*p.is_float, [&](auto zero) {
            using Compute = decltype(zero);
            const auto lines = p.template lines<Compute>();
            const Compute *slope = p.template table<Compute>(3), *constant = p.template table<Compute>(4);
            if (call.has_given_statistics() && !is_active()) return column_scale(grad + from, out + from, part, lines.scale);
            if constexpr (kHasPlain<Compute, T>) {
                if (!this->is_active()) {
                    return column_dx<Compute, false>(this->grad + from, this->x + from, this->out + from, part, lines, slope,
                                                     constant, TileEpilogue<T>{});
                }
            }
            column_dx<Compute, true>(grad + from, x + from, out + from, part, lines, slope, constant, epilogue(p, row),
                                     call.has_given_statistics());
        });
    }
};

}  // namespace anynorm::ANYNORM_TARGET
