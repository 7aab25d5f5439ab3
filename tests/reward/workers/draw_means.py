"""The reward stage with Bayesian heads whose draws are all means: what is left does not depend on random numbers."""

import runpy

import torch

from reward import heads

heads._drawn = lambda scale, shape: scale * torch.exp(torch.lgamma(1 + 1 / shape))
runpy.run_module("reward", run_name="__main__", alter_sys=True)
