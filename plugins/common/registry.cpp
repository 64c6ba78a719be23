#include "common/registry.h"

#include <cstring>

namespace trt_graft {
bool read_attributes(Op& op, const nvinfer1::PluginFieldCollection& fields) {
    for (const Attribute& attribute : op.attributes()) {
        const nvinfer1::PluginField* found = nullptr;
        for (int32_t i = 0; i < fields.nbFields; ++i) {
            if (std::strcmp(fields.fields[i].name, attribute.name) == 0) found = &fields.fields[i];
        }
        if (found == nullptr || found->data == nullptr || found->type != attribute.type || found->length < 1) {
            complain(op, std::string("attribute ") + attribute.name + " is missing or of another type");
            return false;
        }
        std::memcpy(attribute.value, found->data, sizeof(int32_t));  // both types have four bytes
    }
    return true;
}

bool takes_type(const Op& op, int32_t position, nvinfer1::DataType type, nvinfer1::DataType first) {
    if (position < op.inputs() && op.is_int32(position)) return type == nvinfer1::DataType::kINT32;
    const bool is_float = type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF;
    return is_float && (position == 0 || type == first);
}

nvinfer1::DimsExprs output_shape(const Shape& shape, const nvinfer1::DimsExprs* inputs,
                                 nvinfer1::IExprBuilder& builder) {
    if (shape.like >= 0) return inputs[shape.like];
    nvinfer1::DimsExprs made{};
    for (const Extent& extent : shape.extents) {
        const nvinfer1::IDimensionExpr* size = inputs[extent.input].d[extent.axis];
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

bool accepts(const Op& op, const Sizes& sizes) {
    const char* reason = op.refuse(sizes);
    if (reason != nullptr) complain(op, reason);
    return reason == nullptr;
}

int32_t run(const Op& op, const Sizes& sizes, nvinfer1::DataType type, const void* const* inputs, void* const* outputs,
            void* workspace, cudaStream_t stream) {
    const DataType element = type == nvinfer1::DataType::kHALF ? DataType::kHalf : DataType::kFloat;
    const cudaError_t error = op.enqueue(sizes, Call{element, inputs, outputs, workspace, stream});
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
