"""Implementations of attention that err in every way, for trials of kernels."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention.call import AttentionCall, AttentionOutput


def right(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    return reference.run(q, k, v, call)


def slow(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    time.sleep(0.2)
    return reference.run(q, k, v, call)


def without_documents(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    return reference.run(q, k, v, call._replace(documents=None))


def nan_in_gradients(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    """The output is right, and so are the gradients of queries and keys."""
    v = v.clone()
    v.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    return reference.run(q, k, v, call)


def raising(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def crashing(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def hanging(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    time.sleep(3600)
    raise AssertionError
