// Layer normalisation of each pixel over its channels, a 1 × 1 convolution and a depthwise 3 × 3 convolution, with none
// of what lies between them in memory: what gated_feed_forward and the attention that goes as far have in common.
//
// A block computes a tile of the image.  It keeps the tile's pixels, and its halo of those around them, in registers:
// normalised, as fragments of the 1 × 1 convolution's second factor.  Then it takes the outputs, 32 of them, a chunk,
// at a time:
//
//   product    on tensor cores, z = weight · x, a row for each output: a lane gets neighbouring pixels of it, which go
//              to shared memory as FP16, a plane for each output.  Zeros outside of the image.
//   depthwise  on tensor cores, too.  Along a row, an output's convolution is a product by a matrix that has the
//              weights along its diagonal:  y[x] = Σ z[k] · w[k − x], 8 columns from 10.  A fragment of the first
//              factor has 8 columns, a block, from each of 16 places of a plane: all blocks of a row, and rows as far
//              apart as the fragment below it is one row down in each place.  So a fragment serves all three rows of
//              weights. This multiplies by many zeros.  But FP32 units would take 9 instructions where tensor cores
//              take 1, and these are idle otherwise.
//
// Both happen at once, to two chunks that follow each other, with one barrier per chunk; half of the warps begin with
// the one, half with the other.  The caller's epilogue takes the sums from registers.
#pragma once

#include "common/norm_conv_depthwise.h"
#include "common/pointwise.cuh"

namespace trt_graft {

constexpr int kUnit = 8;                         // neighbouring outputs, whose weights are copied together
constexpr int kConvolvedChunk = 32;              // outputs
constexpr int kUnits = kConvolvedChunk / kUnit;  // of a chunk
constexpr int kNoUnit = -1;                      // in place of a unit's first output: zeros

// The least odd number that is not below n.
constexpr int odd(int n) { return n | 1; }

// Stores four 8×8 matrices, as load_matrices loads them.
__device__ inline void store_matrices(__half* row, const uint32_t (&words)[4]) {
#if __CUDA_ARCH__ >= 900
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
#else  // each lane asks those that have the rows' addresses
    const auto address = reinterpret_cast<uintptr_t>(row);
    for (int i = 0; i < 4; ++i) {
        const int lane = threadIdx.x % 32, from = i * 8 + lane / 4;
        const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(address), from, 32);
        const uint32_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(address >> 32), from, 32);
        reinterpret_cast<uint32_t*>(uint64_t{high} << 32 | low)[lane % 4] = words[i];
    }
#endif
}

// Starts to copy 4 bytes to shared memory, or zeros; as copy_or_clear.
__device__ inline void copy_or_clear_word(__half* target, const __half* source, bool exists) {
#if __CUDA_ARCH__ >= 800
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(address), "l"(source), "r"(exists ? 4 : 0)
                 : "memory");
#else
    *reinterpret_cast<uint32_t*>(target) = exists ? *reinterpret_cast<const uint32_t*>(source) : 0;
#endif
}

// d = c + a · b: what many products begin with stays where it is.
__device__ inline void multiply_onto(float (&d)[4], const float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    for (int i = 0; i < 4; ++i) d[i] = c[i];
    multiply_add(d, a, b0, b1);
#endif
}

// c += a · b, 8 columns by 8 rows: {rows group, group + 8} × columns {2·pair, 2·pair + 1} of a.
__device__ inline void multiply_add_half(float (&c)[4], const uint2& a, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(b));
}

// A block of WARPS warps and its tile of ROWS × COLUMNS pixels.  A warp multiplies STRIPS · 8 of the halo's pixels,
// those of the tile and around it, of up to STEPS · 16 channels.
//
// Every thread of the block constructs one, and calls the functions together with all others:
//
//   start(units)                 starts to copy the first chunk of a list of outputs: constants, that is, which need no
//                                wait_for_previous
//   load(image, row, column)     starts to load the tile whose first pixel this is; it may reach beyond the image
//   run(count, units, epilogue)  goes through `count` chunks; a fourth argument is called when there is room for the
//                                copies of another list's first chunk, to start them
//
// units(chunk, unit): the first of the 8 outputs, a multiple of 8, that are rows 8·unit … 8·unit + 7 of a chunk, or
// kNoUnit.
//
// epilogue.take(chunk, task, part, convolve): a warp's share of a chunk, any kTaskRows of its rows, of one of kParts
// parts of the tile; the rows are told apart by task = 0 … kTasks − 1.  convolve(n, sums) gives row n of the chunk,
// with its bias, at 4 · kLines pixels: sums[line][number] is the one that pixel_of(part, line, number, lane) finds.
// They may lie behind the image's end.  All lanes of the warp must call it.
//
// epilogue.finish(chunk): all warps have taken the chunk, and begin to take the chunk behind the next one only when all
// have finished this one.  So what is handed over through shared memory needs two buffers: chunk % 2.
template <int STEPS, int WARPS, int STRIPS, int ROWS, int COLUMNS>
class NormConvDepthwise {
  public:
    static constexpr int kThreads = WARPS * 32;
    static constexpr int kPixels = ROWS * COLUMNS;
    static constexpr int kTaskRows = 4;
    static constexpr int kTasks = kConvolvedChunk / kTaskRows;
    static constexpr int kParts = WARPS / kTasks;
    static constexpr int kLines = kPixels / (kParts * 128);  // of each of a fragment's 16 blocks

    struct Pixel {  // of the tile
        int row, column;
    };
    // The tile's pixels in the order in which warps have them: kParts × kLines × 4 × 32.
    static __device__ Pixel pixel_of(int part, int line, int number, int lane) {
        const int group = lane / 4;
        return {part * kPartRows + group / kBlocks * kBlocks + number / 2 * kHalfRows + line,
                group % kBlocks * 8 + lane % 4 * 2 + number % 2};
    }

  private:
    static constexpr int kGranules = STEPS / 2;  // whole ones; half a granule may follow
    static constexpr bool kHalf = STEPS % 2 == 1;
    static constexpr int kBlocks = COLUMNS / 8;  // of a row
    // Rows of a part, and how far a fragment's rows 8 … 15 are below the others.  Among those, blocks of the same
    // columns are kBlocks rows apart, with which each lies in other banks.
    static constexpr int kPartRows = ROWS / kParts, kHalfRows = kLines == kBlocks ? 8 : kLines;
    static_assert(WARPS % kTasks == 0 && (kLines == kBlocks || 2 * kLines == kBlocks) &&
                  kPartRows == 16 / kBlocks * kLines);
    // A strip of the product is a block, or, behind the last one, has the two last columns of four of the halo's rows.
    static constexpr int kHaloRows = ROWS + 2, kAligned = kHaloRows * kBlocks;
    static constexpr int kStripRows = WARPS / kBlocks;  // from a warp's strip to the next one
    static constexpr int kWhole = kAligned / WARPS;     // strips of each warp that are blocks
    static_assert(WARPS * STRIPS >= kAligned + (kHaloRows + 3) / 4, "each pixel needs a lane");
    static_assert(WARPS % kBlocks == 0 && kWhole % 2 == 0 && 16 % WARPS % 8 == 0);
    // Of a plane: rows end with columns whose weights are zeros.  Rows, and planes, are an odd number of packs of 16
    // bytes apart: what a warp loads or stores at once lies in different banks.
    static constexpr int kStride = odd(kBlocks + 1) * 8;
    static constexpr int kPlane = odd(kHaloRows * kStride / 8) * 8;
    static_assert(kBlocks * kStride / 8 % 8 == (kBlocks == 2 ? 6 : 4), "other banks");
    // Bytes of one of two buffers.
    static constexpr int kWeightRow = (2 * STEPS + 1) * 8;  // an odd number of packs, too
    static constexpr int kWeightBytes = kConvolvedChunk * kWeightRow * 2;
    static constexpr int kRawUnit = 11 * 8;  // 8 · 9 depthwise weights, 8 biases, 8 depthwise biases
    static constexpr int kRawBytes = kUnits * kRawUnit * 2;
    static constexpr int kDiagonals = 5;  // the words that the matrix of weights consists of, see diagonal_
    static constexpr int kDiagonalBytes = kConvolvedChunk * (kDiagonals + 1) * 16;
    static constexpr int kPlaneBytes = kConvolvedChunk * kPlane * 2;
    static constexpr int kNormBytes = 2 * STEPS * 16 * 4;

  public:
    // Of shared memory, from a boundary of 16 bytes on.
    static constexpr int kBytes = kNormBytes + 2 * (kWeightBytes + kRawBytes + kDiagonalBytes + kPlaneBytes);

    __device__ NormConvDepthwise(void* shared, const NormConvDepthwiseArguments& arguments)
        : a_(arguments),
          weights_(static_cast<char*>(shared)),
          raw_(weights_ + 2 * kWeightBytes),
          diagonals_(raw_ + 2 * kRawBytes),
          planes_(diagonals_ + 2 * kDiagonalBytes),
          norm_(reinterpret_cast<float*>(planes_ + 2 * kPlaneBytes)) {
#pragma unroll
        for (int j = kWhole; j < STRIPS; ++j) {
            const Pixel pixel = halo_pixel(j, 2 * pair());
            const int place = pixel.row < kHaloRows ? pixel.row * kStride + pixel.column : COLUMNS + 2;
            targets_[j - kWhole] = group() * kPlane + place;
        }
        // Row k, column x of the matrix is w[k − x]; the lane has column `group` of rows 2·pair, 2·pair + 1, and of
        // these plus 8.  At most one of both is not zero: one of the words (0, w[0]), (w[0], w[1]), (w[1], w[2]),
        // (w[2], 0).
        const int distance = 2 * pair() - group();
        upper_mask_ = distance >= -1 ? ~0u : 0;
        const int diagonal = distance >= -1 ? distance : distance + 8;
        diagonal_ = diagonal >= -1 && diagonal <= 2 ? diagonal + 2 : 0;
        // Matrices: 8 rows of weights, the next 8, both with the next 8 channels.
        row_ = (lane() % 16 * kWeightRow + lane() / 16 * 8) * 2;
        // Of two strips that are blocks: outputs 0 … 7, and 8 … 15, of the first one, then of the second.
        strips_ =
            (lane() % 16 * kPlane + (warp() / kBlocks + lane() / 16 * kStripRows) * kStride + warp() % kBlocks * 8) * 2;
        // A block for each row of the fragment, and the next one of its columns.
        const int block = lane() % 8;
        const int row = warp() % kParts * kPartRows + block / kBlocks * kBlocks + lane() / 8 % 2 * kHalfRows;
        blocks_ = (row * kStride + (block % kBlocks + lane() / 16) * 8) * 2;
        if constexpr (STEPS * STRIPS <= 18) {  // registers have room for them: the compiler makes them again and again
            keep(diagonal_);
            keep(row_);
            keep(strips_);
            keep(blocks_);
        }
    }

    template <typename Units>
    __device__ void start(const Units& units) {
        if (copied_ == 0) prepare();
        copy(0, units);
    }

    __device__ void load(int64_t image, int row, int column) {
        rows_ = a_.height - row < ROWS ? a_.height - row + 1 : kHaloRows;
        bool all_inside = true;
        const auto inside = [&](const Pixel& pixel) {
            const int y = row - 1 + pixel.row, x = column - 1 + pixel.column;
            return pixel.row < kHaloRows && y >= 0 && y < a_.height && x >= 0 && x < a_.width;
        };
        const int left = a_.channels - 8 * pair(), left_of_half = a_.channels - 4 * pair();
        const __half* source = nullptr;
#pragma unroll
        for (int j = 0; j < STRIPS; ++j) {
            const Pixel pixel = halo_pixel(j, group());
            if (j == 0 || j >= kWhole) {
                const int64_t line = image * a_.height + (row - 1 + pixel.row);
                source = a_.x + (line * a_.width + (column - 1 + pixel.column)) * a_.channels + 8 * pair();
            } else {
                source += int64_t{kStripRows} * a_.width * a_.channels;
            }
            const bool exists = inside(pixel);
            const int limit = exists ? left : 0;
#pragma unroll
            for (int g = 0; g < kGranules; ++g) {
                uint4 values = {};
                if (g * kGranule < limit) values = __ldg(reinterpret_cast<const uint4*>(source + g * kGranule));
                x_[j][2 * g] = {values.x, values.y};
                x_[j][2 * g + 1] = {values.z, values.w};
            }
            if constexpr (kHalf) {
                x_[j][STEPS - 1] = {};
                if (exists && kGranules * kGranule < left_of_half) {
                    x_[j][STEPS - 1] =
                        __ldg(reinterpret_cast<const uint2*>(source + kGranules * kGranule - 4 * pair()));
                }
            }
            // The lane gets the products of two other pixels.
            const bool first = inside(halo_pixel(j, 2 * pair())), second = inside(halo_pixel(j, 2 * pair() + 1));
            masks_[j] = (first ? 0xffffu : 0) | (second ? 0xffff0000u : 0);
            all_inside = all_inside && first && second;
        }
        all_inside_ = __all_sync(0xffffffffu, all_inside);
        if (copied_ == 1) store_norm();
    }

    template <typename Units, typename Epilogue, typename Last>
    __device__ void run(int count, const Units& units, Epilogue& epilogue, const Last& last) {
        __pipeline_wait_prior(0);
        __syncthreads();
        normalise();
        const int first = copied_ - 1;  // chunks so far: a chunk's buffers are those of its number
#pragma unroll 1
        for (int i = 0; i < count + 2; ++i) {
            if (i > 0) {
                __pipeline_wait_prior(0);
                __syncthreads();
            }
            if (i + 1 < count) copy(i + 1, units);
            if (i + 1 == count) last();
            if (i < count) make_diagonals((first + i) % 2);
            if (i >= 2) epilogue.finish(i - 2);
#pragma unroll 1
            for (int phase = 0; phase < 2; ++phase) {
                if ((phase + warp()) % 2 == 0) {
                    if (i < count) multiply((first + i) % 2);
                } else if (i > 0 && i <= count) {
                    take(i - 1, (first + i - 1) % 2, epilogue);
                }
            }
        }
    }
    template <typename Units, typename Epilogue>
    __device__ void run(int count, const Units& units, Epilogue& epilogue) {
        run(count, units, epilogue, [] {});
    }

  private:
    static __device__ void keep(int& value) { asm volatile("" : "+r"(value)); }
    static __device__ int warp() { return threadIdx.x / 32; }
    static __device__ int lane() { return threadIdx.x % 32; }
    static __device__ int group() { return lane() / 4; }
    static __device__ int pair() { return lane() % 4; }
    // Pixel i = 0 … 7 of the warp's strip j: in the halo, which begins one row and one column before the tile.
    static __device__ Pixel halo_pixel(int j, int i) {
        const int strip = j * WARPS + warp();
        if (j < kWhole || strip < kAligned) {
            return {j * kStripRows + warp() / kBlocks, warp() % kBlocks * 8 + i};
        }
        return {(strip - kAligned) * 4 + i / 2, COLUMNS + i % 2};
    }
    // The first of the lane's four channels of a step.
    static __device__ int first_channel(int step) {
        if (step < 2 * kGranules) return step / 2 * kGranule + 8 * pair() + step % 2 * 4;
        return step * 16 + 4 * pair();
    }

    // What shared memory holds from the beginning on; the weights of the normalisation are on their way only.
    __device__ void prepare() {
        const int channel = threadIdx.x * 4;
        gamma_ = beta_ = {};
        if (channel < a_.channels) {
            gamma_ = __ldg(reinterpret_cast<const uint2*>(a_.norm_weight + channel));
            beta_ = __ldg(reinterpret_cast<const uint2*>(a_.norm_bias + channel));
        }
        // The planes' padding is multiplied by zeros, and must be finite; the first diagonals are zeros.
        for (int i = threadIdx.x; i < 2 * (kDiagonalBytes + kPlaneBytes) / 16; i += kThreads) {
            reinterpret_cast<uint4*>(diagonals_)[i] = {};
        }
    }

    __device__ void store_norm() {
        if (threadIdx.x >= STEPS * 4) return;
        auto* const values = reinterpret_cast<float4*>(norm_) + threadIdx.x;
        values[0] = unpack(gamma_);
        values[STEPS * 4] = unpack(beta_);
    }

    static __device__ float4 unpack(const uint2& words) {
        const float2 low = __half22float2(as_pair(words.x)), high = __half22float2(as_pair(words.y));
        return {low.x, low.y, high.x, high.y};
    }

    // Tensor cores add the channels up: products by ones are sums, and as fragments of pixels are those of the
    // transposed matrix, too, their products by themselves have sums of squares along the diagonal.  A lane gets those
    // of its own pixel from columns 2·pair and 2·pair + 1.
    static __device__ float of_own_pixel(float even, float odd) {
        return __shfl_sync(0xffffffffu, group() % 2 ? odd : even, group() / 2, 4);
    }

    // Strips behind the image's last row are left out.
    __device__ void normalise() {
        constexpr uint32_t kOnes = 0x3c003c00;
        const float channels = a_.channels, share = 1 / channels;
        float scales[STRIPS], offsets[STRIPS];
#pragma unroll
        for (int j = 0; j < STRIPS; ++j) {
            scales[j] = offsets[j] = 0;
            if (halo_pixel(j, 0).row >= rows_) continue;
            float sums[4] = {};
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                multiply_add(sums, {kOnes, kOnes, kOnes, kOnes}, x_[j][s].x, x_[j][s].y);
            }
            // As exact as a division, whose result is exact for constant pixels.
            const float sum = of_own_pixel(sums[0], sums[1]);
            const float mean = fmaf(fmaf(-share * sum, channels, sum), share, share * sum);
            // Half of x minus half of the mean: exact where they are near, and never beyond FP16.
            const __half shift = __float2half_rn(-0.5f * mean);
            const float rest = fmaf(0.5f, mean, to_float(shift));
            const __half2 half = __float2half2_rn(0.5f), shifts = __half2half2(shift);
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                x_[j][s] = {as_word(__hfma2(as_pair(x_[j][s].x), half, shifts)),
                            as_word(__hfma2(as_pair(x_[j][s].y), half, shifts))};
            }
            if (a_.channels < STEPS * 16) {
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    if (first_channel(s) >= a_.channels) x_[j][s] = {};
                }
            }
            float upper[4] = {}, lower[4] = {};
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                multiply_add_half(upper, x_[j][s], x_[j][s].x);
                multiply_add_half(lower, x_[j][s], x_[j][s].y);
            }
            const float squares = (of_own_pixel(upper[0], upper[1]) + of_own_pixel(lower[2], lower[3])) * share;
            const float variance = 4 * fmaxf(squares - rest * rest, 0);
            scales[j] = 2 * rsqrtf(variance + a_.epsilon);
            offsets[j] = (a_.subtract_mean ? -rest : -to_float(shift)) * scales[j];
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const auto* const norm = reinterpret_cast<const float4*>(norm_ + first_channel(s));
            const float4 gamma = norm[0], beta = norm[STEPS * 4];
#pragma unroll
            for (int j = 0; j < STRIPS; ++j) {
                float4 x = unpack(x_[j][s]);
                x.x = fmaf(fmaf(x.x, scales[j], offsets[j]), gamma.x, beta.x);
                x.y = fmaf(fmaf(x.y, scales[j], offsets[j]), gamma.y, beta.y);
                x.z = fmaf(fmaf(x.z, scales[j], offsets[j]), gamma.z, beta.z);
                x.w = fmaf(fmaf(x.w, scales[j], offsets[j]), gamma.w, beta.w);
                x_[j][s] = {as_word(__floats2half2_rn(x.x, x.y)), as_word(__floats2half2_rn(x.z, x.w))};
            }
        }
    }

    // Starts to copy the weights of a chunk, rows of channels, and what make_diagonals takes.  A row is copied by WARPS
    // threads, in the order in which a lane has a pixel's channels: as they come from memory.
    template <typename Units>
    __device__ void copy(int chunk, const Units& units) {
        const int row = threadIdx.x / WARPS, first = threadIdx.x % WARPS;
        const int output = units(chunk, row / kUnit);
        const __half* const from = a_.weight + int64_t{output + row % kUnit} * a_.channels + first * 2;
        const int left = output >= 0 ? a_.channels - first * 2 : 0;
        // Lane p of a pixel has words 4·p … 4·p + 3 of a granule: a word for each half of two steps.  Of half a granule
        // it has 2·p and 2·p + 1.
        __half* const to = reinterpret_cast<__half*>(weights_ + copied_ % 2 * kWeightBytes) + row * kWeightRow;
        __half* const to_granules = to + (first % 4 * 4 + first / 4) * 2;
#pragma unroll
        for (int i = 0; i < kGranules * 16; i += WARPS) {
            copy_or_clear_word(to_granules + (i / 16 * 16 + i % 16 / 4) * 2, from + i * 2, i * 2 < left);
        }
        static_assert(WARPS >= 8);
        if (kHalf && first < 8) {
            copy_or_clear_word(to + kGranules * kGranule + (first % 2 * 4 + first / 2) * 2, from + kGranules * kGranule,
                               kGranules * kGranule < left);
        }
        const int unit = WARPS - 1 - warp();
        if (unit < kUnits && lane() < 11) {
            const int begin = units(chunk, unit);
            const __half* const values = lane() < 9    ? a_.depthwise_weight + begin * 9 + lane() * 8
                                         : lane() == 9 ? a_.bias + begin
                                                       : a_.depthwise_bias + begin;
            auto* const raw = reinterpret_cast<__half*>(raw_ + copied_ % 2 * kRawBytes);
            copy_or_clear(raw + unit * kRawUnit + lane() * 8, values, begin >= 0);
        }
        __pipeline_commit();
        ++copied_;
    }

    // For each output of a chunk and each diagonal, see diagonal_: the words of three rows of weights, each row made by
    // a warp.  Behind them the biases, as a fragment c has them.
    __device__ void make_diagonals(int buffer) {
        if (warp() > 3) return;
        const auto* const raw = reinterpret_cast<const __half*>(raw_ + buffer * kRawBytes) + lane() / kUnit * kRawUnit;
        auto* const diagonals = reinterpret_cast<uint4*>(diagonals_ + buffer * kDiagonalBytes);
        if (warp() < 3) {
            auto* const words = reinterpret_cast<uint32_t*>(diagonals + lane() * kDiagonals) + warp();
            const __half* const weights = raw + lane() % kUnit * 9 + warp() * 3;
            const __half zero = __float2half_rn(0);
            words[4] = as_word(__halves2half2(zero, weights[0]));
            words[8] = as_word(__halves2half2(weights[0], weights[1]));
            words[12] = as_word(__halves2half2(weights[1], weights[2]));
            words[16] = as_word(__halves2half2(weights[2], zero));
        } else {
            const float bias = to_float(raw[80 + lane() % kUnit]);
            reinterpret_cast<float4*>(diagonals)[kConvolvedChunk * kDiagonals + lane()] = {bias, bias, bias, bias};
        }
    }

    // A chunk's outputs of the warp's pixels.
    __device__ void multiply(int buffer) {
        const auto* const raw = reinterpret_cast<const __half*>(raw_ + buffer * kRawBytes) + 72 + group();
        const auto* const weights = reinterpret_cast<const __half*>(weights_ + (buffer * kWeightBytes + row_));
        auto* const planes = reinterpret_cast<__half*>(planes_ + buffer * kPlaneBytes);
        auto* const strips = reinterpret_cast<__half*>(planes_ + (buffer * kPlaneBytes + strips_));
#pragma unroll(STEPS <= 6 ? 2 : 1)
        for (int sixteen = 0; sixteen < 2; ++sixteen) {  // outputs: rows `group` of two units
            const float upper_bias = to_float(raw[2 * sixteen * kRawUnit]);
            const float lower_bias = to_float(raw[(2 * sixteen + 1) * kRawUnit]);
            float biases[] = {upper_bias, upper_bias, lower_bias, lower_bias};
            float c[STRIPS][4];
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                uint32_t words[4];
                load_matrices(words, weights + sixteen * 16 * kWeightRow + s * 16);
                for (int j = 0; j < STRIPS; ++j) {
                    multiply_onto(c[j], s == 0 ? biases : c[j], words, x_[j][s].x, x_[j][s].y);
                }
            }
            uint32_t words[STRIPS][2];
            for (int j = 0; j < STRIPS; ++j) {
                for (int i = 0; i < 2; ++i) words[j][i] = as_word(__floats2half2_rn(c[j][2 * i], c[j][2 * i + 1]));
            }
            if (!all_inside_) {
                for (int j = 0; j < STRIPS; ++j) {
                    for (uint32_t& word : words[j]) word &= masks_[j];
                }
            }
#pragma unroll
            for (int j = 0; j < kWhole; j += 2) {
                store_matrices(strips + sixteen * 16 * kPlane + j * kStripRows * kStride,
                               {words[j][0], words[j][1], words[j + 1][0], words[j + 1][1]});
            }
#pragma unroll
            for (int j = kWhole; j < STRIPS; ++j) {
                __half* const target = planes + targets_[j - kWhole] + sixteen * 16 * kPlane;
                *reinterpret_cast<uint32_t*>(target) = words[j][0];
                *reinterpret_cast<uint32_t*>(target + kUnit * kPlane) = words[j][1];
            }
        }
    }

    template <typename Epilogue>
    __device__ void take(int chunk, int buffer, Epilogue& epilogue) {
        const int part = warp() % kParts, task = warp() / kParts;
        const auto* const matrices = reinterpret_cast<const __half*>(planes_ + (buffer * kPlaneBytes + blocks_));
        const auto* const diagonals = reinterpret_cast<const uint4*>(diagonals_ + buffer * kDiagonalBytes) + diagonal_;
        const auto* const biases =
            reinterpret_cast<const float4*>(diagonals_ + buffer * kDiagonalBytes) + kConvolvedChunk * kDiagonals;
        const auto convolve = [&](int n, float (&sums)[kLines][4]) {
            const uint4 diagonal = diagonals[n * kDiagonals];
            const float4 four = biases[n];
            float bias[] = {four.x, four.y, four.z, four.w};
            const uint32_t words[] = {diagonal.x, diagonal.y, diagonal.z};
#pragma unroll
            for (int i = 0; i < kLines + 2; ++i) {
                uint32_t pixels[4];
                load_matrices(pixels, matrices + n * kPlane + i * kStride);
#pragma unroll
                for (int line = 0; line < kLines; ++line) {
                    const int tap = i - line;  // row of the weights
                    if (tap < 0 || tap > 2) continue;
                    multiply_onto(sums[line], tap == 0 ? bias : sums[line], pixels, words[tap] & upper_mask_,
                                  words[tap] & ~upper_mask_);
                }
            }
        };
        epilogue.take(chunk, task, part, convolve);
    }

    const NormConvDepthwiseArguments& a_;
    char *const weights_, *const raw_, *const diagonals_, *const planes_;  // two buffers each
    float* const norm_;                                                    // weight and bias
    uint2 x_[STRIPS][STEPS];        // four channels of pixel `group` of a strip, for each step of the product
    uint32_t masks_[STRIPS];        // of pixels 2·pair and 2·pair + 1 of a strip, those that lie inside of the image
    int targets_[STRIPS - kWhole];  // where these are stored of output `group`, of strips that may be no blocks
    bool all_inside_;               // those of all lanes
    int rows_;                      // of tile and halo above the image's end
    uint2 gamma_, beta_;            // of the normalisation, on their way to norm_
    uint32_t upper_mask_;           // of rows 2·pair, 2·pair + 1 of the matrix of weights, rather than these plus 8
    int row_, strips_;  // bytes from a buffer's beginning to where the lane loads weights, and stores strips
    int blocks_;        // and to where it loads a fragment of a plane
    int diagonal_;      // of 5: zeros, (0, w[0]), (w[0], w[1]), (w[1], w[2]), (w[2], 0)
    int copied_ = 0;    // chunks
};

}  // namespace trt_graft
