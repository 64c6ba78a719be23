// What both kinds of plugin need of an operator.
#pragma once

#include <string>

#include "common/op.h"

namespace trt_graft {

constexpr const char* kNamespace = "trt_graft";
constexpr const char* kVersion = "1";

// Fills the operator's attributes from a node's; false, with a message in TensorRT's log, if one is missing.
bool read_attributes(Op& op, const nvinfer1::PluginFieldCollection& fields);

// Whether the operator takes `type` and `format` for tensor `position` (inputs, then outputs), given the type of tensor
// 0.
bool takes(const Op& op, int32_t position, nvinfer1::DataType type, nvinfer1::TensorFormat format,
           nvinfer1::DataType first);

// The type of an output, given that of input 0.
nvinfer1::DataType output_type(const Op& op, int32_t output, nvinfer1::DataType first);

nvinfer1::DimsExprs output_shape(const Shape& shape, const nvinfer1::DimsExprs* inputs,
                                 nvinfer1::IExprBuilder& builder);

Sizes sizes_of(const nvinfer1::PluginTensorDesc* tensors, int32_t count);

// Asks the operator whether it takes these shapes; a refusal goes to TensorRT's log.
bool accepts(const Op& op, const Sizes& sizes);

// What `run` needs beside inputs and outputs, whose shapes are given.
int64_t workspace_bytes(const Op& op, const Sizes& inputs, const Sizes& outputs, nvinfer1::DataType type);

// Runs the operator; a CUDA error goes to TensorRT's log.  Returns 0 or 1, as enqueue must.
//
// TensorRT offers no channel-last FP32 to plugins: those images are transposed on the way in and out.
int32_t run(const Op& op, const Sizes& inputs, const Sizes& outputs, nvinfer1::DataType type, const void* const* in,
            void* const* out, void* workspace, cudaStream_t stream);

// Writes an error about an operator to TensorRT's log.
void complain(const Op& op, const std::string& message);

}  // namespace trt_graft
