"""Triton kernels for CUDA and XPU, each beside a plain PyTorch twin with the same contract.

A public function runs its kernel where Triton is installed, the tensor lies on a card and the
kernel is not named in XERAY_DISABLE_KERNELS; otherwise it runs the twin (`*_torch`).
"""
