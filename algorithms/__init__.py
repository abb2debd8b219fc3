"""Losses, advantages, selection and schedules of published methods. Pure functions; no device code.

    algorithm = tokfuse.algorithms.make("dapo", overlong=None)
    state = algorithm.initial_state()
    for batch in rollouts:
        state = tokfuse.algorithms.train_step(algorithm, state, batch, forward, optimizer).state

`python -m tokfuse algorithms` lists the methods. `docs/paper_index.md` states which claim each method makes
about its paper.
"""

from tokfuse.algorithms import causal as causal
from tokfuse.algorithms import critic as critic
from tokfuse.algorithms import curation as curation
from tokfuse.algorithms import distillation as distillation
from tokfuse.algorithms import reward as reward
from tokfuse.algorithms import table as _table  # noqa: F401  (the import fills the registry)
from tokfuse.algorithms.a2pr import A2PR as A2PR
from tokfuse.algorithms.adora import ADORA as ADORA
from tokfuse.algorithms.bapo import BAPO as BAPO
from tokfuse.algorithms.base import Algorithm as Algorithm
from tokfuse.algorithms.base import Plan as Plan
from tokfuse.algorithms.base import State as State
from tokfuse.algorithms.base import kept_sequences as kept_sequences
from tokfuse.algorithms.batch import Batch as Batch
from tokfuse.algorithms.batch import World as World
from tokfuse.algorithms.cip import CIP as CIP
from tokfuse.algorithms.d3s import D3S as D3S
from tokfuse.algorithms.dcpo import DCPO as DCPO
from tokfuse.algorithms.distillation import Distillation as Distillation
from tokfuse.algorithms.distillation import DistillationBatch as DistillationBatch
from tokfuse.algorithms.distillation import DistillationPlan as DistillationPlan
from tokfuse.algorithms.distillation import TopKStep as TopKStep
from tokfuse.algorithms.distillation import top_k_step as top_k_step
from tokfuse.algorithms.dypo import DYPO as DYPO
from tokfuse.algorithms.epo import EPO as EPO
from tokfuse.algorithms.gbpo import BPO as BPO
from tokfuse.algorithms.gbpo import GBPO as GBPO
from tokfuse.algorithms.gbpo import median_loss as median_loss
from tokfuse.algorithms.grpo_guard import GRPOGuard as GRPOGuard
from tokfuse.algorithms.lopti import LOPTI as LOPTI
from tokfuse.algorithms.mirror_descent import MirrorDescent as MirrorDescent
from tokfuse.algorithms.nft import NFT as NFT
from tokfuse.algorithms.pipo import PIPO as PIPO
from tokfuse.algorithms.preference import NLL as NLL
from tokfuse.algorithms.preference import Likelihood as Likelihood
from tokfuse.algorithms.preference import Mixed as Mixed
from tokfuse.algorithms.preference import PairLoss as PairLoss
from tokfuse.algorithms.preference import PreferenceBatch as PreferenceBatch
from tokfuse.algorithms.preference import PreferenceLoss as PreferenceLoss
from tokfuse.algorithms.preference import PreferenceStep as PreferenceStep
from tokfuse.algorithms.preference import kto_kl as kto_kl
from tokfuse.algorithms.preference import mismatched as mismatched
from tokfuse.algorithms.preference import preference_step as preference_step
from tokfuse.algorithms.r2vpo import R2VPO as R2VPO
from tokfuse.algorithms.registry import make as make
from tokfuse.algorithms.registry import names
from tokfuse.algorithms.rules import ClipCov as ClipCov
from tokfuse.algorithms.rules import Correction as Correction
from tokfuse.algorithms.rules import DampRare as DampRare
from tokfuse.algorithms.rules import HighEntropy as HighEntropy
from tokfuse.algorithms.rules import KLCov as KLCov
from tokfuse.algorithms.rules import PositiveLikelihood as PositiveLikelihood
from tokfuse.algorithms.standard import EntropyControl as EntropyControl
from tokfuse.algorithms.standard import KLControl as KLControl
from tokfuse.algorithms.standard import Overlong as Overlong
from tokfuse.algorithms.standard import Standard as Standard
from tokfuse.algorithms.tppo import TPPO as TPPO
from tokfuse.algorithms.train import TrainStep as TrainStep
from tokfuse.algorithms.train import train_step as train_step

from tokfuse.algorithms import presets as _presets  # isort: skip  # noqa: E402, F401  (needs every registration)

list = names
