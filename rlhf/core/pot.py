"""POT, with the backends switched off that this toolkit has no use for.

POT imports every array library that is installed. JAX then takes three quarters of each GPU that it sees, before the
first plan is made. Import POT from here alone.
"""

import os

for _backend in ("JAX", "CUPY", "TENSORFLOW"):
    os.environ[f"POT_BACKEND_DISABLE_{_backend}"] = "1"

from ot.bregman import sinkhorn_log  # noqa: E402  # after what it reads

__all__ = ["sinkhorn_log"]
