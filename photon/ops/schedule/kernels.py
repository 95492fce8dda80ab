"""The whole decision for a row of scores in one program, which holds the row in registers.

Quantiles and the lowest score kept by ``min_tokens`` are order statistics. They are found exactly without sorting, by
building them bit by bit: the bits of non-negative floats, read as integers, are in the order of the floats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon.ops.schedule.reference import DESCRIPTOR_SIZE, LARGEST_SCORE, Decision, ThresholdWeights

EXACT = tl.constexpr(2.0**14)
FLOOR = tl.constexpr(1e-8 * 2.0**14)
SQRT_HALF = tl.constexpr(0.5**0.5)
NUM_NUMBERS = tl.constexpr(DESCRIPTOR_SIZE)
LARGEST = tl.constexpr(LARGEST_SCORE)
KEY_BITS = tl.constexpr(31)
COUNT_BITS = tl.constexpr(20)
COUNT_MASK = tl.constexpr(2**20 - 1)


@triton.jit
def _mean_std(x, mask, count):
    mean = tl.div_rn(tl.sum(tl.where(mask, x, 0.0), axis=0), count)
    centred = tl.where(mask, x - mean, 0.0)
    return mean, tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, axis=0), count))


@triton.jit
def _signed_log(x):
    """sign(x) log(1 + |x|); the fraction takes back what rounding 1 + |x| lost."""
    size = tl.abs(x)
    above = 1.0 + size
    is_lost = above == 1.0
    log = tl.where(is_lost, size, tl.log(above) * (size / tl.where(is_lost, 1.0, above - 1.0)))
    return tl.where(x < 0, -log, log)


@triton.jit
def _count_three(keys, a, b, c):
    """How many keys are below a, b and c, in one reduction."""
    below = (keys < a).to(tl.int64)
    below += (keys < b).to(tl.int64) << COUNT_BITS
    below += (keys < c).to(tl.int64) << (2 * COUNT_BITS)
    total = tl.sum(below, axis=0)
    first = (total & COUNT_MASK).to(tl.int32)
    second = ((total >> COUNT_BITS) & COUNT_MASK).to(tl.int32)
    return first, second, (total >> (2 * COUNT_BITS)).to(tl.int32)


@triton.jit
def _score_of(key):
    """The scaled score whose key this is; keys 0 and 1 are no scores."""
    return tl.where(key < 2, 0, key - 2).to(tl.float32, bitcast=True)


@triton.jit
def _interpolate(keys, low, num_up_to, rank, place):
    """Quantile between the score of rank ``rank``, key ``low``, and the next one, at ``place`` of [0, n - 1]."""
    fraction = place - tl.floor(place)
    following = tl.min(tl.where(keys > low, keys, 0x7FFFFFFF), axis=0)
    high = tl.where((fraction == 0.0) | (num_up_to > rank + 1), low, following)
    return _score_of(low) + (_score_of(high) - _score_of(low)) * fraction


@triton.jit
def schedule_kernel(
    u,
    lengths,
    hidden_weight,
    hidden_bias,
    last_weight,
    last_bias,
    u_out,
    rho_out,
    theta_out,
    p_out,
    keep_out,
    descriptor_out,
    row_stride,
    num_columns,
    num_hidden,
    min_tokens,
    scale,
    temperature,
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One row; see :func:`photon.ops.schedule.op.schedule`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    length = tl.load(lengths + row).to(tl.int32)
    is_inside = column < num_columns
    is_token = column < length
    u_out += row * num_columns
    rho_out += row * num_columns
    p_out += row * num_columns
    keep_out += row * num_columns

    x = tl.load(u + row * row_stride + column, mask=is_token, other=0.0)
    is_usable = is_token & (tl.abs(x) < LARGEST)
    x = tl.where(is_usable, x, 0.0)
    tl.store(u_out + column, x, mask=is_inside)
    num_usable = tl.sum(is_usable.to(tl.int32), axis=0)
    count = tl.maximum(num_usable, 1).to(tl.float32)
    # A row without a usable token is described as one of zeros.
    is_any = num_usable > 0
    low = tl.where(is_any, tl.min(tl.where(is_usable, x, float("inf")), axis=0), 0.0)
    high = tl.where(is_any, tl.max(tl.where(is_usable, x, float("-inf")), axis=0), 0.0)
    u_mean, u_std = _mean_std(x, is_usable, count)
    log = _signed_log(x)
    log_mean = tl.div_rn(tl.sum(log, axis=0), count)
    log_high = tl.where(is_any, tl.max(tl.where(is_usable, log, float("-inf")), axis=0), 0.0)

    rho = tl.where(is_usable, tl.div_rn((x - low) * EXACT, (high - low) * EXACT + FLOOR), 0.0)
    tl.store(rho_out + column, rho, mask=is_inside)
    rho_mean, rho_std = _mean_std(rho, is_usable, count)
    rho_low = tl.where(is_any, tl.min(tl.where(is_usable, rho, float("inf")), axis=0), 0.0)
    rho_high = tl.max(rho, axis=0)

    # In the order in which tokens are kept: padding, tokens whose score is not usable, the others by their score.
    keys = tl.where(is_usable, rho.to(tl.int32, bitcast=True) + 2, is_token.to(tl.int32))
    last = tl.maximum(num_usable - 1, 0).to(tl.float32)
    quarter, half = last * 0.25, last * 0.5
    skipped = BLOCK - tl.maximum(num_usable, 1)
    quarter_rank = skipped + tl.floor(quarter).to(tl.int32)
    half_rank = skipped + tl.floor(half).to(tl.int32)
    num_highest = tl.minimum(min_tokens, BLOCK)
    kept_rank = BLOCK - num_highest
    quarter_key = tl.full([], 0, tl.int32)
    half_key = tl.full([], 0, tl.int32)
    kept_key = tl.full([], 0, tl.int32)
    for step in range(KEY_BITS):
        bit = tl.full([], 1, tl.int32) << (KEY_BITS - 1 - step)
        a, b, c = _count_three(keys, quarter_key | bit, half_key | bit, kept_key | bit)
        quarter_key = tl.where(a <= quarter_rank, quarter_key | bit, quarter_key)
        half_key = tl.where(b <= half_rank, half_key | bit, half_key)
        kept_key = tl.where(c <= kept_rank, kept_key | bit, kept_key)
    a, b, c = _count_three(keys, quarter_key + 1, half_key + 1, kept_key + 1)
    room = num_highest - (BLOCK - c)

    described = (
        rho_mean,
        rho_std,
        rho_low,
        rho_high,
        _interpolate(keys, quarter_key, a, quarter_rank, quarter),
        _interpolate(keys, half_key, b, half_rank, half),
        u_mean,
        u_std,
        low,
        high,
        log_mean,
        log_high,
    )
    unit = tl.arange(0, BLOCK_HIDDEN)
    is_unit = unit < num_hidden
    hidden = tl.load(hidden_bias + unit, mask=is_unit, other=0.0).to(tl.float32)
    for number in tl.static_range(NUM_NUMBERS):
        value = tl.where(is_any, described[number], 0.0)
        tl.store(descriptor_out + row * NUM_NUMBERS + number, value)
        weight = tl.load(hidden_weight + unit * NUM_NUMBERS + number, mask=is_unit, other=0.0)
        hidden += weight.to(tl.float32) * value
    hidden = hidden * 0.5 * (1.0 + tl.erf(hidden * SQRT_HALF))
    weight = tl.load(last_weight + unit, mask=is_unit, other=0.0).to(tl.float32)
    logit = tl.sum(weight * hidden, axis=0) + tl.load(last_bias).to(tl.float32)
    theta = scale * tl.div_rn(1.0, 1.0 + tl.exp(-logit))
    tl.store(theta_out + row, theta)

    delta = _score_of(keys) - theta
    p = tl.div_rn(1.0, 1.0 + tl.exp(-tl.div_rn(delta, temperature)))
    tl.store(p_out + column, tl.where(keys > 1, p, 0.0), mask=is_inside)
    is_level = keys == kept_key
    is_highest = (keys > kept_key) | (is_level & (tl.cumsum(is_level.to(tl.int32), axis=0) <= room))
    is_kept = (keys > 0) & (((keys > 1) & (delta > 0)) | is_highest)
    tl.store(keep_out + column, is_kept, mask=is_inside)


def num_warps(block: int) -> int:
    """Warps of a program for rows of ``block``: 16 scores a thread, or more once there are 32 warps."""
    return min(max(block // (16 * 32), 4), 32)


def schedule(
    u: Tensor, lengths: Tensor, weights: ThresholdWeights, scale: float, temperature: float, min_tokens: int
) -> tuple[Decision, Tensor]:
    """Launch the kernel; arguments and result of :func:`photon.ops.schedule.reference.schedule`."""
    num_rows, num_columns = u.shape
    if u.stride(1) != 1:
        u = u.contiguous()
    # A tensor each: an operator's results may not share memory.
    u_out, rho, p = (torch.empty(num_rows, num_columns, dtype=torch.float32, device=u.device) for _ in range(3))
    keep = torch.empty(num_rows, num_columns, dtype=torch.bool, device=u.device)
    theta = torch.empty(num_rows, dtype=torch.float32, device=u.device)
    descriptor = torch.empty(num_rows, DESCRIPTOR_SIZE, dtype=torch.float32, device=u.device)
    block = max(triton.next_power_of_2(num_columns), 16)
    num_hidden = weights.hidden_bias.shape[0]
    if num_rows:
        with torch.cuda.device_of(u):
            schedule_kernel[(num_rows,)](
                u, lengths, *(x.contiguous() for x in weights), u_out, rho, theta, p, keep, descriptor,
                u.stride(0), num_columns, num_hidden, min_tokens, scale, temperature,
                BLOCK=block, BLOCK_HIDDEN=max(triton.next_power_of_2(num_hidden), 16), num_warps=num_warps(block),
                enable_fp_fusion=False,
            )  # fmt: skip
    return Decision(u_out, rho, theta, p, keep), descriptor
