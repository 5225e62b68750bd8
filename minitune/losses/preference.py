"""Losses over preferences: pure functions of log-probabilities, one value a pair (or, for KTO, an answer).

To a prompt x there is a chosen answer w and a rejected one l. log p(y|x) is the sum over the tokens of y, and

    r(y) = log p(y|x) - log p_ref(y|x)        the log-ratio of an answer to the reference model
    d    = r(w) - r(l)                        the margin of a pair; b d is that of DPO's implicit rewards b r(y)

| loss        | per pair or answer                                            | source                                 |
|-------------|---------------------------------------------------------------|----------------------------------------|
| dpo         | -(1 - e) log s(b d) - e log s(-b d)                           | Rafailov et al. 2023, equation 7; e:   |
|             |                                                               | Mitchell 2023 (cDPO)                   |
| robust dpo  | [-(1 - e) log s(b d) + e log s(-b d)] / (1 - 2 e)             | Chowdhury et al. 2024, section 3.1     |
| ipo         | (d - 1 / (2 b))^2                                             | Azar et al. 2023, equation 17          |
| hinge       | max(0, 1 - b d)                                               | Zhao et al. 2023 (SLiC), on r as in    |
|             |                                                               | Liu et al. 2024 (RSO)                  |
| kto         | v (1 - s(b (r - z))), or v (1 - s(b (z - r))) where undesired | Ethayarajh et al. 2024, section 4.1    |
| odds ratio  | -log s(log odds(w) - log odds(l)), odds = P / (1 - P)         | Hong et al. 2024 (ORPO), equation 7    |
| simpo       | -log s(b (mean log p(w) - mean log p(l)) - g)                 | Meng et al. 2024, equation 6           |
| cpo         | that of dpo with log p in place of r                          | Xu et al. 2024, equation 3             |
| reward      | -log s(R(w) - R(l) - m), R a scalar head                      | Ouyang et al. 2022, equation 1; m:     |
|             |                                                               | Touvron et al. 2023 (Llama 2), eq. 2   |

with s the logistic function, e the share of flipped labels, v a weight and z the baseline of `kto_baseline`. Means
and weights belong to the loop, so nothing is averaged here. One function with a `loss_type` was rejected: options that
a type ignores would be silent, as label smoothing was in releases of other trainers.
"""

import math

import torch
import torch.nn.functional as F


def dpo_loss(margin: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return DPO's loss of each pair, (P,), from margins d (P,) in nats; `label_smoothing` e makes it cDPO's.

    With d = log p(w|x) - log p(l|x) it is the preference term of CPO, whose reference is uniform.
    """
    z = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def robust_dpo_loss(margin: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """Return the loss (P,) whose mean over labels flipped with probability e < 1/2 is DPO's on the true ones."""
    z = beta * margin
    kept, flipped = (1 - label_smoothing) * F.logsigmoid(z), label_smoothing * F.logsigmoid(-z)
    return (flipped - kept) / (1 - 2 * label_smoothing)


def ipo_loss(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """Return IPO's squared distance of d (P,) from 1 / (2 beta); beta is the paper's tau."""
    return (margin - 1 / (2 * beta)) ** 2


def hinge_loss(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """Return what beta d (P,) lacks to 1."""
    return F.relu(1 - beta * margin)


def kto_baseline(log_ratio: torch.Tensor) -> torch.Tensor:
    """Return z, the estimate of KL(p || p_ref) from the log-ratios (n,) of answers to other prompts; no gradient."""
    return log_ratio.detach().mean().clamp(min=0)


def kto_loss(
    log_ratio: torch.Tensor,
    desirable: torch.Tensor,
    baseline: torch.Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Return KTO's loss of each answer, (n,), from log-ratios r (n,), `desirable` (n,) bool and the baseline z ()."""
    gain = beta * (log_ratio - baseline)
    good, bad = desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)  # 1 - s(u) = s(-u)
    return torch.where(desirable, good, bad)


def log_odds(mean_log_probability: torch.Tensor) -> torch.Tensor:
    """Return log(P / (1 - P)) for log P (n,) below 0; a P that fp32 rounds to 1 counts as the next number below.

    log(1 - e^u) loses all digits near 0 or far from it, depending on its form (Maechler 2012): hence two.
    """
    u = mean_log_probability.clamp(max=-torch.finfo(mean_log_probability.dtype).eps)
    near = u > -math.log(2)  # where P > 1/2; the other branch gets a harmless value, or its gradient would be NaN
    small = torch.log(-torch.expm1(torch.where(near, u, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, u)))
    return u - torch.where(near, small, large)


def odds_ratio_loss(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor) -> torch.Tensor:
    """Return ORPO's preference term (P,) from each side's log-probability per token (P,)."""
    return -F.logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def simpo_loss(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """Return SimPO's loss (P,) from each side's log-probability per token (P,); gamma is the margin to reach."""
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def bradley_terry_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a reward model's loss (P,) from the rewards (P,) of both sides; margins (P,) are what w must win by."""
    lead = chosen - rejected
    return -F.logsigmoid(lead if margins is None else lead - margins)
