// An operator as TensorRT sees it, free of any TensorRT version: each plugin.cpp describes one, and `plugin_v2.cpp` or
// `plugin_v3.cpp` makes it a plugin of the TensorRT at hand.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "common/launch.h"

namespace trt_graft {

// A size of an output: the size of input `input` along `axis`, times `times`, over `over`.
struct Extent {
    int32_t input;
    int32_t axis;
    int64_t times = 1;
    int64_t over = 1;
};
// A size that is the same whatever the inputs are.
inline Extent constant(int64_t size) { return {-1, 0, size}; }
// How many rows an input has: the product of all its sizes but the last.
inline Extent rows(int32_t input) { return {input, -1}; }

// The shape of an output: that of an input, or extents.
struct Shape {
    int32_t like;  // -1: see extents
    std::vector<Extent> extents;
};
inline Shape like(int32_t input) { return {input, {}}; }
inline Shape of(std::vector<Extent> extents) { return {-1, std::move(extents)}; }

// An attribute of the ONNX node and the field that holds its value: int32_t for kINT32, float for kFLOAT32.
struct Attribute {
    const char* name;
    nvinfer1::PluginFieldType type;
    void* value;
};
inline Attribute attribute(const char* name, int32_t& value) {
    return {name, nvinfer1::PluginFieldType::kINT32, &value};
}
inline Attribute attribute(const char* name, float& value) {
    return {name, nvinfer1::PluginFieldType::kFLOAT32, &value};
}

// Shapes of the inputs, or outputs, of one call.
class Sizes {
  public:
    explicit Sizes(std::vector<nvinfer1::Dims> dims) : dims_(std::move(dims)) {}
    int64_t operator()(int32_t input, int32_t axis) const { return dims_[input].d[axis]; }
    int32_t count() const { return static_cast<int32_t>(dims_.size()); }
    int32_t rank(int32_t input) const { return dims_[input].nbDims; }
    // The product of the sizes from `first` on.
    int64_t product_from(int32_t input, int32_t first) const { return product(input, first, rank(input)); }
    // The product of the sizes of axes first, …, last − 1.
    int64_t product(int32_t input, int32_t first, int32_t last) const {
        int64_t total = 1;
        for (int32_t axis = first; axis < last; ++axis) total *= dims_[input].d[axis];
        return total;
    }

  private:
    std::vector<nvinfer1::Dims> dims_;
};

// One call.  Floating-point inputs and outputs are of one type, that of input 0, but for those of Op::is_fp32.
struct Call {
    DataType type;
    const void* const* in;
    void* const* out;
    void* workspace;
    cudaStream_t stream;
};

class Op {
  public:
    virtual ~Op() = default;
    virtual std::unique_ptr<Op> clone() const = 0;
    virtual const char* name() const = 0;
    virtual std::vector<Attribute> attributes() = 0;
    virtual int32_t inputs() const = 0;
    virtual std::vector<Shape> outputs() const = 0;
    virtual bool is_int32(int32_t /*tensor*/) const { return false; }  // inputs, then outputs
    virtual bool is_fp32(int32_t /*tensor*/) const { return false; }   // whatever input 0 is
    // Whether a tensor (inputs, then outputs) is an image: (B, C, H, W) to TensorRT, channel-last to the kernel, see
    // launch.h.  All others are linear.
    virtual bool is_image(int32_t /*tensor*/) const { return false; }
    // Why these shapes cannot be, or nullptr.  A size of -1 is not known yet.
    virtual const char* refuse(const Sizes&) const { return nullptr; }
    virtual int64_t workspace_bytes(const Sizes&, DataType) const { return 0; }
    virtual cudaError_t enqueue(const Sizes&, const Call&) const = 0;
};

// Copies of `Derived`, for Op::clone.
template <typename Derived>
class ClonableOp : public Op {
  public:
    std::unique_ptr<Op> clone() const override { return std::make_unique<Derived>(static_cast<const Derived&>(*this)); }
};

// Whether two sizes differ for certain.
inline bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

// Registers an operator with TensorRT: one static Registered<MyOp> in each plugin.cpp.
void offer(std::unique_ptr<Op> op);

template <typename T>
struct Registered {
    Registered() { offer(std::make_unique<T>()); }
};

}  // namespace trt_graft
