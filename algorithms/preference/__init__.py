"""Preference losses: the DPO family and related methods, all with one fused backward."""

from tokfuse.algorithms.preference import table as _table  # noqa: F401  (the import fills the registry)
from tokfuse.algorithms.preference.base import PairLoss as PairLoss
from tokfuse.algorithms.preference.base import PreferenceLoss as PreferenceLoss
from tokfuse.algorithms.preference.batch import PreferenceBatch as PreferenceBatch
from tokfuse.algorithms.preference.contrast import Contrast as Contrast
from tokfuse.algorithms.preference.did import did_entropy as did_entropy
from tokfuse.algorithms.preference.did import did_token_entropy as did_token_entropy
from tokfuse.algorithms.preference.likelihood import NLL as NLL
from tokfuse.algorithms.preference.mixed import Likelihood as Likelihood
from tokfuse.algorithms.preference.mixed import Mixed as Mixed
from tokfuse.algorithms.preference.pointwise import kto_kl as kto_kl
from tokfuse.algorithms.preference.pointwise import mismatched as mismatched
from tokfuse.algorithms.preference.result import PreferenceStep as PreferenceStep
from tokfuse.algorithms.preference.schedules import TRDPO as TRDPO
from tokfuse.algorithms.preference.schedules import CheckpointRing as CheckpointRing
from tokfuse.algorithms.preference.schedules import MetaTuner as MetaTuner
from tokfuse.algorithms.preference.step import preference_step as preference_step
