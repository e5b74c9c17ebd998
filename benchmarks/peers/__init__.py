"""jaxcap beside PyTorch: the same training step in both, on the same machine, turn by turn (`python -m benchmarks.peers`).

`torch_*.py` is the step in PyTorch, written for this comparison; only they import torch. `jaxcap_side.py` serves jaxcap's step as
`benchmarks.step_time` measures it, `child.py` is the pipe to both.
"""
