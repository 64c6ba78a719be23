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
//              weights along its diagonal:  y[x] = Σ z[k] · w[k − x], 8 columns from 10.  Rows of 8 columns in shared
//              memory are rows of the first factor, so that a cell of 8 × 8 pixels is half of a fragment; three
//              products, one for each row of the weights, make two cells.  This multiplies by many zeros.  But FP32
//              units would take 9 instructions where tensor cores take 1, and these are idle otherwise.
//
// Both happen at once, to two chunks that follow each other, with one barrier per chunk; half of the warps begin with
// the one, half with the other.  The caller's epilogue takes the sums from registers.
#pragma once

#include "common/pointwise.cuh"

namespace trt_graft {

constexpr int kUnit = 8;                         // neighbouring outputs, whose weights are copied together
constexpr int kConvolvedChunk = 32;              // outputs
constexpr int kUnits = kConvolvedChunk / kUnit;  // of a chunk
constexpr int kNoUnit = -1;                      // in place of a unit's first output: zeros

// Channels and outputs are multiples of 8.
struct NormConvDepthwiseArguments {
    const __half* x;                                  // an image of `channels`
    const __half *norm_weight, *norm_bias;            // (channels)
    const __half *weight, *bias;                      // (outputs, channels), (outputs)
    const __half *depthwise_weight, *depthwise_bias;  // (outputs, 9), (outputs)
    int channels, height, width;
    float epsilon;
    bool subtract_mean;
};

// The least odd number that is not below n.
constexpr int odd(int n) { return n | 1; }

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
// epilogue.take(chunk, task, row, column, convolve): a warp's share of a chunk, any kTaskRows of its rows; these are
// told apart by task = 0 … kTasks − 1.  convolve(n, sums) gives row n of the chunk, with its bias, at four pixels of
// the tile: (row, column), (row, column + 1), (row, column + 8), (row, column + 9).  They may lie behind the image's
// end.  All lanes of the warp must call it.
//
// epilogue.finish(chunk): all warps have taken the chunk, and begin to take the chunk behind the next one only when all
// have finished this one.  So what is handed over through shared memory needs two buffers: chunk % 2.
template <int STEPS, int WARPS, int STRIPS, int ROWS, int COLUMNS>
class NormConvDepthwise {
  public:
    static constexpr int kThreads = WARPS * 32;
    static constexpr int kPixels = ROWS * COLUMNS;
    static constexpr int kCellPairs = kPixels / 128;   // 8 × 16 pixels: what a warp convolves
    static constexpr int kTasks = WARPS / kCellPairs;  // of a chunk, for each pair of cells
    static constexpr int kTaskRows = kConvolvedChunk / kTasks;

  private:
    static constexpr int kGranules = STEPS / 2;  // whole ones; half a granule may follow
    static constexpr bool kHalf = STEPS % 2 == 1;
    static constexpr int kHaloColumns = COLUMNS + 2, kHaloPixels = (ROWS + 2) * kHaloColumns;
    // Of a plane: rows end with columns whose weights are zeros.  Rows, and planes, are an odd number of packs of 16
    // bytes apart: what a warp loads or stores at once lies in different banks.
    static constexpr int kStride = odd(COLUMNS / 8 + 1) * 8;
    static constexpr int kPlane = odd((ROWS + 2) * kStride / 8) * 8;
    // Bytes of one of two buffers.
    static constexpr int kWeightRow = (2 * STEPS + 1) * 8;  // an odd number of packs, too
    static constexpr int kWeightBytes = kConvolvedChunk * kWeightRow * 2;
    static constexpr int kRawUnit = 11 * 8;  // 8 · 9 depthwise weights, 8 biases, 8 depthwise biases
    static constexpr int kRawBytes = kUnits * kRawUnit * 2;
    static constexpr int kDiagonals = 5;  // the words that the matrix of weights consists of, see diagonal_
    static constexpr int kDiagonalBytes = kConvolvedChunk * kDiagonals * 16;
    static constexpr int kPlaneBytes = kConvolvedChunk * kPlane * 2;
    static constexpr int kNormBytes = 2 * STEPS * 16 * 2;

    static_assert(WARPS * STRIPS * 8 >= kHaloPixels, "each pixel needs a lane");
    static_assert(ROWS % 8 == 0 && COLUMNS % 16 == 0 && WARPS % kCellPairs == 0 && kConvolvedChunk % kTasks == 0);

  public:
    // Of shared memory, from a boundary of 16 bytes on.
    static constexpr int kBytes = kNormBytes + 2 * (kWeightBytes + kRawBytes + kDiagonalBytes + kPlaneBytes);

    __device__ NormConvDepthwise(void* shared, const NormConvDepthwiseArguments& arguments)
        : a_(arguments),
          pitch_((a_.channels + 7) / 8 * 8),
          weights_(static_cast<char*>(shared)),
          raw_(weights_ + 2 * kWeightBytes),
          diagonals_(raw_ + 2 * kRawBytes),
          planes_(diagonals_ + 2 * kDiagonalBytes),
          norm_(reinterpret_cast<__half*>(planes_ + 2 * kPlaneBytes)) {
#pragma unroll
        for (int j = 0; j < STRIPS; ++j) {
            const int pixel = halo_pixel(j) + 2 * pair();
            const int place =
                pixel < kHaloPixels ? pixel / kHaloColumns * kStride + pixel % kHaloColumns : kHaloColumns;
            target_[j] = (group() * kPlane + place) * 2;
        }
        // Row k, column x of the matrix is w[k − x]; the lane has column `group` of rows 2·pair, 2·pair + 1, and of
        // these plus 8.  At most one of both is not zero: one of the words (0, w[0]), (w[0], w[1]), (w[1], w[2]),
        // (w[2], 0).
        const int distance = 2 * pair() - group();
        upper_mask_ = distance >= -1 ? ~0u : 0;
        const int diagonal = distance >= -1 ? distance : distance + 8;
        diagonal_ = diagonal >= -1 && diagonal <= 2 ? diagonal + 2 : 0;
    }

    template <typename Units>
    __device__ void start(const Units& units) {
        if (copied_ == 0) prepare();
        copy(0, units);
    }

    __device__ void load(int64_t image, int row, int column) {
        inside_ = 0;
        existing_ = (a_.height - row < ROWS ? a_.height - row + 1 : ROWS + 2) * kHaloColumns;
#pragma unroll
        for (int j = 0; j < STRIPS; ++j) {
            const int pixel = halo_pixel(j) + group();
            const int y = row - 1 + pixel / kHaloColumns, x = column - 1 + pixel % kHaloColumns;
            const bool inside = pixel < kHaloPixels && y >= 0 && y < a_.height && x >= 0 && x < a_.width;
            const __half* const source = a_.x + ((image * a_.height + y) * a_.width + x) * pitch_;
#pragma unroll
            for (int g = 0; g < kGranules; ++g) {
                const int channel = first_channel(2 * g);
                uint4 values = {};
                if (inside && channel < a_.channels) values = __ldg(reinterpret_cast<const uint4*>(source + channel));
                x_[j][2 * g] = {values.x, values.y};
                x_[j][2 * g + 1] = {values.z, values.w};
            }
            if constexpr (kHalf) {
                const int channel = first_channel(STEPS - 1);
                x_[j][STEPS - 1] = {};
                if (inside && channel < a_.channels) {
                    x_[j][STEPS - 1] = __ldg(reinterpret_cast<const uint2*>(source + channel));
                }
            }
            // The lane gets the products of two other pixels.
            for (int i = 0; i < 2; ++i) {
                const int stored = halo_pixel(j) + 2 * pair() + i;
                const int down = row - 1 + stored / kHaloColumns, across = column - 1 + stored % kHaloColumns;
                const bool exists =
                    stored < kHaloPixels && down >= 0 && down < a_.height && across >= 0 && across < a_.width;
                inside_ |= exists ? 1u << (2 * j + i) : 0;
            }
        }
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
    static __device__ int warp() { return threadIdx.x / 32; }
    static __device__ int lane() { return threadIdx.x % 32; }
    static __device__ int group() { return lane() / 4; }
    static __device__ int pair() { return lane() % 4; }
    // The first of the warp's eight pixels of strip j.
    static __device__ int halo_pixel(int j) { return (warp() * STRIPS + j) * 8; }
    // The first of the lane's four channels of a step.
    static __device__ int first_channel(int step) {
        if (step < 2 * kGranules) return step / 2 * kGranule + 8 * pair() + step % 2 * 4;
        return step * 16 + 4 * pair();
    }

    // What shared memory holds from the beginning on.
    __device__ void prepare() {
        for (int i = threadIdx.x * 8; i < STEPS * 16; i += kThreads * 8) {
            copy_or_clear(norm_ + i, a_.norm_weight + i, i < a_.channels);
            copy_or_clear(norm_ + STEPS * 16 + i, a_.norm_bias + i, i < a_.channels);
        }
        // The planes' padding is multiplied by zeros, and must be finite.
        for (int i = threadIdx.x; i < 2 * kPlaneBytes / 16; i += kThreads) reinterpret_cast<uint4*>(planes_)[i] = {};
    }

    static __device__ void unpack(const uint2& words, float (&values)[4]) {
        const uint32_t pairs[] = {words.x, words.y};
        for (int i = 0; i < 2; ++i) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
            values[2 * i] = pair.x;
            values[2 * i + 1] = pair.y;
        }
    }

    // A pixel's granule has 16 words.  Its lane p has 4·p … 4·p + 3, as they come from memory, and gets p, 4 + p, 8 + p
    // and 12 + p, as fragments and the matrices of weights have them.
    static __device__ void exchange(uint2& low, uint2& high) {
        uint32_t words[] = {low.x, low.y, high.x, high.y};
        const auto swap = [&](int i, int j, bool really) {
            const uint32_t word = words[i];
            words[i] = really ? words[j] : word;
            words[j] = really ? word : words[j];
        };
        const auto reorder = [&] {  // words[i] becomes words[i ^ p]
            swap(0, 1, pair() & 1);
            swap(2, 3, pair() & 1);
            swap(0, 2, pair() & 2);
            swap(1, 3, pair() & 2);
        };
        reorder();
        for (int i = 1; i < 4; ++i) words[i] = __shfl_xor_sync(0xffffffffu, words[i], i);
        reorder();
        low = {words[0], words[1]};
        high = {words[2], words[3]};
    }

    // The same for half a granule: from 2·p, 2·p + 1 to p, 4 + p.
    static __device__ void exchange(uint2& half) {
        const auto word = [&](int lane) {
            const uint32_t even = __shfl_sync(0xffffffffu, half.x, lane, 4);
            const uint32_t odd = __shfl_sync(0xffffffffu, half.y, lane, 4);
            return pair() % 2 ? odd : even;
        };
        half = {word(pair() / 2), word(2 + pair() / 2)};
    }

    // Sum over the four lanes of a pixel.
    static __device__ float pixel_sum(float x) {
        for (int offset = 1; offset < 4; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
        return x;
    }

    // Strips behind the image's last row are left out.  Which ones is not known to the compiler: it would unpack all
    // strips at once otherwise, for which the registers have no room.
    __device__ void normalise() {
        const float channels = a_.channels, share = 1 / channels;
        // As exact as a division, whose result is exact for constant pixels.
        const auto mean_of = [&](float sum) {
            const float mean = sum * share;
            return fmaf(fmaf(-mean, channels, sum), share, mean);
        };
#pragma unroll
        for (int j = 0; j < STRIPS; ++j) {
            if (halo_pixel(j) >= existing_) continue;
            float values[4], sum = 0, squares = 0;
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                unpack(x_[j][s], values);
                sum += (values[0] + values[1]) + (values[2] + values[3]);
            }
            const float mean = mean_of(pixel_sum(sum));
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                unpack(x_[j][s], values);
                float part = 0;
                for (float value : values) part += (value - mean) * (value - mean);
                squares += first_channel(s) < a_.channels ? part : 0;
            }
            const float offset = a_.subtract_mean ? mean : 0;
            const float scale = rsqrtf(mean_of(pixel_sum(squares)) + a_.epsilon);
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const auto gamma = load_pack<4>(norm_ + first_channel(s));
                const auto beta = load_pack<4>(norm_ + STEPS * 16 + first_channel(s));
                unpack(x_[j][s], values);
                for (int n = 0; n < 4; ++n) {
                    values[n] = (values[n] - offset) * scale * to_float(gamma.values[n]) + to_float(beta.values[n]);
                }
                x_[j][s] = {as_word(__floats2half2_rn(values[0], values[1])),
                            as_word(__floats2half2_rn(values[2], values[3]))};
            }
#pragma unroll
            for (int g = 0; g < kGranules; ++g) exchange(x_[j][2 * g], x_[j][2 * g + 1]);
            if constexpr (kHalf) exchange(x_[j][STEPS - 1]);
        }
    }

    // Starts to copy the weights of a chunk, rows of channels, and what make_diagonals takes.
    template <typename Units>
    __device__ void copy(int chunk, const Units& units) {
        constexpr int kPacks = kUnit * 2 * STEPS;        // of a unit's weights
        constexpr int kPieces = (kPacks + 31) / 32 + 1;  // of 32 packs; the last one has all else
        auto* const weights = reinterpret_cast<__half*>(weights_ + copied_ % 2 * kWeightBytes);
        auto* const raw = reinterpret_cast<__half*>(raw_ + copied_ % 2 * kRawBytes);
#pragma unroll 1
        for (int i = warp(); i < kUnits * kPieces; i += WARPS) {
            const int unit = i / kPieces, piece = i % kPieces, output = units(chunk, unit);
            if (piece < kPieces - 1) {
                const int pack = piece * 32 + lane(), row = pack / (2 * STEPS), channel = pack % (2 * STEPS) * 8;
                if (kPacks % 32 == 0 || pack < kPacks) {
                    copy_or_clear(weights + (unit * kUnit + row) * kWeightRow + channel,
                                  a_.weight + int64_t{output + row} * a_.channels + channel,
                                  output >= 0 && channel < a_.channels);
                }
            } else if (lane() < 11) {
                const __half* const from = lane() < 9    ? a_.depthwise_weight + output * 9 + lane() * 8
                                           : lane() == 9 ? a_.bias + output
                                                         : a_.depthwise_bias + output;
                copy_or_clear(raw + unit * kRawUnit + lane() * 8, from, output >= 0);
            }
        }
        __pipeline_commit();
        ++copied_;
    }

    // For each output of a chunk and each diagonal, see diagonal_: the words of three rows of weights, and the bias.
    __device__ void make_diagonals(int buffer) {
        const auto* const raw = reinterpret_cast<const __half*>(raw_ + buffer * kRawBytes);
        auto* const diagonals = reinterpret_cast<uint4*>(diagonals_ + buffer * kDiagonalBytes);
#pragma unroll 1
        for (int i = threadIdx.x; i < kConvolvedChunk * kDiagonals; i += kThreads) {
            const int output = i / kDiagonals, diagonal = i % kDiagonals;
            const __half* const unit = raw + output / kUnit * kRawUnit;
            const __half* const weights = unit + output % kUnit * 9;
            uint32_t words[3];
            for (int row = 0; row < 3; ++row) {
                const __half low = diagonal >= 2 ? weights[row * 3 + diagonal - 2] : __half();
                const __half high = diagonal >= 1 && diagonal <= 3 ? weights[row * 3 + diagonal - 1] : __half();
                words[row] = as_word(__halves2half2(low, high));
            }
            diagonals[i] = {words[0], words[1], words[2], __float_as_uint(to_float(unit[80 + output % kUnit]))};
        }
    }

    // A chunk's outputs of the warp's pixels.
    __device__ void multiply(int buffer) {
        const auto* const raw = reinterpret_cast<const __half*>(raw_ + buffer * kRawBytes);
        // Matrices: 8 rows of weights, the next 8, both with the next 8 channels.
        const __half* weights = reinterpret_cast<const __half*>(weights_ + buffer * kWeightBytes) +
                                lane() % 16 * kWeightRow + lane() / 16 * 8;
        char* planes = planes_ + buffer * kPlaneBytes;
        const bool all_inside = inside_ == (1ull << 2 * STRIPS) - 1;
#pragma unroll 1
        for (int unit = 0; unit < kUnits; unit += 2) {  // 16 outputs: rows `group` of two units
            const float upper_bias = to_float(raw[unit * kRawUnit + 72 + group()]);
            const float lower_bias = to_float(raw[(unit + 1) * kRawUnit + 72 + group()]);
            float c[STRIPS][4];
            for (auto& strip : c) {
                strip[0] = strip[1] = upper_bias;
                strip[2] = strip[3] = lower_bias;
            }
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                uint32_t words[4];
                load_matrices(words, weights + s * 16);
                for (int j = 0; j < STRIPS; ++j) multiply_add(c[j], words, x_[j][s].x, x_[j][s].y);
            }
#pragma unroll
            for (int j = 0; j < STRIPS; ++j) {
                uint32_t words[] = {as_word(__floats2half2_rn(c[j][0], c[j][1])),
                                    as_word(__floats2half2_rn(c[j][2], c[j][3]))};
                if (!all_inside) {
                    const uint32_t mask =
                        (inside_ >> 2 * j & 1 ? 0xffffu : 0) | (inside_ >> 2 * j & 2 ? 0xffff0000u : 0);
                    words[0] &= mask;
                    words[1] &= mask;
                }
                *reinterpret_cast<uint32_t*>(planes + target_[j]) = words[0];
                *reinterpret_cast<uint32_t*>(planes + target_[j] + kUnit * kPlane * 2) = words[1];
            }
            weights += 2 * kUnit * kWeightRow;
            planes += 2 * kUnit * kPlane * 2;
        }
    }

    template <typename Epilogue>
    __device__ void take(int chunk, int buffer, Epilogue& epilogue) {
        constexpr int kPairsAcross = COLUMNS / 16;
        const int cells = warp() % kCellPairs, task = warp() / kCellPairs;
        const int row = cells / kPairsAcross * 8, column = cells % kPairsAcross * 16;
        const auto* const planes = reinterpret_cast<const __half*>(planes_ + buffer * kPlaneBytes);
        const auto* const diagonals = reinterpret_cast<const uint4*>(diagonals_ + buffer * kDiagonalBytes) + diagonal_;
        // For each of three rows of weights, 8 rows of columns 0 … 7 and 8 … 15 of either cell's 16: the first cell's
        // second matrix is the second cell's first one.
        const __half* const matrices = planes + (row + lane() % 8) * kStride + column + (lane() / 8 + 1) / 2 * 8;
        const auto convolve = [&](int n, float (&sums)[4]) {
            const uint4 diagonal = diagonals[n * kDiagonals];
            for (float& sum : sums) sum = __uint_as_float(diagonal.w);
            const uint32_t words[] = {diagonal.x, diagonal.y, diagonal.z};
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                uint32_t pixels[4];
                load_matrices(pixels, matrices + n * kPlane + i * kStride);
                multiply_add(sums, pixels, words[i] & upper_mask_, words[i] & ~upper_mask_);
            }
        };
        epilogue.take(chunk, task, row + group(), column + 2 * pair(), convolve);
    }

    const NormConvDepthwiseArguments& a_;
    const int pitch_;
    char *const weights_, *const raw_, *const diagonals_, *const planes_;  // two buffers each
    __half* const norm_;                                                   // weight and bias
    uint2 x_[STRIPS][STEPS];  // four channels of pixel `group` of a strip, for each step of the product
    int target_[STRIPS];      // bytes to where pixels 2·pair and 2·pair + 1 of output `group` are stored
    uint32_t inside_;         // two bits for each strip: whether these lie inside of the image
    int existing_;            // pixels of tile and halo above the image's end
    uint32_t upper_mask_;     // of rows 2·pair, 2·pair + 1 of the matrix of weights, rather than these plus 8
    int diagonal_;            // of 5: zeros, (0, w[0]), (w[0], w[1]), (w[1], w[2]), (w[2], 0)
    int copied_ = 0;          // chunks
};

}  // namespace trt_graft
