// Rewrites of checkpoints: what each verb does, that a second time changes nothing, and names made to be slow or contradictory.
#include <chrono>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "arch/registry.h"
#include "unit/weights_support.h"
#include "weights/weights.h"

namespace mlxlm::weights {
namespace {

using arch::Rule;
using tests::expect_error;

std::vector<std::string> names(const Tensors& tensors) {
  std::vector<std::string> list;
  for (const auto& [name, value] : tensors) list.push_back(name);
  return list;
}

using Names = std::vector<std::string>;

mx::array number(float value) {
  return mx::array(value);
}

bool same(const mx::array& a, const mx::array& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() && mx::array_equal(a, b).item<bool>();
}

arch::Model with(std::vector<Rule> rules) {
  arch::Model model;
  model.rules = std::move(rules);
  return model;
}

/** Applies twice; the second time must change nothing. */
Tensors applied(Tensors tensors, const arch::Model& model) {
  apply_rules(tensors, model);
  Tensors again = tensors;
  apply_rules(again, model);
  EXPECT_EQ(names(again), names(tensors));
  for (const auto& [name, value] : tensors) EXPECT_TRUE(again.contains(name) && same(again.at(name), value)) << name;
  return tensors;
}
Tensors applied(Tensors tensors, const Rule& rule) {
  return applied(std::move(tensors), with({rule}));
}

TEST(WeightRules, Drop) {
  const auto got = applied({{"mtp.a", number(1)}, {"xmtp.a", number(2)}, {"model.rotary_emb.inv_freq", number(3)}},
                           with({{Rule::drop, "mtp.*"}, {Rule::drop, "*rotary_emb.inv_freq"}}));
  EXPECT_EQ(names(got), (Names{"xmtp.a"}));
}

TEST(WeightRules, Rename) {
  const auto got =
      applied({{"a.1.w", number(1)}, {"a.1.2.w", number(2)}, {"b.w", number(3)}, {"a..w", number(4)}}, {Rule::rename, "a.*.w", "c.*.v"});
  EXPECT_EQ(names(got), (Names{"b.w", "c..v", "c.1.2.v", "c.1.v"}));
  EXPECT_EQ(got.at("c.1.2.v").item<float>(), 2.f);
}

TEST(WeightRules, RenameTakesAsLittleAsItCan) {
  const auto got = applied({{"x.a.m.b.m.c", number(1)}}, {Rule::rename, "x.*.m.*", "first=*,last=*"});
  EXPECT_EQ(names(got), (Names{"first=a,last=b.m.c"}));
}

TEST(WeightRules, RenameOntoAnother) {
  Tensors tensors = {{"a.w", number(1)}, {"b.w", number(2)}};
  expect_error(Code::bad_weights, {"b.w: stands for b.w, which is there too"},
               [&] { apply_rules(tensors, with({{Rule::rename, "a.*", "b.*"}})); });
}

TEST(WeightRules, StripPrefix) {
  const auto got = applied({{"model.a", number(1)}, {"b.model.c", number(2)}}, {Rule::strip_prefix, "model."});
  EXPECT_EQ(names(got), (Names{"a", "b.model.c"}));
  Tensors both = {{"model.a", number(1)}, {"a", number(2)}};
  expect_error(Code::bad_weights, {"model.a: stands for a, which is there too"},
               [&] { apply_rules(both, with({{Rule::strip_prefix, "model."}})); });
}

const Rule stack_experts{Rule::stack, "*.experts.{e}.*", "*.switch_mlp.*"};

TEST(WeightRules, StackInTheOrderOfNumbers) {
  Tensors tensors = {{"other", number(0)}, {"l.experts.x.w", number(-1)}};
  for (int e = 0; e < 12; ++e) {
    tensors.emplace("l.experts." + std::to_string(e) + ".up.weight", mx::array({float(e), float(e)}));
    tensors.emplace("l.experts." + std::to_string(e) + ".up.scales", mx::array(float(-e)));
  }
  const auto got = applied(tensors, stack_experts);
  EXPECT_EQ(names(got), (Names{"l.experts.x.w", "l.switch_mlp.up.scales", "l.switch_mlp.up.weight", "other"}));
  EXPECT_TRUE(same(got.at("l.switch_mlp.up.scales"), mx::negative(mx::astype(mx::arange(12), mx::float32))));
  EXPECT_EQ(got.at("l.switch_mlp.up.weight").shape(), (mx::Shape{12, 2}));
}

TEST(WeightRules, StackGapsAndContradictions) {
  const auto refuse = [](Tensors tensors, const std::string& message) {
    expect_error(Code::bad_weights, {message}, [&] { apply_rules(tensors, with({stack_experts})); });
  };
  refuse({{"l.experts.0.w", number(0)}, {"l.experts.2.w", number(2)}}, "l.switch_mlp.w: expert 1 is missing before l.experts.2.w");
  refuse({{"l.experts.1.w", number(0)}}, "expert 0 is missing");
  refuse({{"l.experts.999999999.w", number(0)}}, "expert 0 is missing");
  refuse({{"l.experts.0.w", number(0)}, {"l.experts.00.w", number(0)}}, "l.experts.00.w: is expert 0 as is l.experts.0.w");
  refuse({{"l.experts.0.w", number(0)}, {"l.experts.1.w", mx::zeros({2})}}, "l.experts.1.w: has another shape or dtype than expert 0");
  refuse({{"l.experts.0.w", number(0)}, {"l.experts.1.w", mx::array(1)}}, "has another shape or dtype");
  refuse({{"l.experts.0.w", number(0)}, {"l.switch_mlp.w", number(1)}}, "l.switch_mlp.w: stands beside single experts");
  // More digits than an int has are no index.
  EXPECT_EQ(names(applied({{"l.experts.99999999999.w", number(0)}}, stack_experts)), (Names{"l.experts.99999999999.w"}));
}

TEST(WeightRules, Conv) {
  const Rule rule{Rule::conv_ncl_to_nlc, "*.conv1d.weight"};
  const auto stored = mx::reshape(mx::arange(12), {3, 1, 4});
  const auto got = applied({{"m.conv1d.weight", stored},
                            {"m.conv1d.bias", stored},
                            {"n.conv1d.weight", mx::zeros({3, 1, 1})},
                            {"o.conv1d.weight", mx::zeros({3, 4, 1})},
                            {"p.conv1d.weight", mx::zeros({3, 2, 4})},
                            {"q.conv1d.weight", mx::zeros({3})}},
                           rule);
  EXPECT_TRUE(same(got.at("m.conv1d.weight"), mx::reshape(mx::arange(12), {3, 4, 1})));
  EXPECT_EQ(got.at("m.conv1d.bias").shape(), (mx::Shape{3, 1, 4}));
  EXPECT_EQ(got.at("o.conv1d.weight").shape(), (mx::Shape{3, 4, 1}));
  EXPECT_EQ(got.at("p.conv1d.weight").shape(), (mx::Shape{3, 2, 4})) << "not depthwise: left as it is, for the check to name";
}

TEST(WeightRules, DequantBlocks) {
  const Rule rule{Rule::dequant_blocks, "*.weight"};
  const auto packed = mx::to_fp8(mx::full({130, 256}, 2.f));  // the second row of blocks is padded
  const auto scales = mx::array({1.f, 2.f, 3.f, 4.f}, {2, 2});
  const auto got =
      applied({{"a.weight", packed}, {"a.weight_scale_inv", scales}, {"b.weight", packed}, {"c.bias_scale_inv", scales}}, rule);
  EXPECT_EQ(names(got), (Names{"a.weight", "b.weight", "c.bias_scale_inv"}));
  const auto& w = got.at("a.weight");
  EXPECT_EQ(w.dtype(), mx::bfloat16);
  EXPECT_EQ(w.shape(), (mx::Shape{130, 256}));
  const auto at = [&](int row, int column) {
    return mx::astype(mx::slice(w, {row, column}, {row + 1, column + 1}), mx::float32).item<float>();
  };
  EXPECT_EQ(at(0, 0), 2.f);
  EXPECT_EQ(at(127, 128), 4.f);
  EXPECT_EQ(at(128, 127), 6.f);
  EXPECT_EQ(at(129, 255), 8.f);
  EXPECT_EQ(got.at("b.weight").dtype(), mx::uint8) << "no scales: left, for the check to name";
}

TEST(WeightRules, DequantRefuses) {
  const auto refuse = [](const mx::array& packed, const mx::array& scales, const std::string& message) {
    Tensors tensors = {{"a.weight", packed}, {"a.weight_scale_inv", scales}};
    expect_error(Code::bad_weights, {"a.weight: ", message}, [&] { apply_rules(tensors, with({{Rule::dequant_blocks, "*.weight"}})); });
  };
  const auto u8 = [](mx::Shape shape) { return mx::zeros(shape, mx::uint8); };
  refuse(u8({128, 128}), mx::zeros({1, 2}), "do not fit 128x128 blocks");
  refuse(u8({128, 129}), mx::zeros({1, 1}), "do not fit 128x128 blocks");
  refuse(u8({128}), mx::zeros({1, 1}), "other than two axes");
  refuse(u8({128, 128}), mx::zeros({1}), "other than two axes");
  refuse(u8({}), mx::zeros({}), "other than two axes");
  refuse(u8({0, INT32_MAX}), mx::zeros({1, 1}), "other than two axes");
  refuse(u8({128, 128}), mx::zeros({1, 1}, mx::uint8), "no floats");
  refuse(mx::zeros({128, 128}, mx::bfloat16), mx::zeros({1, 1}), "is not fp8");
}

arch::Model mla_model(int layers = 1) {
  arch::Model model = with({{Rule::absorb_mla, "*.kv_b_proj.*"}});
  const arch::Mla mla{.heads = 2, .kv_lora = 32, .nope_dim = 32, .rope_dim = 8, .v_dim = 64};
  for (int i = 0; i < layers; ++i) model.layers.push_back({arch::Step{.ops = {mla}}});
  return model;
}

const std::string attention = "model.layers.0.self_attn.";

TEST(WeightRules, AbsorbMla) {
  const auto w = mx::reshape(mx::astype(mx::arange(2 * 96 * 32), mx::float32), {192, 32});
  const auto got = applied({{attention + "kv_b_proj.weight", w}, {"model.layers.7.self_attn.kv_b_proj.weight", w}}, mla_model());
  EXPECT_EQ(names(got),
            (Names{attention + "embed_q.weight", attention + "unembed_out.weight", "model.layers.7.self_attn.kv_b_proj.weight"}));
  const auto heads = mx::reshape(w, {2, 96, 32});
  EXPECT_TRUE(same(got.at(attention + "embed_q.weight"), mx::swapaxes(mx::slice(heads, {0, 0, 0}, {2, 32, 32}), 1, 2)));
  EXPECT_TRUE(same(got.at(attention + "unembed_out.weight"), mx::slice(heads, {0, 32, 0}, {2, 96, 32})));
}

TEST(WeightRules, AbsorbQuantizedMla) {
  const auto w = mx::reshape(mx::sin(mx::arange(192 * 32)), {192, 32});
  const auto parts = mx::quantize(w, 32, 8);
  const std::string from = attention + "kv_b_proj";
  const auto got = applied({{from + ".weight", parts[0]}, {from + ".scales", parts[1]}, {from + ".biases", parts[2]}}, mla_model());
  EXPECT_EQ(got.size(), 6u);
  EXPECT_EQ(got.at(attention + "embed_q.weight").dtype(), mx::uint32);
  const auto v = mx::dequantize(got.at(attention + "unembed_out.weight"), got.at(attention + "unembed_out.scales"),
                                got.at(attention + "unembed_out.biases"), 32, 8);
  EXPECT_TRUE(mx::allclose(v, mx::slice(mx::reshape(w, {2, 96, 32}), {0, 32, 0}, {2, 96, 32}), 0, 0.02).item<bool>());
}

TEST(WeightRules, AbsorbRefuses) {
  const auto refuse = [](Tensors leaves, const std::string& message) {
    Tensors tensors;
    for (const auto& [leaf, value] : leaves) tensors.emplace(attention + "kv_b_proj." + leaf, value);
    expect_error(Code::bad_weights, {message}, [&] { apply_rules(tensors, mla_model()); });
  };
  const auto codes = [](int columns) { return mx::zeros({192, columns}, mx::uint32); };
  refuse({{"weight", mx::zeros({191, 32})}}, "kv_b_proj.weight: wanted 192 rows of 32");
  refuse({{"weight", mx::zeros({192, 31})}}, "wanted 192 rows of 32");
  refuse({{"weight", mx::zeros({})}}, "wanted 192 rows of 32");
  refuse({{"weight", codes(8)}, {"scales", mx::zeros({192, 1})}}, "without matching scales and biases");
  refuse({{"weight", codes(8)}, {"scales", mx::zeros({192, 0})}, {"biases", mx::zeros({192, 1})}}, "without matching scales and biases");
  refuse({{"weight", codes(0)}, {"scales", mx::zeros({192, 1})}, {"biases", mx::zeros({192, 1})}}, "do not fit its shape");
  refuse({{"weight", codes(800)}, {"scales", mx::zeros({192, 1})}, {"biases", mx::zeros({192, 1})}}, "do not fit its shape");
  refuse({{"weight", codes(8)}, {"scales", mx::zeros({192, 64})}, {"biases", mx::zeros({192, 64})}}, "do not fit its shape");
  refuse({{"weight", codes(8)}, {"scales", mx::zeros({192, 1})}, {"biases", mx::zeros({1, 1})}}, "rule for *.kv_b_proj.*: ");
  refuse({{"weight", mx::zeros({192, 8})}, {"scales", mx::zeros({192, 1})}, {"biases", mx::zeros({192, 1})}}, "rule for *.kv_b_proj.*: ");
}

TEST(WeightRules, AddOneToPublishedNorms) {
  const Rule add{Rule::add_one, "*.norm.weight", "*.experts.{e}.w"};
  const auto stack = with({add, stack_experts});
  const auto norm = mx::array({0.5f, -1.f}), half = mx::astype(norm, mx::bfloat16);
  const auto got = applied({{"a.norm.weight", norm}, {"b.norm.weight", half}, {"norm.weight", norm}, {"a.experts.0.w", number(3)}}, stack);
  EXPECT_TRUE(same(got.at("a.norm.weight"), mx::array({1.5f, 0.f})));
  EXPECT_TRUE(same(got.at("b.norm.weight"), mx::astype(mx::array({1.5f, 0.f}), mx::bfloat16)));
  EXPECT_TRUE(same(got.at("norm.weight"), norm));
  EXPECT_TRUE(same(applied({{"a.norm.weight", norm}}, stack).at("a.norm.weight"), norm));
  // By a convolution that is still in the other order of axes.
  const auto conv = with({{Rule::add_one, "*.norm.weight", "*conv1d.weight"}, {Rule::conv_ncl_to_nlc, "*conv1d.weight"}});
  EXPECT_TRUE(same(applied({{"a.norm.weight", norm}, {"a.conv1d.weight", mx::zeros({2, 1, 4})}}, conv).at("a.norm.weight"),
                   mx::array({1.5f, 0.f})));
  EXPECT_TRUE(same(applied({{"a.norm.weight", norm}, {"a.conv1d.weight", mx::zeros({2, 4, 1})}}, conv).at("a.norm.weight"), norm));
}

TEST(WeightRules, MultiplyPublishedWeights) {
  const char* sign = "*conv1d.weight";
  const auto w = mx::reshape(mx::arange(6, mx::float32), {3, 2}), published = mx::zeros({2, 1, 4}), converted = mx::zeros({2, 4, 1});
  const Rule to_nlc{Rule::conv_ncl_to_nlc, sign};
  const auto all = with({{Rule::multiply, "*.w", sign, {{2.f}}}, to_nlc});
  EXPECT_TRUE(same(applied({{"a.w", w}, {"a.conv1d.weight", published}}, all).at("a.w"), w * mx::array(2.f)));
  EXPECT_TRUE(same(applied({{"a.w", w}, {"a.conv1d.weight", converted}}, all).at("a.w"), w));
  const auto half = mx::astype(w, mx::bfloat16);
  EXPECT_TRUE(same(applied({{"a.w", half}, {"a.conv1d.weight", published}}, all).at("a.w"), mx::astype(w * mx::array(2.f), mx::bfloat16)));
  const auto by_row = with({{Rule::multiply, "*.w", sign, {{2.f, 1}, {-1.f, 2}}}, to_nlc});
  EXPECT_TRUE(same(applied({{"a.w", w}, {"a.conv1d.weight", published}}, by_row).at("a.w"),
                   mx::reshape(mx::array({0.f, 2.f, -2.f, -3.f, -4.f, -5.f}), {3, 2})));
  for (const auto& bad : {mx::zeros({4, 2}), mx::zeros({})}) {
    Tensors tensors = {{"a.w", bad}, {"a.conv1d.weight", published}};
    expect_error(Code::bad_weights, {"a.w: wanted 3 rows"}, [&] { apply_rules(tensors, by_row); });
  }
}

/** The published multipliers of Falcon-H1, with those of keys and values, which mlx_lm leaves out. */
TEST(WeightRules, FalconMultipliers) {
  const auto model = arch::build(arch::Config({{"model_type", "falcon_h1"},
                                               {"hidden_size", 8},
                                               {"intermediate_size", 8},
                                               {"num_hidden_layers", 1},
                                               {"num_attention_heads", 1},
                                               {"head_dim", 4},
                                               {"mamba_n_heads", 1},
                                               {"mamba_d_head", 2},
                                               {"mamba_d_state", 1},
                                               {"rms_norm_eps", 1e-5},
                                               {"vocab_size", 2},
                                               {"attention_in_multiplier", 2.0},
                                               {"key_multiplier", 0.25},
                                               {"ssm_in_multiplier", 3.0},
                                               {"ssm_multipliers", {1, 2, 4, 8, 16}}}));
  const std::string at = "model.layers.0.";
  const auto ones = mx::ones({1, 2});
  const auto got = applied({{at + "self_attn.q_proj.weight", ones},
                            {at + "self_attn.k_proj.weight", ones},
                            {at + "self_attn.v_proj.weight", ones},
                            {at + "mamba.in_proj.weight", mx::ones({7, 1})},
                            {at + "mamba.conv1d.weight", mx::zeros({4, 1, 4})}},
                           model);
  EXPECT_TRUE(same(got.at(at + "self_attn.q_proj.weight"), ones * mx::array(2.f)));
  EXPECT_TRUE(same(got.at(at + "self_attn.k_proj.weight"), ones * mx::array(0.5f)));
  EXPECT_TRUE(same(got.at(at + "self_attn.v_proj.weight"), ones * mx::array(2.f)));
  EXPECT_TRUE(same(got.at(at + "mamba.in_proj.weight"), mx::reshape(mx::array({3.f, 3.f, 6.f, 6.f, 12.f, 24.f, 48.f}), {7, 1})));
  EXPECT_EQ(got.at(at + "mamba.conv1d.weight").shape(), (mx::Shape{4, 4, 1}));
}

TEST(WeightRules, SwapAxes) {
  const Rule swap{Rule::swap_axes, "*.experts.down_proj", "*.experts.down_proj.weight"};
  const auto w = mx::reshape(mx::arange(12), {2, 2, 3});
  const auto got = applied({{"a.experts.down_proj", w}, {"a.down_proj", number(1)}}, swap);
  EXPECT_EQ(names(got), (Names{"a.down_proj", "a.experts.down_proj.weight"}));
  EXPECT_TRUE(same(got.at("a.experts.down_proj.weight"), mx::swapaxes(w, 1, 2)));
  for (const auto& bad : {mx::zeros({2, 3}), mx::zeros({})}) {
    Tensors tensors = {{"a.experts.down_proj", bad}};
    expect_error(Code::bad_weights, {"wanted three axes"}, [&] { apply_rules(tensors, with({swap})); });
  }
}

TEST(WeightRules, SplitGateUp) {
  const Rule split{Rule::split_gate_up, "*.experts.gate_up_proj", "*.switch_mlp.{part}.weight"};
  const auto both = mx::reshape(mx::arange(24), {2, 4, 3});
  const auto got = applied({{"a.experts.gate_up_proj", both}, {"a.experts.down_proj", number(1)}}, split);
  EXPECT_EQ(names(got), (Names{"a.experts.down_proj", "a.switch_mlp.gate_proj.weight", "a.switch_mlp.up_proj.weight"}));
  EXPECT_TRUE(same(got.at("a.switch_mlp.gate_proj.weight"), mx::slice(both, {0, 0, 0}, {2, 2, 3})));
  EXPECT_TRUE(same(got.at("a.switch_mlp.up_proj.weight"), mx::slice(both, {0, 2, 0}, {2, 4, 3})));
  for (const auto& bad : {mx::zeros({2, 3, 3}), mx::zeros({4, 3}), mx::zeros({})}) {
    Tensors tensors = {{"a.experts.gate_up_proj", bad}};
    expect_error(Code::bad_weights, {"wanted three axes, the second even"}, [&] { apply_rules(tensors, with({split})); });
  }
  Tensors twice = {{"a.experts.gate_up_proj", both}, {"a.switch_mlp.up_proj.weight", number(1)}};
  expect_error(Code::bad_weights, {"stands beside its parts"}, [&] { apply_rules(twice, with({split})); });
}

TEST(WeightRules, HostileNamesAreFast) {
  constexpr int length = 100'000;
  Tensors tensors;
  for (const std::string piece : {"a", "0", ".", ".experts", ".experts.", ".experts.1", ".layers.0", ".mlp.experts.0", "*", "{e}"}) {
    std::string name;
    while (name.size() < length) name += piece;
    tensors.emplace(name, number(0));
    tensors.emplace(name + ".kv_b_proj.weight", number(0));
    tensors.emplace(name + ".weight_scale_inv", number(0));
  }
  auto model = mla_model(0);
  for (auto rule : {Rule{Rule::drop, "*a*b*c*d*"}, Rule{Rule::rename, "*.experts.*.experts.*!", "*1*2*3"},
                    Rule{Rule::stack, "*.experts.{e}.*!", "*.*"}, Rule{Rule::stack, "*{e}*{e}*{e}!", "***"},
                    Rule{Rule::add_one, "*", "*.experts.*.experts.*!"}, Rule{Rule::split_gate_up, "*.experts.*.experts.*!", "*.*.*{part}"},
                    Rule{Rule::conv_ncl_to_nlc, "*0*0*0*1"}, Rule{Rule::dequant_blocks, "*.weight"}}) {
    model.rules.push_back(rule);
  }
  const auto start = std::chrono::steady_clock::now();
  const auto before = names(tensors);
  EXPECT_EQ(names(applied(tensors, model)), before);
  EXPECT_LT(std::chrono::steady_clock::now() - start, tests::bound(2));
  // A match of a hostile name is still right.
  const std::string dots(length, '.');
  EXPECT_EQ(names(applied({{dots + "experts.0.w", number(0)}}, stack_experts)), (Names{dots.substr(1) + ".switch_mlp.w"}));
  Tensors gap = {{dots + "experts.1.w", number(0)}};
  expect_error(Code::bad_weights, {"expert 0 is missing"}, [&] { apply_rules(gap, with({stack_experts})); });
}

}  // namespace
}  // namespace mlxlm::weights
