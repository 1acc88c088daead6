// What a Model of the public API is made of.
#pragma once

#include "api/session.h"
#include "mlxlm/mlxlm.h"

namespace mlxlm {

struct Model::Impl {
  Session session;
};

}  // namespace mlxlm
