"""Reward models: losses that correct noise, selection, length and augmentation, and calibration.

Estimators and fits raise ValueError for values out of range, also on a GPU. Losses check probabilities and weights on
the CPU, and on other devices only with TOKFUSE_CHECK=1. In the other inputs of a loss, NaN stays NaN.
"""

from tokfuse.algorithms.reward.balance import BalancePenalty as BalancePenalty
from tokfuse.algorithms.reward.calibrate import RewardCalibrator as RewardCalibrator
from tokfuse.algorithms.reward.correction import NoiseCorrection as NoiseCorrection
from tokfuse.algorithms.reward.correction import PropensityLoss as PropensityLoss
from tokfuse.algorithms.reward.correction import anchor_noise_rates as anchor_noise_rates
from tokfuse.algorithms.reward.correction import imputation_loss as imputation_loss
from tokfuse.algorithms.reward.effects import group_effect as group_effect
from tokfuse.algorithms.reward.effects import principled_uplift_auc as principled_uplift_auc
from tokfuse.algorithms.reward.effects import uplift_loss as uplift_loss
from tokfuse.algorithms.reward.fimi import FiMi as FiMi
from tokfuse.algorithms.reward.fimi import LengthProbe as LengthProbe
from tokfuse.algorithms.reward.imitation import DWBC as DWBC
from tokfuse.algorithms.reward.imitation import weighted_nll as weighted_nll
from tokfuse.algorithms.reward.ivl import IVL as IVL
from tokfuse.algorithms.reward.pairwise import bradley_terry as bradley_terry
from tokfuse.algorithms.reward.pairwise import pair_consistency as pair_consistency
from tokfuse.algorithms.reward.parl import PARL as PARL
from tokfuse.algorithms.reward.ugda import UGDARefinement as UGDARefinement
