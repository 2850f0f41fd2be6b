// What is found once for each channel, in vectors over channels: by itself a square root, a division or a range check takes
// as long as some ten elements.
#pragma once

#include "statistics.h"

namespace anynorm::ANYNORM_TARGET {

// The next few values, or one for all of them.
template <class V, class Some>
INLINE Lanes load_or_repeat(const V* values, bool is_one, Some some) {
    return is_one ? Lanes{} + scalar(values) : load(values, some);
}
template <class T, class Some>
INLINE Lanes gammas_of(const Call& call, int64_t channel, bool is_one, Some some) {
    return call.gamma ? load_or_repeat(static_cast<const Parameter<T>*>(call.gamma) + channel, is_one, some) : Lanes{} + 1;
}
template <class T, class Some>
INLINE Lanes betas_of(const Call& call, int64_t channel, bool is_one, Some some) {
    return call.beta ? load_or_repeat(static_cast<const Parameter<T>*>(call.beta) + channel, is_one, some) : Lanes{};
}

template <class Compute>
INLINE Lanes round_to(Lanes v) {
    if constexpr (std::is_same_v<Compute, double>) return v;
    return widen(round_to_floats(v));
}

// Tables of lines: (x - high) * scale + shift.
template <class Compute>
struct Lines {
    Compute *high, *scale, *shift;
    template <class Some>
    INLINE void put(int64_t i, Lanes mean, Lanes a, Lanes b, Some some) {
        const Lanes rounded = round_to<Compute>(mean);
        store(high + i, rounded, some);
        store(scale + i, a, some);
        store(shift + i, b + (rounded - mean) * a, some);
    }
    INLINE Line<Compute> at(int64_t i) const {
        Line<Compute> line;
        line.high = high[i];
        line.scale = scale[i];
        line.shift = shift[i];
        return line;
    }
};

// Two sums for each of some channels, 0 at first.
struct ChannelSums {
    Scratch<double> scratch;
    double *first, *second;
    explicit ChannelSums(int64_t size) : scratch(2 * size, true), first(scratch.get()), second(first + size) {}
    INLINE void add(int64_t i, const Sums& sums) {
        first[i] += sums.first;
        second[i] += sums.second;
    }
};

// dgamma and dbeta from the sums of g and g * (x - mean) of [samples][channels], added in the order of samples.
template <class T>
void write_parameter_gradients(const Call& call, const double* rstd, const ChannelSums& sums, int64_t samples) {
    if (!call.dgamma && !call.dbeta) return;
    auto *to_gamma = static_cast<Parameter<T>*>(call.dgamma), *to_beta = static_cast<Parameter<T>*>(call.dbeta);
    const bool is_one = call.k > 1;  // rstd for the channels of a group
    const int64_t groups = is_one ? 1 : call.g;
    for (int64_t g = 0; g < call.g; g += groups) {
        sweep<W, true>(groups * call.k, [&](int64_t i, auto some, int) INLINE_LAMBDA {
            const int64_t c = g * call.k + i;
            Lanes dgamma{}, dbeta{};
            for (int64_t n = 0; n < samples; ++n) {
                dbeta += load(sums.first + n * call.channels() + c, some);
                dgamma += load(sums.second + n * call.channels() + c, some) *
                          load_or_repeat(rstd + n * call.g + (is_one ? g : c), is_one, some);
            }
            if (to_gamma) store(to_gamma + c, dgamma, some);
            if (to_beta) store(to_beta + c, dbeta, some);
        });
    }
}

// Coefficients of the channels of the pools from `begin` on, each pool with `channels` of them: floats where x is narrow,
// for the channels they fit.
template <class T>
struct Coefficients {
    using Compute = std::conditional_t<kIsNarrow<T>, float, double>;

    Statistics<T>& statistics;
    const Call& call = statistics.call;
    int64_t begin, end, channels;
    int64_t size = (end - begin) * channels;
    Scratch<Compute> tables{6 * size};
    Scratch<double> fits{size}, of_pools{3 * (end - begin)};
    Lines<Compute> lines{tables.get(), tables.get() + size, tables.get() + 2 * size};
    Lines<Compute> slopes{tables.get() + 3 * size, tables.get() + 4 * size, tables.get() + 5 * size};
    double *c1 = of_pools.get(), *c2 = c1 + (end - begin), *reach = c2 + (end - begin);
    Indices unfit{};  // any lane, where one of the tables' channels fits no float

    Coefficients(Statistics<T>& statistics, int64_t begin, int64_t end, int64_t channels)
        : statistics(statistics), begin(begin), end(end), channels(channels) {
        each_stretch([&](int64_t pool, int64_t channel, int64_t entry, auto some) INLINE_LAMBDA {
            const Lanes mean = load_or_repeat(statistics.mean + pool, channels > 1, some);
            const Lanes rstd = load_or_repeat(statistics.rstd.get() + pool, channels > 1, some);
            const Lanes a = rstd * gammas_of<T>(call, channel, false, some), b = betas_of<T>(call, channel, false, some);
            lines.put(entry, mean, a, b, some);
            const Indices fit = fit_float<T>(mean, a, b);
            store(fits.get() + entry, bits_of<Lanes>(fit), some);
            unfit |= ~fit;
        });
    }

    // body(pool, channel, entry, Full or Part) in steps of neighbours: of pools that have one channel each, or of a pool's.
    template <class Body>
    INLINE void each_stretch(Body body) {
        for (int64_t p = begin; p < end;) {
            const int64_t g = p % call.g, pools = channels == 1 ? least(end - p, call.g - g) : 1;
            sweep<W, true>(pools * channels, [&](int64_t i, auto some, int) INLINE_LAMBDA {
                body(channels == 1 ? p + i : p, g * channels + i, (p - begin) * channels + i, some);
            });
            p += pools;
        }
    }
    int64_t entry(int64_t pool, int64_t run) const { return (pool - begin) * channels + (channels > 1 ? run : 0); }
    bool fits_float_at(int64_t entry) const {
        return bits_of<int64_t>(const_cast<Coefficients*>(this)->fits[entry]) != 0;
    }

    // Whether the tables serve all their channels.
    bool serve_all() const { return !kIsNarrow<T> || !has_any(unfit); }
    // Makes one choice for all channels.
    void fit_all_or_none() {
        if (!serve_all()) clear(fits.get(), 0, size);
    }

    // From the sums of g and g * (x - mean), which begin with this table's first channel. Given statistics are constants.
    void find_slopes(const double* first, const double* second) {
        clear(c1, 0, 3 * (end - begin));
        if (!call.has_given_statistics()) {
            scale_sums(first, second);
            sweep<W, true>(end - begin, [&](int64_t i, auto some, int) INLINE_LAMBDA {
                const ManySlopes found(call.centred, load(c1 + i, some), load(c2 + i, some),
                                            load(statistics.rstd.get() + begin + i, some), statistics.counts_of(begin + i, some));
                store(c1 + i, found.c1, some);
                store(c2 + i, found.c2, some);
                store(reach + i, found.reach, some);
            });
        }
        each_stretch([&](int64_t pool, int64_t, int64_t entry, auto some) INLINE_LAMBDA {
            const bool is_one = channels > 1;
            const Lanes by = load_or_repeat(c2 + pool - begin, is_one, some), less = load_or_repeat(c1 + pool - begin, is_one, some);
            slopes.put(entry, load_or_repeat(statistics.mean + pool, is_one, some), by, less, some);
            const Indices fit = are_within_float(by) & are_within_float(less) &
                                are_within_float(load_or_repeat(reach + pool - begin, is_one, some));
            if constexpr (kIsNarrow<T>) {
                store(fits.get() + entry, bits_of<Lanes>(bits_of<Indices>(load(fits.get() + entry, some)) & fit), some);
                unfit |= ~fit;
            }
        });
    }
    // Leaves a pool's sums of gamma * g and gamma * g * (x - mean) in c1 and c2.
    void scale_sums(const double* first, const double* second) {
        if (channels == 1) {
            return each_stretch([&](int64_t pool, int64_t channel, int64_t entry, auto some) INLINE_LAMBDA {
                const Lanes gamma = gammas_of<T>(call, channel, false, some);
                store(c1 + pool - begin, load(first + entry, some) * gamma, some);
                store(c2 + pool - begin, load(second + entry, some) * gamma, some);
            });
        }
        for (int64_t p = begin; p < end; ++p) {
            Sums scaled;
            for (int64_t j = 0; j < channels; ++j) {
                const int64_t i = (p - begin) * channels + j;
                const double gamma = gamma_of<T>(call, p % call.g * channels + j);
                scaled.add({first[i] * gamma, second[i] * gamma});
            }
            c1[p - begin] = scaled.first;
            c2[p - begin] = scaled.second;
        }
    }
    Line<double> wide_line(int64_t pool, int64_t channel) const {
        return {statistics.mean[pool], statistics.rstd[pool] * gamma_of<T>(call, channel), beta_of<T>(call, channel)};
    }
    Line<double> wide_slope(int64_t pool) const { return {statistics.mean[pool], c2[pool - begin], c1[pool - begin]}; }
};

}  // namespace anynorm::ANYNORM_TARGET
