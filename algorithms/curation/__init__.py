"""Selection of training data: influence, curricula, attribution, and bandit arms with logged propensities.

One rule holds for every selector: a feature, score, reward or statistic that is not finite raises ValueError, also on a
GPU. NaN has no rank, and torch sorts it first. The message contains the index of the sample.
"""

from tokfuse.algorithms.curation import hpl as hpl
from tokfuse.algorithms.curation import leaf as leaf
from tokfuse.algorithms.curation import shapley as shapley
from tokfuse.algorithms.curation import thought_branches as thought_branches
from tokfuse.algorithms.curation.bandits import OFS as OFS
from tokfuse.algorithms.curation.bandits import Choice as Choice
from tokfuse.algorithms.curation.bandits import SquareCB as SquareCB
from tokfuse.algorithms.curation.bandits import generation_report as generation_report
from tokfuse.algorithms.curation.cog_rethinker import CogRethinker as CogRethinker
from tokfuse.algorithms.curation.cures import CurES as CurES
from tokfuse.algorithms.curation.cures import rollout_sigma as rollout_sigma
from tokfuse.algorithms.curation.hpl import HPLCurriculum as HPLCurriculum
from tokfuse.algorithms.curation.influential import GREATS as GREATS
from tokfuse.algorithms.curation.influential import LESS as LESS
from tokfuse.algorithms.curation.influential import UGDA as UGDA
from tokfuse.algorithms.curation.isla import ISLA as ISLA
from tokfuse.algorithms.curation.leaf import LeaFMasks as LeaFMasks
from tokfuse.algorithms.curation.seele import SEELE as SEELE
from tokfuse.algorithms.curation.seele import fit_3pl as fit_3pl
from tokfuse.algorithms.curation.seele import invert_3pl as invert_3pl
from tokfuse.algorithms.curation.thought_branches import ThoughtBranches as ThoughtBranches
