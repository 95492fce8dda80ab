"""The pruning step as fused operators: score, choose, select, move, and the gradient back through the choice.

A folder an operator: `op.py` is the contract and registers it with PyTorch, `reference.py` computes it in plain PyTorch
(the truth, the CPU path and what goes into ONNX graphs), `kernels.py` in Triton and is imported only when it runs.
"""
