// Pieces that most configs spell the same way.
#pragma once

#include "arch/config.h"
#include "arch/model.h"

namespace mlxlm::arch {

/** Base of the rotation where config.json names none. */
constexpr float usual_rope_base = 10000.f;

/** heads, kv_heads, head_dim and rope from the usual keys. */
Attention gqa(const Config& c, float rope_base = usual_rope_base);
/** Rope over `dims` from rope_theta and rope_scaling; where they are absent from rope_parameters, which transformers 5 writes instead.
 *  Reference: mlx_lm/models/rope_utils.py. Throws Error(unsupported) for an unknown rope type. */
Rope rope(const Config& c, int dims, bool traditional = false, float base = usual_rope_base);
/** rope_scaling, or else rope_parameters, or else an empty object. */
Config rope_scaling(const Config& c);
/** int(dims * factor) of a factor in (0, 1], as Python rounds it. */
int part_of(const Config& c, std::string_view factor_key, int dims);
Norm rms(const Config& c, std::string at, std::string_view eps_key = "rms_norm_eps");
Step pre_norm(Norm pre, Op op);
Step sandwich(Norm pre, Op op, Norm post);
/** vocab, width, final norm, context, and the rule that drops rotary_emb.inv_freq. The head is untied: see tie_head(). */
Model decoder(const Config& c, std::string_view eps_key = "rms_norm_eps");
/** tie_word_embeddings; a tied head's stored copy is dropped. */
void tie_head(const Config& c, Model& m, bool fallback);
/** Bounds of what is believed; beyond them a config is broken or hostile. Products of two widths stay below 2^31 * 2^31. */
constexpr int max_layers = 4096, max_hidden = 1 << 20, max_heads = 1 << 14, max_head_dim = 1 << 14;
/** num_hidden_layers, at most max_layers. */
int layer_count(const Config& c);
/** layer_types as one flag a layer, empty if absent: whether it is sliding_attention. Throws for other kinds than that and full_attention.
 */
std::vector<bool> sliding_layers(const Config& c, int layers);
/** The same reader with `defaults` for the keys that are absent (null counts as a value if keep_null). */
Config with_defaults(const Config& c, const json& defaults, bool keep_null = false);
/** Throws Error(unsupported) if hidden_act names another activation than SiLU: the families that call this have no other. */
void silu_only(const Config& c);

}  // namespace mlxlm::arch
