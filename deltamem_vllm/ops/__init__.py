"""The delta rule on plain tensors: the fp32 truth, the native kernels, a torch fallback and the choice
between them.
"""
