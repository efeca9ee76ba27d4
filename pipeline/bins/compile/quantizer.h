// make_qkx2_quants, make_qkx3_quants and make_qx_quants of ggml-quants.c (ggml, MIT licence) for eight
// blocks of weights at once, each in a lane of a vector. A lane does the same operations in the same
// order, none of them fused, so that the bytes are the same. Included by ggml-quants.c, for x86-64;
// see quantizer.cmake.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8

typedef float lanes_f __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes_i __attribute__((vector_size(4 * LANES)));

static inline lanes_f lanes_set(float value) {
    return value - (lanes_f) { 0 };
}

static inline lanes_f lanes_select(lanes_i mask, lanes_f yes, lanes_f no) {
    return (lanes_f) ((mask & (lanes_i) yes) | (~mask & (lanes_i) no));
}

static inline lanes_f lanes_abs(lanes_f value) {
    return (lanes_f) ((lanes_i) value & 0x7fffffff);
}

// nearest_int, then no less than low and no more than high; as a float.
static inline lanes_f lanes_level(lanes_f value, int low, int high) {
    lanes_i level = ((lanes_i) (value + 12582912.f) & 0x007fffff) - 0x00400000;
    lanes_i above = level > high;
    level = (above & high) | (~above & level);
    lanes_i below = level < low;
    level = (below & low) | (~below & level);
    return __builtin_convertvector(level, lanes_f);
}

static inline int lanes_any(lanes_i mask) {
    int any = 0;
    for (int j = 0; j < LANES; ++j) any |= mask[j];
    return any;
}

// make_qkx2_quants and make_qkx3_quants for eight blocks of 32, with squared errors. Without weights
// they are those of quantize_row_q4_K_ref and quantize_row_q5_K_ref.
static void lanes_qkx(const float * x, const float * weights, int nmax, uint8_t * L, float * scales,
        float * mins, float rmin, float rdelta, int nstep) {
    lanes_f v[32], w[32], level[32], best[32];
    for (int i = 0; i < 32; ++i) {
        for (int j = 0; j < LANES; ++j) v[i][j] = x[32*j + i];
    }
    if (weights) {
        for (int i = 0; i < 32; ++i) {
            for (int j = 0; j < LANES; ++j) w[i][j] = weights[32*j + i];
        }
    } else {
        lanes_f sum_x2 = lanes_set(0), av_x;
        for (int i = 0; i < 32; ++i) sum_x2 += v[i] * v[i];
        for (int j = 0; j < LANES; ++j) av_x[j] = sqrtf(sum_x2[j]/32);
        for (int i = 0; i < 32; ++i) w[i] = av_x + lanes_abs(v[i]);
    }

    lanes_f min = v[0], max = v[0], sum_w = w[0], sum_x = w[0] * v[0];
    for (int i = 1; i < 32; ++i) {
        min = lanes_select(v[i] < min, v[i], min);
        max = lanes_select(v[i] > max, v[i], max);
        sum_w += w[i];
        sum_x += w[i] * v[i];
    }
    min = lanes_select(min > 0, lanes_set(0), min);
    const lanes_i flat = max == min;
    const lanes_f flat_min = min;
    lanes_f iscale = (float) nmax/(max - min), scale = 1/iscale, best_error = lanes_set(0);
    for (int i = 0; i < 32; ++i) {
        best[i] = lanes_level(iscale*(v[i] - min), 0, nmax);
        lanes_f diff = scale * best[i] + min - v[i];
        best_error += w[i] * (diff * diff);
    }
    for (int is = 0; is <= nstep; ++is) {
        iscale = (rmin + rdelta*is + nmax)/(max - min);
        lanes_f sum_l = lanes_set(0), sum_l2 = lanes_set(0), sum_xl = lanes_set(0);
        for (int i = 0; i < 32; ++i) {
            const lanes_f l = level[i] = lanes_level(iscale*(v[i] - min), 0, nmax), wl = w[i]*l;
            sum_l += wl;
            sum_l2 += wl*l;
            sum_xl += wl*v[i];
        }
        const lanes_f D = sum_w * sum_l2 - sum_l * sum_l;
        lanes_f this_scale = (sum_w * sum_xl - sum_x * sum_l)/D;
        lanes_f this_min = (sum_l2 * sum_x - sum_l * sum_xl)/D;
        const lanes_i above = this_min > 0;
        this_min = lanes_select(above, lanes_set(0), this_min);
        this_scale = lanes_select(above, sum_xl / sum_l2, this_scale);
        lanes_f error = lanes_set(0);
        for (int i = 0; i < 32; ++i) {
            lanes_f diff = this_scale * level[i] + this_min - v[i];
            error += w[i] * (diff * diff);
        }
        const lanes_i better = (D > 0) & (error < best_error);
        if (lanes_any(better)) {
            for (int i = 0; i < 32; ++i) best[i] = lanes_select(better, level[i], best[i]);
            best_error = lanes_select(better, error, best_error);
            scale = lanes_select(better, this_scale, scale);
            min = lanes_select(better, this_min, min);
        }
    }
    for (int j = 0; j < LANES; ++j) {
        scales[j] = flat[j] ? 0.f : scale[j];
        mins[j] = -(flat[j] ? flat_min[j] : min[j]);
        for (int i = 0; i < 32; ++i) L[32*j + i] = flat[j] ? 0 : (uint8_t) best[i][j];
    }
}

// make_qx_quants(16, nmax, x, L, 1, qw) for eight blocks of 16; qw may be NULL.
static void lanes_qx(const float * x, const float * qw, int nmax, int8_t * L, float * scales, float least) {
    lanes_f v[16], w[16], max = lanes_set(0), amax = lanes_set(0);
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < LANES; ++j) v[i][j] = x[16*j + i];
        const lanes_f ax = lanes_abs(v[i]);
        const lanes_i larger = ax > amax;
        amax = lanes_select(larger, ax, amax);
        max = lanes_select(larger, v[i], max);
        w[i] = v[i] * v[i];
        for (int j = 0; qw && j < LANES; ++j) w[i][j] = qw[16*j + i];
    }
    lanes_f best_iscale = (float) -nmax / max, scale = lanes_set(0), best = lanes_set(0);
    for (int is = -10; is <= 9; ++is) { // the first one is that without a step
        if (is == 0) continue;
        const lanes_f iscale = is == -10 ? best_iscale : -(nmax + 0.1f*is) / max;
        lanes_f sumlx = lanes_set(0), suml2 = lanes_set(0);
        for (int i = 0; i < 16; ++i) {
            const lanes_f l = lanes_level(iscale * v[i], -nmax, nmax - 1);
            sumlx += w[i]*v[i]*l;
            suml2 += w[i]*l*l;
        }
        if (is == -10) {
            scale = lanes_select(suml2 != 0, sumlx/suml2, lanes_set(0));
            best = scale * sumlx;
            continue;
        }
        const lanes_i better = (suml2 > 0) & (sumlx*sumlx > best*suml2);
        best_iscale = lanes_select(better, iscale, best_iscale);
        scale = lanes_select(better, sumlx/suml2, scale);
        best = lanes_select(better, scale*sumlx, best);
    }
    for (int i = 0; i < 16; ++i) v[i] = lanes_level(best_iscale * v[i], -nmax, nmax - 1) + (float) nmax;
    for (int j = 0; j < LANES; ++j) {
        const int is_zero = amax[j] < least;
        scales[j] = is_zero ? 0.f : scale[j];
        for (int i = 0; i < 16; ++i) L[16*j + i] = is_zero ? 0 : (int8_t) v[i][j];
    }
}
