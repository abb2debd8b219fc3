"""A plugin of pytest: the packages of the group `hosts` that `make test` does not install cannot be imported."""

import sys

for name in ("trl", "peft", "accelerate", "datasets", "cloudpickle"):
    sys.modules[name] = None  # type: ignore[assignment]
