// Attention as an OpenVINO operation: attention.hpp over the tensors of a graph, on the graph's own threads.
//
// Inputs: query [kv_heads * rows, group * key_dim], key [kv_heads * rows, key_dim] and value [kv_heads * rows, value_dim]
// of the step; answers [n, 4] int32 (first, prefix, rows, start of its mask in `sees` or -1); depths [rows] int32; sees [*] bytes; addresses
// [layers * 2] of the memory of keys and values, eight bytes each; capacity [1] int32, rows of a head in it; sinks
// [kv_heads * group] float or empty. Output: [kv_heads * rows, group * value_dim] float.
//
// Addresses, not tensors: binding two tensors a layer takes time, and OpenVINO copies what an If hands to its bodies.
#include <cstring>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>

#include "attention.hpp"

namespace rasd {

static void in_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
    tbb::parallel_for(
        tbb::blocked_range<int64_t>(0, count, 1),
        [=](const tbb::blocked_range<int64_t>& some) {
            for (int64_t i = some.begin(); i < some.end(); i++) body(context, i);
        },
        tbb::simple_partitioner());
}

class RasdAttention : public ov::op::Op {
public:
    OPENVINO_OP("RasdAttention", "rasd_integrations");

    RasdAttention() = default;
    explicit RasdAttention(const ov::OutputVector& inputs) : Op(inputs) { constructor_validate_and_infer_types(); }

    void validate_and_infer_types() override {
        OPENVINO_ASSERT(get_input_size() == 9, "RasdAttention has 9 inputs");
        ov::PartialShape shape{ov::Dimension::dynamic(), m_group * m_value_dim};
        auto query = get_input_partial_shape(0);
        if (query.rank().is_static() && query.size() == 2) shape[0] = query[0];
        set_output_type(0, ov::element::f32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto copy = std::make_shared<RasdAttention>();
        copy->m_kv_heads = m_kv_heads, copy->m_group = m_group;
        copy->m_key_dim = m_key_dim, copy->m_value_dim = m_value_dim;
        copy->m_scale = m_scale, copy->m_softcap = m_softcap, copy->m_window = m_window, copy->m_index = m_index, copy->m_kind = m_kind;
        copy->m_variant = m_variant;
        copy->set_arguments(inputs);
        copy->constructor_validate_and_infer_types();
        return copy;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("kv_heads", m_kv_heads);
        visitor.on_attribute("group", m_group);
        visitor.on_attribute("key_dim", m_key_dim);
        visitor.on_attribute("value_dim", m_value_dim);
        visitor.on_attribute("scale", m_scale);
        visitor.on_attribute("softcap", m_softcap);
        visitor.on_attribute("window", m_window);
        visitor.on_attribute("index", m_index);
        visitor.on_attribute("kind", m_kind);
        visitor.on_attribute("variant", m_variant);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        for (int i : {0, 1, 2}) OPENVINO_ASSERT(inputs[i].get_element_type() == ov::element::f32, "rows are float");
        OPENVINO_ASSERT(int64_t(inputs[6].get_byte_size()) >= 16 * (m_index + 1), "no addresses of this layer");
        char* memory[2];
        std::memcpy(memory, static_cast<const char*>(inputs[6].data()) + 16 * m_index, 16);
        const int32_t* given = inputs[3].data<const int32_t>();
        const int32_t* depths = inputs[4].data<const int32_t>();
        const uint8_t* sees = inputs[5].get_size() ? inputs[5].data<const uint8_t>() : nullptr;
        std::vector<rasd::Answer> answers;
        int64_t rows = 0, capacity = inputs[7].data<const int32_t>()[0];
        for (size_t i = 0; i < inputs[3].get_shape()[0]; i++) {
            const int64_t a[4] = {given[4 * i], given[4 * i + 1], given[4 * i + 2], given[4 * i + 3]};
            OPENVINO_ASSERT(a[0] >= 0 && a[1] >= 0 && a[2] >= 0 && a[0] + a[1] + a[2] <= capacity, "rows outside of the memory");
            OPENVINO_ASSERT(a[3] < 0 || a[3] + a[2] * a[2] <= int64_t(inputs[5].get_size()), "a mask outside of its tensor");
            OPENVINO_ASSERT(rows + a[2] <= int64_t(inputs[4].get_size()), "more rows than depths");
            answers.push_back({a[0], a[1], a[2], depths + rows, a[3] < 0 ? nullptr : sees + a[3]});
            rows += a[2];
        }
        OPENVINO_ASSERT(rows * m_kv_heads == int64_t(inputs[0].get_shape()[0]), "rows of answers and of the step differ");
        outputs[0].set_shape({size_t(m_kv_heads * rows), size_t(m_group * m_value_dim)});
        const float* sinks = inputs[8].get_size() ? inputs[8].data<const float>() : nullptr;
        rasd::Layer layer{int32_t(m_kv_heads), int32_t(m_group), int32_t(m_key_dim), int32_t(m_value_dim),
                          m_scale, m_softcap, int32_t(m_window), sinks, rasd::Kind(m_kind)};
        rasd::Step step{layer,
                        rows,
                        inputs[0].data<const float>(),
                        inputs[1].data<const float>(),
                        inputs[2].data<const float>(),
                        outputs[0].data<float>(),
                        memory[0],
                        memory[1],
                        capacity,
                        answers.data(),
                        int32_t(answers.size())};
        rasd::Attend attend = rasd::attention_of(m_variant.c_str());
        OPENVINO_ASSERT(attend, "this processor cannot run the variant ", m_variant);
        attend(step, in_parallel, tbb::this_task_arena::max_concurrency());
        return true;
    }

private:
    int64_t m_kv_heads = 1, m_group = 1, m_key_dim = 1, m_value_dim = 1, m_window = 0, m_index = 0, m_kind = 0;
    float m_scale = 1, m_softcap = 0;
    std::string m_variant;
};

}  // namespace rasd

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<rasd::RasdAttention>>()}));
