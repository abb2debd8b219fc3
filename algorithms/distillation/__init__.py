"""Distillation: losses between a student and a teacher, over the ops `distill_step`, `policy_step` and `ids=`."""

from tokfuse.algorithms.distillation.base import Distillation as Distillation
from tokfuse.algorithms.distillation.base import DistillationPlan as DistillationPlan
from tokfuse.algorithms.distillation.batch import DistillationBatch as DistillationBatch
from tokfuse.algorithms.distillation.leaf import LeaF as LeaF
from tokfuse.algorithms.distillation.minillm import MiniLLM as MiniLLM
from tokfuse.algorithms.distillation.opd import OnPolicy as OnPolicy
from tokfuse.algorithms.distillation.opd import reverse_kl_estimate as reverse_kl_estimate
from tokfuse.algorithms.distillation.self_distillation import SelfDistillation as SelfDistillation
from tokfuse.algorithms.distillation.self_distillation import demonstrations as demonstrations
from tokfuse.algorithms.distillation.top_k import TopK as TopK
from tokfuse.algorithms.distillation.top_k import TopKStep as TopKStep
from tokfuse.algorithms.distillation.top_k import top_k_step as top_k_step
from tokfuse.algorithms.distillation.vocabulary import GKD as GKD
from tokfuse.algorithms.distillation.vocabulary import AdaptiveSchedule as AdaptiveSchedule
from tokfuse.algorithms.distillation.vocabulary import DistiLLM as DistiLLM
from tokfuse.algorithms.distillation.vocabulary import TotalVariation as TotalVariation
