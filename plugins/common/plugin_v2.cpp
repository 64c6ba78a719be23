// Operators as IPluginV2DynamicExt: TensorRT 8.6.
#include "common/version.h"

#if TRT_GRAFT_PLUGIN_V2

#include <cstring>

#include "common/registry.h"

namespace trt_graft {
namespace {

class PluginV2 final : public nvinfer1::IPluginV2DynamicExt {
  public:
    explicit PluginV2(std::unique_ptr<Op> op) : op_(std::move(op)) {}

    // IPluginV2
    const char* getPluginType() const noexcept override { return op_->name(); }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(op_->outputs().size()); }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    // The attributes' values one after the other, four bytes each.
    size_t getSerializationSize() const noexcept override { return op_->attributes().size() * sizeof(int32_t); }
    void serialize(void* buffer) const noexcept override {
        auto* target = static_cast<char*>(buffer);
        for (const Attribute& attribute : op_->attributes()) {
            std::memcpy(target, attribute.value, sizeof(int32_t));
            target += sizeof(int32_t);
        }
    }

    // IPluginV2Ext
    nvinfer1::DataType getOutputDataType(int32_t index, const nvinfer1::DataType* types,
                                         int32_t) const noexcept override {
        return output_type(*op_, index, types[0]);
    }

    // IPluginV2DynamicExt
    PluginV2* clone() const noexcept override {
        auto* copy = new PluginV2(op_->clone());
        copy->setPluginNamespace(getPluginNamespace());
        return copy;
    }
    nvinfer1::DimsExprs getOutputDimensions(int32_t index, const nvinfer1::DimsExprs* inputs, int32_t,
                                            nvinfer1::IExprBuilder& builder) noexcept override {
        return output_shape(op_->outputs()[index], inputs, builder);
    }
    bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t,
                                   int32_t) noexcept override {
        // The only place where shapes can be refused, which fails the build: once all inputs are known.
        return takes(*op_, position, tensors[position].type, tensors[position].format, tensors[0].type) &&
               (position != op_->inputs() - 1 || accepts(*op_, sizes_of(tensors, op_->inputs())));
    }
    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                         int32_t) noexcept override {}
    size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* inputs, int32_t count,
                            const nvinfer1::PluginTensorDesc* outputs, int32_t made) const noexcept override {
        return workspace_bytes(*op_, sizes_of(inputs, count), sizes_of(outputs, made), inputs[0].type);
    }
    int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                    const void* const* in, void* const* out, void* workspace, cudaStream_t stream) noexcept override {
        const Sizes sizes = sizes_of(inputs, op_->inputs()), made = sizes_of(outputs, getNbOutputs());
        return accepts(*op_, sizes) ? run(*op_, sizes, made, inputs[0].type, in, out, workspace, stream) : 1;
    }

  private:
    std::unique_ptr<Op> op_;
    std::string namespace_ = kNamespace;
};

class CreatorV2 final : public nvinfer1::IPluginCreator {
  public:
    explicit CreatorV2(std::unique_ptr<Op> op) : op_(std::move(op)) {
        for (const Attribute& attribute : op_->attributes())
            fields_.emplace_back(attribute.name, nullptr, attribute.type, 1);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    const char* getPluginName() const noexcept override { return op_->name(); }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    void setPluginNamespace(const char*) noexcept override {}
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    PluginV2* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields) noexcept override {
        auto op = op_->clone();
        return read_attributes(*op, *fields) ? new PluginV2(std::move(op)) : nullptr;
    }
    PluginV2* deserializePlugin(const char*, const void* data, size_t length) noexcept override {
        auto op = op_->clone();
        const auto attributes = op->attributes();
        if (length != attributes.size() * sizeof(int32_t)) {
            complain(*op, "the engine was built with another version of this plugin");
            return nullptr;
        }
        const auto* source = static_cast<const char*>(data);
        for (const Attribute& attribute : attributes) {
            std::memcpy(attribute.value, source, sizeof(int32_t));
            source += sizeof(int32_t);
        }
        return new PluginV2(std::move(op));
    }

  private:
    std::unique_ptr<Op> op_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

std::vector<nvinfer1::IPluginCreator*>& creators() {
    static std::vector<nvinfer1::IPluginCreator*> all;
    return all;
}

}  // namespace

// Runs while the library is being loaded, which is all that `ctypes.CDLL` and `trtexec --staticPlugins` do.
void offer(std::unique_ptr<Op> op) {
    auto* creator = new CreatorV2(std::move(op));  // lives as long as the process, like TensorRT's registry
    getPluginRegistry()->registerCreator(*creator, kNamespace);
    creators().push_back(creator);
}

}  // namespace trt_graft

// IPluginRegistry::loadLibrary and `trtexec --dynamicPlugins` ask for the creators, register them with a builder's or
// runtime's own registry and close the library when that one goes.  The process's registry keeps those of `offer`: the
// library is linked never to be unloaded (nodelete in CMakeLists.txt).
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
    auto& creators = trt_graft::creators();
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

#endif  // TRT_GRAFT_PLUGIN_V2
