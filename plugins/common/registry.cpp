#include "common/registry.h"

#include <cstring>

#include "common/transpose.cuh"

namespace trt_graft {
bool read_attributes(Op& op, const nvinfer1::PluginFieldCollection& fields) {
    for (const Attribute& attribute : op.attributes()) {
        const nvinfer1::PluginField* found = nullptr;
        for (int32_t i = 0; i < fields.nbFields; ++i) {
            if (std::strcmp(fields.fields[i].name, attribute.name) == 0) found = &fields.fields[i];
        }
        if (found == nullptr || found->data == nullptr || found->type != attribute.type || found->length != 1) {
            complain(op, std::string("attribute ") + attribute.name + " is missing or of another type");
            return false;
        }
        std::memcpy(attribute.value, found->data, sizeof(int32_t));  // both types have four bytes
    }
    return true;
}

bool takes(const Op& op, int32_t position, nvinfer1::DataType type, nvinfer1::TensorFormat format,
           nvinfer1::DataType first) {
    using Type = nvinfer1::DataType;
    using Format = nvinfer1::TensorFormat;
    if (op.is_int32(position)) return type == Type::kINT32 && format == Format::kLINEAR;
    if (op.is_fp32(position)) return type == Type::kFLOAT && format == Format::kLINEAR;
    if (type != Type::kFLOAT && type != Type::kHALF) return false;
    if (position > 0 && type != first) return false;
    return format == (type == Type::kHALF && op.is_image(position) ? Format::kHWC8 : Format::kLINEAR);
}

nvinfer1::DataType output_type(const Op& op, int32_t output, nvinfer1::DataType first) {
    const int32_t tensor = op.inputs() + output;
    if (op.is_int32(tensor)) return nvinfer1::DataType::kINT32;
    return op.is_fp32(tensor) ? nvinfer1::DataType::kFLOAT : first;
}

nvinfer1::DimsExprs output_shape(const Shape& shape, const nvinfer1::DimsExprs* inputs,
                                 nvinfer1::IExprBuilder& builder) {
    if (shape.like >= 0) return inputs[shape.like];
    nvinfer1::DimsExprs made{};
    for (const Extent& extent : shape.extents) {
        if (extent.input < 0) {
            made.d[made.nbDims++] = builder.constant(extent.times);
            continue;
        }
        const nvinfer1::DimsExprs& input = inputs[extent.input];
        const nvinfer1::IDimensionExpr* size = input.d[extent.axis < 0 ? 0 : extent.axis];
        for (int32_t axis = 1; extent.axis < 0 && axis < input.nbDims - 1; ++axis) {
            size = builder.operation(nvinfer1::DimensionOperation::kPROD, *size, *input.d[axis]);
        }
        if (extent.times != 1) {
            size = builder.operation(nvinfer1::DimensionOperation::kPROD, *size, *builder.constant(extent.times));
        }
        if (extent.over != 1) {
            size = builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *size, *builder.constant(extent.over));
        }
        made.d[made.nbDims++] = size;
    }
    return made;
}

Sizes sizes_of(const nvinfer1::PluginTensorDesc* tensors, int32_t count) {
    std::vector<nvinfer1::Dims> dims;
    for (int32_t i = 0; i < count; ++i) dims.push_back(tensors[i].dims);
    return Sizes(std::move(dims));
}

bool accepts(const Op& op, const Sizes& sizes) {
    const char* reason = op.refuse(sizes);
    if (reason != nullptr) complain(op, reason);
    return reason == nullptr;
}

namespace {

constexpr int64_t kAlignment = 256;  // of what lies in the workspace, in bytes

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Calls visit(tensor, shapes, index) for each image; `tensor` counts inputs, then outputs, as Op::is_image does.
template <typename Visit>
void for_each_image(const Op& op, const Sizes& inputs, const Sizes& outputs, Visit visit) {
    for (int32_t i = 0; i < op.inputs(); ++i) {
        if (op.is_image(i)) visit(i, inputs, i);
    }
    for (int32_t i = 0; i < outputs.count(); ++i) {
        if (op.is_image(op.inputs() + i)) visit(op.inputs() + i, outputs, i);
    }
}

cudaError_t enqueue_transposed(const Op& op, const Sizes& inputs, const Sizes& outputs, const void* const* in,
                               void* const* out, void* workspace, cudaStream_t stream) {
    std::vector<const void*> sources(in, in + op.inputs());
    std::vector<void*> targets(out, out + outputs.count());
    char* free = static_cast<char*>(workspace) + aligned(op.workspace_bytes(inputs, DataType::kFloat));
    cudaError_t error = cudaSuccess;
    for_each_image(op, inputs, outputs, [&](int32_t tensor, const Sizes& sizes, int32_t index) {
        auto* image = reinterpret_cast<float*>(free);
        free += aligned(sizes.product_from(index, 0) * sizeof(float));
        if (tensor >= op.inputs()) {
            targets[index] = image;
            return;
        }
        const cudaError_t launched = launch_transpose(static_cast<const float*>(in[index]), image, sizes(index, 0),
                                                      sizes(index, 1), sizes.product_from(index, 2), stream);
        if (error == cudaSuccess) error = launched;
        sources[index] = image;
    });
    if (error != cudaSuccess) return error;
    error = op.enqueue(inputs, Call{DataType::kFloat, sources.data(), targets.data(), workspace, stream});
    for_each_image(op, inputs, outputs, [&](int32_t tensor, const Sizes& sizes, int32_t index) {
        if (tensor < op.inputs() || error != cudaSuccess) return;
        error = launch_transpose(static_cast<const float*>(targets[index]), static_cast<float*>(out[index]),
                                 sizes(index, 0), sizes.product_from(index, 2), sizes(index, 1), stream);
    });
    return error;
}

}  // namespace

int64_t workspace_bytes(const Op& op, const Sizes& inputs, const Sizes& outputs, nvinfer1::DataType type) {
    if (type == nvinfer1::DataType::kHALF) return op.workspace_bytes(inputs, DataType::kHalf);
    int64_t bytes = op.workspace_bytes(inputs, DataType::kFloat);
    for_each_image(op, inputs, outputs, [&](int32_t, const Sizes& sizes, int32_t index) {
        bytes = aligned(bytes) + sizes.product_from(index, 0) * sizeof(float);
    });
    return bytes;
}

int32_t run(const Op& op, const Sizes& inputs, const Sizes& outputs, nvinfer1::DataType type, const void* const* in,
            void* const* out, void* workspace, cudaStream_t stream) {
    const cudaError_t error = type == nvinfer1::DataType::kHALF
                                  ? op.enqueue(inputs, Call{DataType::kHalf, in, out, workspace, stream})
                                  : enqueue_transposed(op, inputs, outputs, in, out, workspace, stream);
    if (error == cudaSuccess) return 0;
    complain(op, std::string("launch failed: ") + cudaGetErrorString(error));
    return 1;
}

void complain(const Op& op, const std::string& message) {
    nvinfer1::ILogger* logger = getLogger();
    if (logger == nullptr) return;
    const std::string line = std::string(kNamespace) + "::" + op.name() + ": " + message;
    logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
}

}  // namespace trt_graft
