// Operators as IPluginV3: TensorRT 10, 11 and TensorRT-RTX.
#include "common/version.h"

#if !TRT_GRAFT_PLUGIN_V2

#include "common/registry.h"

namespace trt_graft {
namespace {

std::vector<nvinfer1::PluginField> fields_of(Op& op, bool with_values) {
    std::vector<nvinfer1::PluginField> fields;
    for (const Attribute& attribute : op.attributes()) {
        fields.emplace_back(attribute.name, with_values ? attribute.value : nullptr, attribute.type, 1);
    }
    return fields;
}

class PluginV3 final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit PluginV3(std::unique_ptr<Op> op) : op_(std::move(op)) {}

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    nvinfer1::IPluginV3* clone() noexcept override { return new PluginV3(op_->clone()); }

    // IPluginV3OneCore
    const char* getPluginName() const noexcept override { return op_->name(); }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(op_->outputs().size()); }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t count, const nvinfer1::DataType* inputs,
                               int32_t) const noexcept override {
        for (int32_t i = 0; i < count; ++i) outputs[i] = output_type(*op_, i, inputs[0]);
        return 0;
    }
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t, const nvinfer1::DimsExprs*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t count,
                            nvinfer1::IExprBuilder& builder) noexcept override {
        const auto shapes = op_->outputs();
        for (int32_t i = 0; i < count; ++i) outputs[i] = output_shape(shapes[i], inputs, builder);
        return 0;
    }
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t,
                                   int32_t) noexcept override {
        const auto& tensor = tensors[position].desc;
        return takes(*op_, position, tensor.type, tensor.format, tensors[0].desc.type);
    }
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                            const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {
        std::vector<nvinfer1::Dims> dims;
        for (int32_t i = 0; i < count; ++i) dims.push_back(inputs[i].desc.dims);
        return accepts(*op_, Sizes(std::move(dims))) ? 0 : 1;
    }
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                            const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t made) const noexcept override {
        const auto largest = [](const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t tensor_count) {
            std::vector<nvinfer1::Dims> dims;
            for (int32_t i = 0; i < tensor_count; ++i) dims.push_back(tensors[i].max);
            return Sizes(std::move(dims));
        };
        return workspace_bytes(*op_, largest(inputs, count), largest(outputs, made), inputs[0].desc.type);
    }

    // IPluginV3OneRuntime
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t count, const nvinfer1::PluginTensorDesc*,
                          int32_t) noexcept override {
        return accepts(*op_, sizes_of(inputs, count)) ? 0 : 1;
    }
    int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                    const void* const* in, void* const* out, void* workspace, cudaStream_t stream) noexcept override {
        const Sizes sizes = sizes_of(inputs, op_->inputs()), made = sizes_of(outputs, getNbOutputs());
        return run(*op_, sizes, made, inputs[0].type, in, out, workspace, stream);
    }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        fields_ = fields_of(*op_, true);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

  private:
    std::unique_ptr<Op> op_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

class CreatorV3 final : public nvinfer1::IPluginCreatorV3One {
  public:
    explicit CreatorV3(std::unique_ptr<Op> op) : op_(std::move(op)), fields_(fields_of(*op_, false)) {
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    const char* getPluginName() const noexcept override { return op_->name(); }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        auto op = op_->clone();
        return read_attributes(*op, *fields) ? new PluginV3(std::move(op)) : nullptr;
    }

  private:
    std::unique_ptr<Op> op_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

std::vector<nvinfer1::IPluginCreatorInterface*>& creators() {
    static std::vector<nvinfer1::IPluginCreatorInterface*> all;
    return all;
}

}  // namespace

// Runs while the library is being loaded, which is all that `ctypes.CDLL` and `trtexec --staticPlugins` do.
void offer(std::unique_ptr<Op> op) {
    auto* creator = new CreatorV3(std::move(op));  // lives as long as the process, like TensorRT's registry
    getPluginRegistry()->registerCreator(*creator, kNamespace);
    creators().push_back(creator);
}

}  // namespace trt_graft

// IPluginRegistry::loadLibrary and `trtexec --dynamicPlugins` ask for the creators, register them with a builder's or
// runtime's own registry and close the library when that one goes.  The process's registry keeps those of `offer`: the
// library is linked never to be unloaded (nodelete in CMakeLists.txt).
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
    auto& creators = trt_graft::creators();
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

#endif  // !TRT_GRAFT_PLUGIN_V2
