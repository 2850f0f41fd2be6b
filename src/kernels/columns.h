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
            for (int64_t i = 0; i < p.width; i += columns) merge(p, i);
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
        bool is_good = true;
        for (int64_t i = 0; i < p.width; ++i) {
            is_good &= statistics.is_good(p.second[i] - p.first[i] * (p.first[i] / count), p.second[i], attempt);
        }
        if (is_good) return -1;
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

    // body(column, pool, channel) for every column of a panel, without a division for each.
    template <class Body>
    INLINE void each_column(const Panel& p, Body body) const {
        int64_t pool = first_pool(p), block = p.begin / columns;
        for (int64_t from = 0; from < p.width; from += columns, ++pool, ++block) {
            for (int64_t i = from; i < from + columns; ++i) body(i, pool, call.channels_last ? p.begin + i : block);
        }
    }

    // y = (x - mean) * a + b
    void coefficients(const Panel& p) {
        bool fits = true;
        each_column(p, [&](int64_t, int64_t pool, int64_t c) {
            const double a = statistics.rstd[pool] * gamma_of<T>(call, c);
            fits = fits && fits_float<T>(statistics.mean[pool], a, beta_of<T>(call, c));
        });
        put_lines(p, fits);
    }
    void put_lines(const Panel& p, bool fits) {
        *p.is_float = fits;
        with_compute<T>(fits, [&](auto zero) {
            auto lines = p.template lines<decltype(zero)>();
            each_column(p, [&](int64_t i, int64_t pool, int64_t c) INLINE_LAMBDA {
                lines.put(i, statistics.mean[pool], statistics.rstd[pool] * gamma_of<T>(call, c), beta_of<T>(call, c));
            });
        });
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
        Scratch<Sums> channel_sums(samples * call.channels(), true);
        const bool needs_sums = !call.has_given_statistics() || call.dgamma || call.dbeta || is_active();
        auto start = [&](const Panel& p) {
            coefficients(p);
            each_column(p, [&](int64_t i, int64_t pool, int64_t) INLINE_LAMBDA { p.mean[i] = statistics.mean[pool]; });
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
            each_column(p, [&](int64_t i, int64_t, int64_t c) {
                channel_sums[p.sample * call.channels() + c].add({p.first[i], p.second[i]});
            });
            slopes(p);
            return -1;
        };
        walk(start, sum, finish, [&](const Panel& p, int64_t row, int64_t n) { write_dx(p, row, n); });
        write_parameter_gradients(channel_sums);
    }
    // dx = g * a - c1 - (x - mean) * c2, for each column of a pool. Leaves c1 and c2 in the place of the sums.
    void slopes(const Panel& p) {
        bool fits = true;
        for (int64_t from = 0; from < p.width; from += columns) {
            const int64_t pool = first_pool(p) + from / columns;
            Sums scaled;
            for (int64_t i = from; i < from + columns; ++i) {
                const double gamma = gamma_of<T>(call, call.channels_last ? p.begin + i : (p.begin + from) / columns);
                scaled.add({p.first[i] * gamma, p.second[i] * gamma});
            }
            Slopes slope;  // given statistics are constants
            if (!call.has_given_statistics()) {
                slope = Slopes(call.centred, scaled, statistics.rstd[pool], statistics.count(pool));
            }
            for (int64_t i = from; i < from + columns; ++i) {
                p.first[i] = slope.c1;
                p.second[i] = slope.c2;
            }
            fits = fits && fits_float<T>(statistics.mean[pool], slope.c1, slope.c2, slope.reach);
        }
        if (!fits && *p.is_float) put_lines(p, false);
        with_compute<T>(*p.is_float, [&](auto zero) {
            using Compute = decltype(zero);
            Compute *slope = p.template table<Compute>(3), *constant = p.template table<Compute>(4);
            each_column(p, [&](int64_t i, int64_t pool, int64_t) INLINE_LAMBDA {
                const Line<Compute> line(statistics.mean[pool], p.second[i], p.first[i]);
                slope[i] = line.scale;
                constant[i] = line.shift;
            });
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

    void write_parameter_gradients(Scratch<Sums>& channel_sums) {
        if (!call.dgamma && !call.dbeta) return;
        for (int64_t c = 0; c < call.channels(); ++c) {
            double dgamma = 0, dbeta = 0;
            for (int64_t n = 0; n < samples; ++n) {
                const Sums& sums = channel_sums[n * call.channels() + c];
                dbeta += sums.first;
                dgamma += sums.second * statistics.rstd[(by_sample ? n * call.g : 0) + c / call.k];
            }
            write_gradients<T>(call, c, dgamma, dbeta);
        }
    }
};

}  // namespace anynorm::ANYNORM_TARGET
