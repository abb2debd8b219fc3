#include "bindings/objective_params.h"

#include <stdexcept>

namespace py = pybind11;

namespace tokfuse {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("tokfuse._native: ") + what);
}

}  // namespace

ObjectiveParams objective_params(const py::tuple& t) {
  require(t.size() == 9, "objective record must have 9 fields");
  ObjectiveParams o;
  const int shape = t[0].cast<int>(), level = t[1].cast<int>(), kl = t[2].cast<int>();
  require(shape >= 0 && shape <= static_cast<int>(Shape::kGamma), "unknown objective shape code");
  require(level >= 0 && level <= static_cast<int>(Level::kSequenceSum), "unknown ratio level code");
  require(kl >= 0 && kl <= static_cast<int>(Kl::kAbs), "unknown KL code");
  o.shape = static_cast<Shape>(shape);
  o.level = static_cast<Level>(level);
  o.kl = static_cast<Kl>(kl);
  o.seq_mean = t[3].cast<int>();
  const py::tuple p = t[4].cast<py::tuple>();
  require(p.size() == 6, "objective parameters must be 6 numbers");
  for (size_t i = 0; i < 6; i++) o.p[i] = p[i].cast<float>();
  o.kl_coef = t[5].cast<float>();
  o.kl_clamp = t[6].cast<float>();
  o.entropy_coef = t[7].cast<float>();
  o.log_ratio_clamp = t[8].cast<float>();
  return o;
}

}  // namespace tokfuse
