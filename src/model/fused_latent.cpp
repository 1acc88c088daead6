// Latent attention.
#include "model/fused_program.h"
namespace mlxlm::model::fused {
void Program::latent_attention(const FusedLatent&, const FusedStep&, const std::vector<Sequence>&, const Chunk&, float*) {}
}
