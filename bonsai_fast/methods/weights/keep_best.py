"""Which weights of a matrix are kept, by their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from bonsai_fast.config.choices import CompareWithin
from bonsai_fast.config.weight_pattern import Pattern
from bonsai_fast.ops.native import wanda_keep

BLOCK = 128


def keep_best(scores: Tensor, pattern: Pattern, within: CompareWithin) -> Tensor:
    """Keep the weights with the highest scores in every group; of equal ones, the first.

    Groups of an N:M pattern are M neighbours in a row, for any `within`. Otherwise:

        layer        the whole matrix
        input        a column: the weights of one input
        input-128    128 neighbouring columns (fewer at the end)
        output       a row: the weights of one output
        output-128   128 neighbouring rows (fewer at the end)

    "First" runs along the rows of a group: by output and then by input, but for "input" by output.

    Args:
        scores: float32 [out, in], not negative; compared only inside groups.
        pattern: how many are zeroed.
        within: which weights form a group.
    Returns:
        bool [out, in], True = kept, on the device of `scores`.
    Raises:
        ValueError: a score is NaN, or M does not divide the inputs.

    Source: Sun et al., arXiv:2306.11695, section 2 (output), tables 3 and 7, appendix C (N:M).
    """
    if pattern.group is not None:
        return _keep_rows(scores, pattern, pattern.group)
    if within == "output":
        return _keep_rows(scores, pattern, scores.shape[1])
    if within == "input":
        return _keep_rows(scores.T, pattern, scores.shape[0]).T
    if within == "layer":
        return _keep_block(scores, pattern)
    dim = 1 if within == "input-128" else 0
    blocks = [_keep_block(block, pattern) for block in scores.split(BLOCK, dim=dim)]
    return torch.cat(blocks, dim=dim)


def _keep_block(scores: Tensor, pattern: Pattern) -> Tensor:
    return _keep_rows(scores.reshape(1, -1), pattern, scores.numel()).view(scores.shape)


def _keep_rows(scores: Tensor, pattern: Pattern, group: int) -> Tensor:
    ones = scores.new_ones(scores.shape[1])
    return wanda_keep(scores, ones, n=group - pattern.num_pruned(group), m=group)
